//! The operations on the network of a host. Each one compares actual and desired state, and
//! changes the difference.

use crate::config::NetConfig;
use crate::endpoint::{Endpoint, has_our_prefix, is_tap_name, mac_from_ip};
use crate::error::{Error, Result};
use crate::firewall::{self, FirewallDrop};
use crate::links::{Link, Links};
use crate::reconciled::Reconciled;
use crate::ruleset::{Change, Elements, Guard, Ruleset};
use crate::sysctl::Sysctl;
use crate::tap::Tap;
use ipnet::Ipv4Net;
use std::collections::{BTreeMap, BTreeSet};
use tokio::sync::Mutex;
use tracing::{info, warn};

/// The network of a host, behind [`Network`](crate::Network), which documents the operations.
pub(crate) struct HostNetwork {
    config: NetConfig,
    links: Links,
    ruleset: Ruleset,
    /// The lock is held from reading the state to changing it. It is an async mutex, because
    /// netlink and nft are awaited meanwhile.
    changing: Mutex<()>,
}

impl HostNetwork {
    pub(crate) async fn ensure(config: NetConfig) -> Result<HostNetwork> {
        HostNetwork::ensure_guarded(config, Guard::PerTap).await
    }

    async fn ensure_guarded(config: NetConfig, guard: Guard) -> Result<HostNetwork> {
        let links = Links::open()?;
        check_bridge(&links, &config).await?;
        check_overlap(&links, &config).await?;
        // The rules come first and forwarding last, so that a guest never reaches more than the
        // rules allow.
        let ruleset = ensure_tables(&config, guard).await?;
        ensure_bridge(&links, &config).await?;
        Sysctl::forwarding().ensure()?;

        let network = HostNetwork {
            config,
            links,
            ruleset,
            changing: Mutex::new(()),
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

    pub(crate) fn config(&self) -> &NetConfig {
        &self.config
    }

    pub(crate) fn guards_taps(&self) -> bool {
        self.ruleset.guard() == Guard::PerTap
    }

    pub(crate) async fn firewall_drops(&self) -> Result<Vec<FirewallDrop>> {
        let HostNetwork {
            config, links, ruleset, ..
        } = self;
        firewall::drops(config, &ruleset.table(), links).await
    }

    pub(crate) async fn attach(&self, endpoint: &Endpoint) -> Result<()> {
        let HostNetwork { config, ruleset, .. } = self;
        config.check_guest(endpoint.guest_ip())?;
        let _guard = self.changing.lock().await;
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
                    "cannot undo a failed attach: {undo}; the next reconcile undoes it"
                );
            }
            return Err(error);
        }
        Ok(())
    }

    pub(crate) async fn detach(&self, endpoint: &Endpoint) -> Result<()> {
        let HostNetwork { links, ruleset, .. } = self;
        let _guard = self.changing.lock().await;
        // The tap is removed first, because its rules must outlive it.
        if let Some(tap) = links.find(endpoint.tap()).await? {
            let bridge = links.find(self.config().bridge()).await?;
            check_tap(&tap, bridge.as_ref())?;
            links.delete(&tap).await?;
        }
        let present = ruleset.read().await?.elements;
        let unwanted = ruleset.elements([endpoint]);
        ruleset.apply(&present.removing(&unwanted, endpoint)).await
    }

    pub(crate) async fn reconcile(&self, wanted: &[Endpoint]) -> Result<Reconciled> {
        let HostNetwork {
            config, links, ruleset, ..
        } = self;
        config.check_endpoints(wanted)?;
        let _guard = self.changing.lock().await;
        check_bridge(links, config).await?;
        let bridge = ensure_bridge(links, config).await?;
        let present = ruleset.read().await?.elements;
        let mut done = Reconciled::default();

        // The order is the same as in detach and attach: orphaned taps are removed before their
        // rules, wanted ones are added after them.
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

    pub(crate) async fn is_whole(&self) -> Result<bool> {
        let HostNetwork {
            config, links, ruleset, ..
        } = self;
        Ok(ruleset.is_there().await? && links.find(config.bridge()).await?.is_some())
    }

    pub(crate) async fn repair(&self) -> Result<()> {
        let HostNetwork {
            config, links, ruleset, ..
        } = self;
        let _guard = self.changing.lock().await;
        check_bridge(links, config).await?;
        ruleset.apply_whole(&Change::default()).await?;
        ensure_bridge(links, config).await.map(drop)
    }

    pub(crate) async fn teardown(&self) -> Result<()> {
        let HostNetwork {
            config, links, ruleset, ..
        } = self;
        let _guard = self.changing.lock().await;
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
        let links = &self.links;
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
        let links = &self.links;
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

/// Returns whether nft failed with EAFNOSUPPORT or EOPNOTSUPP, which it reports as these texts. Any
/// other missing feature also fails the second attempt.
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

/// Checks that a bridge is ours, by its MAC, which our bridges have from the moment of creation.
fn check_ours(link: &Link) -> Result<()> {
    let why = if !link.is_bridge() {
        "is not a bridge"
    } else if !has_our_prefix(&link.mac) {
        "is a bridge that Scalebox did not create"
    } else {
        return Ok(());
    };
    Err(Error::ForeignBridge {
        name: link.name.clone(),
        why,
    })
}

/// Checks that a tap is ours: it is a port of our bridge, or of no bridge (ours was deleted).
fn check_tap(link: &Link, bridge: Option<&Link>) -> Result<()> {
    let why = if !link.is_tap() {
        "is not a tap"
    } else if link.controller.is_some() && link.controller != bridge.map(|bridge| bridge.index) {
        "is a port of another bridge"
    } else {
        return Ok(());
    };
    Err(Error::ForeignTap {
        name: link.name.clone(),
        why,
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
            let network = HostNetwork::ensure_guarded(config(), Guard::PerGuest)
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
