//! The operations on the network. Each one compares actual and desired state, and changes the
//! difference.

use crate::config::NetConfig;
use crate::endpoint::{Endpoint, has_our_prefix, is_tap_name, mac_from_ip};
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

/// The network of a host: its bridge is up and its rules are in force. Clones refer to the same
/// network.
///
/// Calls may run concurrently; they change the host one at a time. A cancelled call may leave
/// partial changes, which [`reconcile`](Network::reconcile) repairs.
#[derive(Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

struct Inner {
    config: NetConfig,
    links: Links,
    ruleset: Ruleset,
    /// Locked from reading the state to changing it. An async mutex, because netlink and nft are
    /// awaited meanwhile.
    changing: Mutex<()>,
}

/// The changes made by [`Network::reconcile`], one log line each: taps by name, rules as text. All
/// empty if nothing had to change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reconciled {
    /// Missing items that were added.
    pub added: Vec<String>,
    /// Orphaned items that were removed.
    pub removed: Vec<String>,
    /// Taps that could not be repaired, with the reason. They do not prevent the repair of others.
    pub failed: Vec<(String, String)>,
}

impl Network {
    /// Creates or repairs the bridge, its address, the kernel settings and the tables. Existing
    /// taps and forwards are not touched. The netlink socket belongs to the network namespace of
    /// the calling thread.
    ///
    /// # Errors
    ///
    /// [`Error::Foreign`] if another program owns an interface with the bridge's name,
    /// [`Error::Overlap`] if the subnet is in use on this host (in both cases nothing was changed);
    /// otherwise the errors of the tools. Can be repeated once the cause is gone.
    pub async fn ensure(config: NetConfig) -> Result<Network> {
        Network::ensure_guarded(config, Guard::PerTap).await
    }

    async fn ensure_guarded(config: NetConfig, guard: Guard) -> Result<Network> {
        let links = Links::open()?;
        check_bridge(&links, &config).await?;
        check_overlap(&links, &config).await?;
        // Rules first, forwarding last: at no moment can a guest reach more than it should.
        let ruleset = ensure_tables(&config, guard).await?;
        ensure_bridge(&links, &config).await?;
        Sysctl::forwarding().ensure()?;

        let network = Network {
            inner: Arc::new(Inner {
                config,
                links,
                ruleset,
                changing: Mutex::new(()),
            }),
        };
        network.warn_of_firewall_drops().await;
        Ok(network)
    }

    /// Logs warnings only: an error here is not fatal.
    async fn warn_of_firewall_drops(&self) {
        match self.firewall_drops().await {
            Ok(drops) => drops
                .iter()
                .for_each(|drop| warn!(table = drop.table, chain = drop.chain, "{drop}")),
            Err(error) => warn!("cannot check whether the host's firewall drops guests' packets: {error}"),
        }
    }

    /// Returns the settings of the network.
    pub fn config(&self) -> &NetConfig {
        &self.inner.config
    }

    /// Returns whether frames are checked per tap.
    ///
    /// This needs a kernel with `CONFIG_NF_TABLES_BRIDGE`; [`ensure`](Network::ensure) logs a
    /// warning otherwise. Without the check, a guest with root can take over the address *and* MAC
    /// of another VM, and can answer the host's ARP requests in its place. Packets whose source
    /// belongs to no VM are dropped in any case.
    pub fn guards_taps(&self) -> bool {
        self.inner.ruleset.guard() == Guard::PerTap
    }

    /// Returns the host's firewall chains that drop guests' packets. The `Display` of each names
    /// the remedy.
    ///
    /// # Errors
    ///
    /// The errors of the program `nft`.
    pub async fn firewall_drops(&self) -> Result<Vec<FirewallDrop>> {
        let Inner {
            config, links, ruleset, ..
        } = &*self.inner;
        firewall::drops(config, &ruleset.table(), links).await
    }

    /// Adds a VM's tap, address, forward and rate limit. Existing parts are kept, except for
    /// another rate limit, which is replaced: this is also how a limit is changed.
    ///
    /// # Errors
    ///
    /// [`Error::NotAGuestAddress`], [`Error::Taken`], [`Error::Foreign`] if an interface of another
    /// owner has the tap's name; otherwise the errors of the tools. The changes of a failed call
    /// are undone.
    pub async fn attach(&self, endpoint: &Endpoint) -> Result<()> {
        let Inner { config, ruleset, .. } = &*self.inner;
        config.check_guest(endpoint.guest_ip())?;
        let _guard = self.inner.changing.lock().await;
        let bridge = self.bridge().await?;

        // The tap's rules must exist before the tap.
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
                    "cannot undo a failed attach; the next reconcile does: {undo}"
                );
            }
            return Err(error);
        }
        Ok(())
    }

    /// Removes a VM's tap, address and forward. Succeeds if some of them do not exist.
    ///
    /// # Errors
    ///
    /// [`Error::Foreign`] if an interface of another owner has the tap's name; otherwise the errors
    /// of the tools.
    pub async fn detach(&self, endpoint: &Endpoint) -> Result<()> {
        let Inner { links, ruleset, .. } = &*self.inner;
        let _guard = self.inner.changing.lock().await;
        // The tap first: its rules must outlive it.
        if let Some(tap) = links.find(endpoint.tap()).await? {
            let bridge = links.find(self.config().bridge()).await?;
            check_tap(&tap, bridge.as_ref())?;
            links.delete(&tap).await?;
        }
        let present = ruleset.read().await?.elements;
        let unwanted = ruleset.elements([endpoint]);
        ruleset.apply(&present.removing(&unwanted, endpoint)).await
    }

    /// Makes the network contain exactly these VMs.
    ///
    /// Removes our orphaned items and restores missing ones. Correct items are not touched, so
    /// sessions through existing forwards continue. A deleted bridge or deleted tables are restored
    /// too. Our items are the taps on our bridge whose name has our form, the taps that our tables
    /// name, and the content of our tables.
    ///
    /// # Errors
    ///
    /// Before anything is changed: [`Error::Taken`] if two endpoints share a port, an address or a
    /// tap, and [`Error::NotAGuestAddress`] for an address outside the subnet. Errors of the tools
    /// if they affect all VMs; those of a single VM are in [`Reconciled::failed`]. Can be repeated.
    pub async fn reconcile(&self, wanted: &[Endpoint]) -> Result<Reconciled> {
        let Inner {
            config, links, ruleset, ..
        } = &*self.inner;
        check_distinct(config, wanted)?;
        let _guard = self.inner.changing.lock().await;
        check_bridge(links, config).await?;
        let bridge = ensure_bridge(links, config).await?;
        let present = ruleset.read().await?.elements;
        let mut done = Reconciled::default();

        // The same order as in detach and attach: orphaned taps are removed before their rules,
        // wanted ones are added after them.
        let names: BTreeSet<&str> = wanted.iter().map(Endpoint::tap).collect();
        for tap in taps_of(links, &bridge, &present).await? {
            if !names.contains(tap.name.as_str()) {
                links.delete(&tap).await?;
                done.removed.push(tap.name);
            }
        }
        let change = present.change_to(&ruleset.elements(wanted));
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

    /// Returns whether the bridge and the tables exist, with one query to nft and one to the
    /// kernel.
    ///
    /// Another program's `flush ruleset`, or the restart of a firewall service, removes the tables,
    /// and with them the protection of the host from its guests.
    ///
    /// # Errors
    ///
    /// The errors of the tools.
    pub async fn is_whole(&self) -> Result<bool> {
        let Inner {
            config, links, ruleset, ..
        } = &*self.inner;
        Ok(ruleset.is_there().await? && links.find(config.bridge()).await?.is_some())
    }

    /// Restores the bridge and the tables, without the items of VMs: [`attach`](Network::attach)
    /// restores those.
    ///
    /// # Errors
    ///
    /// The errors of [`ensure`](Network::ensure).
    pub async fn repair(&self) -> Result<()> {
        let Inner {
            config, links, ruleset, ..
        } = &*self.inner;
        let _guard = self.inner.changing.lock().await;
        check_bridge(links, config).await?;
        ruleset.apply_whole(&Change::default()).await?;
        ensure_bridge(links, config).await.map(drop)
    }

    /// Removes the taps, the bridge and the tables. `net.ipv4.ip_forward` stays set, because other
    /// software may rely on it. Can be repeated. Other clones of this value must not be used
    /// afterwards.
    ///
    /// # Errors
    ///
    /// The errors of the tools.
    pub async fn teardown(&self) -> Result<()> {
        let Inner {
            config, links, ruleset, ..
        } = &*self.inner;
        let _guard = self.inner.changing.lock().await;
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
            .inner
            .links
            .find(name)
            .await?
            .ok_or_else(|| Error::Gone(name.to_owned()))?;
        check_ours(&bridge)?;
        Ok(bridge)
    }

    /// Creates the tap, or repairs an existing one. Returns whether it was created.
    async fn ensure_tap(&self, endpoint: &Endpoint, bridge: &Link) -> Result<bool> {
        let name = endpoint.tap();
        let links = &self.inner.links;
        if let Some(tap) = links.find(name).await? {
            check_tap(&tap, Some(bridge))?;
            self.ensure_port(&tap, bridge).await?;
            return Ok(false);
        }
        // Until the last step, the tap is deleted when this value is dropped: an early return or a
        // crash needs no undo.
        let new_tap = Tap::create(name, endpoint.owner())?;
        let tap = links.find(name).await?.ok_or_else(|| Error::Gone(name.to_owned()))?;
        self.ensure_port(&tap, bridge).await?;
        new_tap.persist()?;
        Ok(true)
    }

    /// Makes the tap a port of the bridge, and isolates it before it can carry frames.
    async fn ensure_port(&self, tap: &Link, bridge: &Link) -> Result<()> {
        let links = &self.inner.links;
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

/// Applies the rules, with per-tap checks if the kernel supports them.
async fn ensure_tables(config: &NetConfig, guard: Guard) -> Result<Ruleset> {
    let ruleset = Ruleset::new(config, guard);
    match ruleset.apply_whole(&Change::default()).await {
        Ok(()) => Ok(ruleset),
        Err(Error::Nft { output, .. }) if guard == Guard::PerTap && lacks_the_bridge_family(&output) => {
            warn!(
                "this kernel has no nftables bridge family (CONFIG_NF_TABLES_BRIDGE): a guest with root can impersonate another VM \
                 of this host; all other restrictions still apply: {output}"
            );
            let ruleset = Ruleset::new(config, Guard::PerGuest);
            ruleset.apply_whole(&Change::default()).await?;
            Ok(ruleset)
        }
        Err(error) => Err(error),
    }
}

/// nft's texts for EAFNOSUPPORT and EOPNOTSUPP. Any other missing feature also fails the second
/// attempt.
pub(crate) fn lacks_the_bridge_family(output: &str) -> bool {
    output.contains("not supported")
}

async fn ensure_bridge(links: &Links, config: &NetConfig) -> Result<Link> {
    let mac = mac_from_ip(config.gateway());
    let bridge = match links.find(config.bridge()).await? {
        Some(bridge) => bridge,
        None => {
            links.add_bridge(config.bridge(), mac).await?;
            info!(bridge = config.bridge(), subnet = %config.subnet(), "bridge created");
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

/// Makes the gateway the bridge's only address: the host would still respond on one of a previous
/// subnet.
async fn ensure_address(links: &Links, config: &NetConfig, bridge: &Link) -> Result<()> {
    let gateway = Ipv4Net::new_assert(config.gateway(), config.subnet().prefix_len());
    let mut found = false;
    for address in links.addresses().await? {
        if address.index != bridge.index {
            continue;
        }
        if address.net == gateway {
            found = true;
        } else {
            links.delete_address(&address).await?;
        }
    }
    if !found {
        links.add_address(bridge, gateway).await?;
    }
    Ok(())
}

pub(crate) async fn check_bridge(links: &Links, config: &NetConfig) -> Result<()> {
    links.find(config.bridge()).await?.as_ref().map_or(Ok(()), check_ours)
}

/// Our bridges are recognised by their MAC, which they have from the moment of creation.
fn check_ours(link: &Link) -> Result<()> {
    let why = if !link.is_bridge() {
        "is not a bridge"
    } else if !has_our_prefix(&link.mac) {
        "is a bridge that Scalebox did not create"
    } else {
        return Ok(());
    };
    let remedy = "Set BRIDGE to a free name.";
    Err(Error::Foreign {
        name: link.name.clone(),
        why: why.to_owned(),
        remedy,
    })
}

/// A tap is ours if it is a port of our bridge, or of no bridge (ours was deleted).
fn check_tap(link: &Link, bridge: Option<&Link>) -> Result<()> {
    let why = if !link.is_tap() {
        "is not a tap"
    } else if link.controller.is_some() && link.controller != bridge.map(|bridge| bridge.index) {
        "is a port of another bridge"
    } else {
        return Ok(());
    };
    let remedy = "Find its owner, and remove it (ip link delete).";
    Err(Error::Foreign {
        name: link.name.clone(),
        why: why.to_owned(),
        remedy,
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
        let check_unused = |what: String, owner: Option<&str>| match owner {
            Some(owner) => Err(Error::Taken {
                what,
                owner: owner.to_owned(),
            }),
            None => Ok(()),
        };
        check_unused(format!("tap {tap}"), taps.insert(tap, tap))?;
        check_unused(
            format!("address {}", endpoint.guest_ip()),
            ips.insert(endpoint.guest_ip(), tap),
        )?;
        check_unused(
            format!("port {}", endpoint.ssh_port()),
            ports.insert(endpoint.ssh_port(), tap),
        )?;
    }
    Ok(())
}

/// Returns our taps. These are ports of our bridge whose name has our form, and taps on no bridge
/// that our tables name.
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
    fn packets_without_a_vm_s_source_are_dropped_even_without_the_bridge_family() {
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
