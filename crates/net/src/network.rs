//! The five operations. Each one looks at what is there, and changes what differs.

use crate::config::NetConfig;
use crate::endpoint::{Endpoint, Mac, is_tap_name};
use crate::error::{Error, Result};
use crate::firewall::{self, FirewallDrop};
use crate::links::{Link, Links};
use crate::ruleset::{Change, Elements, Guard, Ruleset};
use crate::sysctl::Sysctl;
use crate::tap::Tap;
use ipnet::Ipv4Net;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::Mutex;
use tracing::{info, warn};

/// A network that is there: its bridge is up and its rules are in force. A clone is the same
/// network.
///
/// Calls may run side by side; one changes the host at a time. A call that is cancelled leaves what
/// [`reconcile`](Network::reconcile) puts right.
#[derive(Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

struct Shared {
    config: NetConfig,
    links: Links,
    ruleset: Ruleset,
    /// Held from looking to changing. An async mutex, because netlink and nft are waited for in
    /// between.
    changing: Mutex<()>,
}

/// What [`Network::reconcile`] did, a line for the log each: taps by name, rules in words. All
/// empty when all was well.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reconciled {
    /// What was missing.
    pub added: Vec<String>,
    /// What nobody wanted.
    pub removed: Vec<String>,
    /// What is wanted and could not be had: the tap's name, and why. It keeps no other from being
    /// put right.
    pub failed: Vec<(String, String)>,
}

impl Network {
    /// Makes the bridge, its address, the kernel settings and the tables, or repairs what of them
    /// is there. Taps and forwards that exist are not touched. The netlink socket belongs to the
    /// network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// [`Error::Foreign`] if the bridge's name is somebody else's, [`Error::Overlap`] if the subnet
    /// is in use on this host (nothing was changed then); those of the tools otherwise. Repeat it
    /// when the cause is gone.
    pub async fn ensure(config: NetConfig) -> Result<Network> {
        Network::ensure_guarded(config, Guard::PerTap).await
    }

    async fn ensure_guarded(config: NetConfig, guard: Guard) -> Result<Network> {
        let links = Links::open()?;
        check_bridge(&links, &config).await?;
        check_overlap(&links, &config).await?;
        // Rules before the bridge, forwarding last: at no moment does a guest have more than it
        // should.
        let ruleset = ensure_tables(&config, guard).await?;
        ensure_bridge(&links, &config).await?;
        Sysctl::forwarding().ensure()?;

        let network = Network {
            shared: Arc::new(Shared {
                config,
                links,
                ruleset,
                changing: Mutex::new(()),
            }),
        };
        network.warn_of_firewall_drops().await;
        Ok(network)
    }

    /// Advice only: not to be able to give it stops nobody.
    async fn warn_of_firewall_drops(&self) {
        match self.firewall_drops().await {
            Ok(drops) => drops
                .iter()
                .for_each(|drop| warn!(table = drop.table, chain = drop.chain, "{drop}")),
            Err(error) => warn!("cannot see whether a firewall of this host stands in the way: {error}"),
        }
    }

    /// The settings it was made with.
    pub fn config(&self) -> &NetConfig {
        &self.shared.config
    }

    /// Whether frames are checked tap by tap. Without (a kernel lacking `CONFIG_NF_TABLES_BRIDGE`;
    /// logged as a warning by [`ensure`](Network::ensure)), a guest with root can take over the
    /// address *and* MAC of another VM, and can answer the host's ARP requests in its place; a
    /// source that is no VM's is dropped all the same.
    pub fn guards_taps(&self) -> bool {
        self.shared.ruleset.guard() == Guard::PerTap
    }

    /// Firewall chains of the host that drop what guests send and receive; each says, by `Display`,
    /// what to do about it.
    ///
    /// # Errors
    ///
    /// Those of the program `nft`.
    pub async fn firewall_drops(&self) -> Result<Vec<FirewallDrop>> {
        let Shared {
            config, links, ruleset, ..
        } = &*self.shared;
        firewall::drops(config, &ruleset.table(), links).await
    }

    /// Gives a VM its tap, its address, its forward and its rate. What of it is there already stays
    /// as it is; another rate gives way to this one, and so this is also how a rate is changed.
    ///
    /// # Errors
    ///
    /// [`Error::NotAGuestAddress`], [`Error::Taken`], [`Error::Foreign`] if an interface that is
    /// not ours has the tap's name; those of the tools otherwise. What the call had done is undone.
    pub async fn attach(&self, endpoint: &Endpoint) -> Result<()> {
        let Shared { config, ruleset, .. } = &*self.shared;
        config.check_guest(endpoint.guest_ip())?;
        let _one_at_a_time = self.shared.changing.lock().await;
        let bridge = self.bridge().await?;

        // The tap's guard is there before the tap is.
        let present = ruleset.read().await?;
        present.elements.check_free(endpoint)?;
        let change = present.elements.adding(&ruleset.elements([endpoint]), endpoint);
        if present.is_whole {
            ruleset.apply(&change).await?;
        } else {
            ruleset.apply_whole(&change).await?;
        }

        if let Err(error) = self.ensure_tap(endpoint, &bridge).await {
            if let Err(undo) = ruleset.apply(&change.reversed()).await {
                warn!(
                    tap = endpoint.tap(),
                    "left for the next reconcile, because the tap was not made: {undo}"
                );
            }
            return Err(error);
        }
        Ok(())
    }

    /// Takes a VM's tap, address and forward away. What of it is gone already is as good.
    ///
    /// # Errors
    ///
    /// [`Error::Foreign`] if an interface that is not ours has the tap's name; those of the tools
    /// otherwise.
    pub async fn detach(&self, endpoint: &Endpoint) -> Result<()> {
        let Shared { links, ruleset, .. } = &*self.shared;
        let _one_at_a_time = self.shared.changing.lock().await;
        // The tap first: its guard outlives it.
        if let Some(tap) = links.find(endpoint.tap()).await? {
            let bridge = links.find(self.config().bridge()).await?;
            check_tap(&tap, bridge.as_ref())?;
            links.delete(&tap).await?;
        }
        let present = ruleset.read().await?.elements;
        let unwanted = ruleset.elements([endpoint]);
        ruleset.apply(&present.removing(&unwanted, endpoint)).await
    }

    /// Makes exactly these VMs have a network: what is ours and not wanted goes, what is missing
    /// comes back, what is right is not touched, so that sessions through wanted forwards go on. A
    /// bridge or tables that somebody swept away come back too. Ours are the taps on our bridge
    /// with a name of our form, those that our own tables name, and what is in our tables.
    ///
    /// # Errors
    ///
    /// [`Error::Taken`] for two endpoints that share a port, an address or a tap, and
    /// [`Error::NotAGuestAddress`] for one of another subnet, before anything is changed; those of
    /// the tools for what concerns all of them. What concerns one stands in [`Reconciled::failed`].
    /// It may be repeated.
    pub async fn reconcile(&self, wanted: &[Endpoint]) -> Result<Reconciled> {
        let Shared {
            config, links, ruleset, ..
        } = &*self.shared;
        check_distinct(config, wanted)?;
        let _one_at_a_time = self.shared.changing.lock().await;
        check_bridge(links, config).await?;
        let bridge = ensure_bridge(links, config).await?;
        let present = ruleset.read().await?.elements;
        let mut done = Reconciled::default();

        // As in detach and attach: unwanted taps go before their guard, wanted ones come after it.
        let names: BTreeSet<&str> = wanted.iter().map(Endpoint::tap).collect();
        for tap in taps_of(links, &bridge, &present).await? {
            if !names.contains(tap.name.as_str()) {
                links.delete(&tap).await?;
                done.removed.push(tap.name);
            }
        }
        let change = present.becoming(&ruleset.elements(wanted));
        ruleset.apply_whole(&change).await?;
        done.removed.extend(change.removed.iter().map(ToString::to_string));
        done.added.extend(change.added.iter().map(ToString::to_string));
        for endpoint in wanted {
            match self.ensure_tap(endpoint, &bridge).await {
                Ok(true) => done.added.push(endpoint.tap().to_owned()),
                Ok(false) => {}
                Err(error) => done.failed.push((endpoint.tap().to_owned(), error.to_string())),
            }
        }
        Ok(done)
    }

    /// Whether bridge and tables are there: one question to nft, one to the kernel. A `flush
    /// ruleset` of somebody else, or a restart of a firewall's service, takes the tables away, and
    /// with them what keeps guests from the host.
    ///
    /// # Errors
    ///
    /// Those of the tools.
    pub async fn is_whole(&self) -> Result<bool> {
        let Shared {
            config, links, ruleset, ..
        } = &*self.shared;
        Ok(ruleset.is_there().await? && links.find(config.bridge()).await?.is_some())
    }

    /// Brings back bridge and tables, with nothing in them that was not there: what VMs need is put
    /// in by [`attach`](Network::attach), which may be repeated.
    ///
    /// # Errors
    ///
    /// As [`ensure`](Network::ensure).
    pub async fn repair(&self) -> Result<()> {
        let Shared {
            config, links, ruleset, ..
        } = &*self.shared;
        let _one_at_a_time = self.shared.changing.lock().await;
        check_bridge(links, config).await?;
        ruleset.apply_whole(&Change::default()).await?;
        ensure_bridge(links, config).await.map(drop)
    }

    /// Takes it all away: taps, bridge, tables. `net.ipv4.ip_forward` stays as it is, because
    /// others may rely on it by now. Repeating it is no error; other clones are of no use any more.
    ///
    /// # Errors
    ///
    /// Those of the tools.
    pub async fn teardown(&self) -> Result<()> {
        let Shared {
            config, links, ruleset, ..
        } = &*self.shared;
        let _one_at_a_time = self.shared.changing.lock().await;
        if let Some(bridge) = links.find(config.bridge()).await? {
            check_ours(&bridge)?;
            let present = ruleset.read().await?.elements;
            for tap in taps_of(links, &bridge, &present).await? {
                links.delete(&tap).await?;
            }
            links.delete(&bridge).await?;
        }
        ruleset.remove().await
    }

    async fn bridge(&self) -> Result<Link> {
        let name = self.config().bridge();
        let bridge = self
            .shared
            .links
            .find(name)
            .await?
            .ok_or_else(|| Error::Gone(name.to_owned()))?;
        check_ours(&bridge)?;
        Ok(bridge)
    }

    /// Makes the tap, or repairs the one that is there. Says whether it was made.
    async fn ensure_tap(&self, endpoint: &Endpoint, bridge: &Link) -> Result<bool> {
        let name = endpoint.tap();
        let links = &self.shared.links;
        if let Some(tap) = links.find(name).await? {
            check_tap(&tap, Some(bridge))?;
            self.ensure_port(&tap, bridge).await?;
            return Ok(false);
        }
        // The tap exists only as long as this value, until the last step: an early return or a
        // crash needs no undo.
        let made = Tap::create(name, endpoint.owner())?;
        let tap = links.find(name).await?.ok_or_else(|| Error::Gone(name.to_owned()))?;
        self.ensure_port(&tap, bridge).await?;
        made.persist()?;
        Ok(true)
    }

    /// A tap carries frames only when it is a port, and isolated.
    async fn ensure_port(&self, tap: &Link, bridge: &Link) -> Result<()> {
        let links = &self.shared.links;
        for sysctl in Sysctl::of_tap(&tap.name) {
            sysctl.ensure()?;
        }
        if tap.controller.is_none() {
            links.set_down(tap).await?;
            links.enslave(tap, bridge).await?;
        }
        links.isolate(tap).await?;
        links.set_up(tap).await
    }
}

/// The rules, with taps guarded where the kernel can.
async fn ensure_tables(config: &NetConfig, guard: Guard) -> Result<Ruleset> {
    let ruleset = Ruleset::new(config, guard);
    match ruleset.apply_whole(&Change::default()).await {
        Ok(()) => Ok(ruleset),
        Err(Error::Nft { output, .. }) if guard == Guard::PerTap && lacks_the_bridge_family(&output) => {
            warn!(
                "this kernel has no nftables bridge family (CONFIG_NF_TABLES_BRIDGE): a guest with root can pretend to be another VM of \
                 this host; everything else stays closed to it: {output}"
            );
            let ruleset = Ruleset::new(config, Guard::PerGuest);
            ruleset.apply_whole(&Change::default()).await?;
            Ok(ruleset)
        }
        Err(error) => Err(error),
    }
}

/// EAFNOSUPPORT or EOPNOTSUPP, as nft words them. What else is missing shows in the second attempt.
pub(crate) fn lacks_the_bridge_family(output: &str) -> bool {
    output.contains("not supported")
}

async fn ensure_bridge(links: &Links, config: &NetConfig) -> Result<Link> {
    let mac = Mac::from_ip(config.gateway());
    let bridge = match links.find(config.bridge()).await? {
        Some(bridge) => bridge,
        None => {
            links.add_bridge(config.bridge(), mac).await?;
            info!(bridge = config.bridge(), subnet = %config.subnet(), "bridge made");
            links
                .find(config.bridge())
                .await?
                .ok_or_else(|| Error::Gone(config.bridge().to_owned()))?
        }
    };
    for sysctl in Sysctl::of_bridge(&bridge.name) {
        sysctl.ensure()?;
    }
    if bridge.mac != mac.octets() {
        links.set_mac(&bridge, mac).await?;
    }
    ensure_address(links, config, &bridge).await?;
    if !bridge.up {
        links.set_up(&bridge).await?;
    }
    Ok(bridge)
}

/// The gateway's address and no other: one of an earlier subnet would still be answered for.
async fn ensure_address(links: &Links, config: &NetConfig, bridge: &Link) -> Result<()> {
    let gateway = Ipv4Net::new_assert(config.gateway(), config.subnet().prefix_len());
    let mut is_there = false;
    for address in links.addresses().await? {
        if address.index != bridge.index {
            continue;
        }
        if address.net == gateway {
            is_there = true;
        } else {
            links.delete_address(&address).await?;
        }
    }
    if !is_there {
        links.add_address(bridge, gateway).await?;
    }
    Ok(())
}

pub(crate) async fn check_bridge(links: &Links, config: &NetConfig) -> Result<()> {
    links.find(config.bridge()).await?.as_ref().map_or(Ok(()), check_ours)
}

/// A bridge is ours by its MAC, which it has from its first moment.
fn check_ours(link: &Link) -> Result<()> {
    let why = if !link.is_bridge() {
        "is no bridge"
    } else if !Mac::is_ours(&link.mac) {
        "is somebody else's bridge"
    } else {
        return Ok(());
    };
    let way_out = "Set BRIDGE to a name that is free.";
    Err(Error::Foreign {
        name: link.name.clone(),
        why: why.to_owned(),
        way_out,
    })
}

/// A tap is ours if it is a port of our bridge, or of none (its bridge was deleted under it).
fn check_tap(link: &Link, bridge: Option<&Link>) -> Result<()> {
    let why = if !link.is_tap() {
        "is no tap"
    } else if link.controller.is_some() && link.controller != bridge.map(|bridge| bridge.index) {
        "is a port of another bridge"
    } else {
        return Ok(());
    };
    let way_out = "Find out whose it is, and remove it (ip link delete).";
    Err(Error::Foreign {
        name: link.name.clone(),
        why: why.to_owned(),
        way_out,
    })
}

pub(crate) async fn check_overlap(links: &Links, config: &NetConfig) -> Result<()> {
    let names: BTreeMap<u32, String> = links
        .all()
        .await?
        .into_iter()
        .map(|link| (link.index, link.name))
        .collect();
    for address in links.addresses().await? {
        let interface = names.get(&address.index).cloned().unwrap_or_default();
        let subnet = config.subnet();
        let overlap = subnet.contains(&address.net.network()) || address.net.contains(&subnet.network());
        if overlap && interface != config.bridge() {
            return Err(Error::Overlap {
                subnet,
                address: address.net,
                interface,
            });
        }
    }
    Ok(())
}

fn check_distinct(config: &NetConfig, wanted: &[Endpoint]) -> Result<()> {
    let (mut taps, mut ips, mut ports) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for endpoint in wanted {
        config.check_guest(endpoint.guest_ip())?;
        let tap = endpoint.tap();
        let taken = |what: String, owner: Option<&str>| match owner {
            Some(owner) => Err(Error::Taken {
                what,
                owner: owner.to_owned(),
            }),
            None => Ok(()),
        };
        taken(format!("tap {tap}"), taps.insert(tap, tap))?;
        taken(
            format!("address {}", endpoint.guest_ip()),
            ips.insert(endpoint.guest_ip(), tap),
        )?;
        taken(
            format!("port {}", endpoint.ssh_port()),
            ports.insert(endpoint.ssh_port(), tap),
        )?;
    }
    Ok(())
}

/// Our taps: on our bridge with a name of our form; or named by our tables, and on no bridge at
/// all.
async fn taps_of(links: &Links, bridge: &Link, present: &Elements) -> Result<Vec<Link>> {
    let named: BTreeSet<&str> = present.taps().collect();
    let mut taps = links.all().await?;
    taps.retain(|link| {
        let ours = match link.controller {
            Some(index) => index == bridge.index,
            None => named.contains(link.name.as_str()),
        };
        ours && link.is_tap() && is_tap_name(&link.name)
    });
    Ok(taps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::{Guest, HOST, OUTSIDE, config, endpoint, greeting, ip, on_a_host, outside, serve, unreachable};
    use std::net::{Ipv4Addr, SocketAddrV4};

    #[test]
    fn without_the_bridge_family_a_source_that_is_no_vms_is_still_dropped() {
        on_a_host(async || {
            let world = outside();
            let network = Network::ensure_guarded(config(), Guard::PerGuest)
                .await
                .expect("a network");
            assert!(!network.guards_taps());
            network.attach(&endpoint(1)).await.expect("attach");
            network.attach(&endpoint(2)).await.expect("attach");
            let guest = Guest::boot(&endpoint(1));
            let _clients = world.run(|| serve(SocketAddrV4::new(OUTSIDE, 443), "internet".to_owned()));
            assert_eq!(greeting(Ipv4Addr::LOCALHOST, 22002), "guest 10.77.0.11 to 10.77.0.1");
            guest.inside.run(|| {
                assert_eq!(greeting(OUTSIDE, 443), format!("internet to {HOST}"));
                for source in ["10.77.0.99", "10.77.0.12", "203.0.113.7"] {
                    ip(&format!("addr add {source}/32 dev eth0"));
                    ip(&format!("route replace {OUTSIDE} via 10.77.0.1 src {source}"));
                    unreachable(OUTSIDE, 443);
                }
            });
            let wanted = [endpoint(1), endpoint(2)];
            assert_eq!(
                network.reconcile(&wanted).await.expect("reconcile"),
                Reconciled::default()
            );
            network.teardown().await.expect("teardown");
        });
    }
}
