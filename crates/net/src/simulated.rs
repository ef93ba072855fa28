//! A network in memory, for tests without root. Its operations are those of the network of a host.
//!
//! It keeps three things apart, as a host does: the bridge, the taps, and the rules of each VM. So
//! a test can remove a part, as another program could, and check that it is restored.

use crate::config::NetConfig;
use crate::endpoint::Endpoint;
use crate::error::{Error, Result};
use crate::firewall::{Dropped, FirewallDrop};
use crate::reconciled::Reconciled;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The handle with which a test controls a simulated network.
pub struct Simulation {
    config: NetConfig,
    state: Mutex<State>,
}

/// A method of [`Network`](crate::Network).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the methods")]
pub enum NetworkCall {
    FirewallDrops,
    Attach,
    Detach,
    Reconcile,
    IsWhole,
    Repair,
    Teardown,
}

struct State {
    has_bridge: bool,
    has_tables: bool,
    taps: BTreeMap<String, Endpoint>,
    rules: BTreeMap<String, Endpoint>,
    failing: Vec<NetworkCall>,
    dropped: Option<Dropped>,
}

impl Simulation {
    pub(crate) fn new(config: NetConfig) -> Simulation {
        let state = State {
            has_bridge: true,
            has_tables: true,
            taps: BTreeMap::new(),
            rules: BTreeMap::new(),
            failing: Vec::new(),
            dropped: None,
        };
        Simulation {
            config,
            state: Mutex::new(state),
        }
    }

    /// Returns the VMs that have a tap and rules, with their rate limits, ordered by tap.
    pub fn attached(&self) -> Vec<Endpoint> {
        let state = self.lock();
        let has_tap = |endpoint: &&Endpoint| state.taps.contains_key(endpoint.tap());
        state.rules.values().filter(has_tap).cloned().collect()
    }

    /// Returns the names of all taps.
    pub fn taps(&self) -> Vec<String> {
        self.lock().taps.keys().cloned().collect()
    }

    /// Makes the next call of a method fail and change nothing.
    pub fn fail_next(&self, call: NetworkCall) {
        self.lock().failing.push(call);
    }

    /// Removes all rules, as `nft flush ruleset` does.
    pub fn flush_rules(&self) {
        let mut state = self.lock();
        state.has_tables = false;
        state.rules.clear();
    }

    /// Removes the bridge, as `ip link delete` does.
    pub fn delete_bridge(&self) {
        self.lock().has_bridge = false;
    }

    /// Removes a tap, as `ip link delete` does.
    pub fn delete_tap(&self, name: &str) {
        self.lock().taps.remove(name);
    }

    /// Sets which packets of guests the host's firewall drops.
    pub fn set_dropped(&self, dropped: Option<Dropped>) {
        self.lock().dropped = dropped;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the state for one call, unless the call is to fail.
    fn begin(&self, call: NetworkCall) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        match state.failing.iter().position(|failing| *failing == call) {
            Some(index) => {
                state.failing.remove(index);
                Err(Error::Netlink {
                    action: format!("{call:?}"),
                    source: io::Error::other("simulated failure"),
                })
            }
            None => Ok(state),
        }
    }
}

/// The methods of [`Network`](crate::Network), which documents them.
impl Simulation {
    pub(crate) fn config(&self) -> &NetConfig {
        &self.config
    }

    pub(crate) fn guards_taps(&self) -> bool {
        true
    }

    pub(crate) async fn firewall_drops(&self) -> Result<Vec<FirewallDrop>> {
        let dropped = self.begin(NetworkCall::FirewallDrops)?.dropped;
        let drops = dropped.map(|dropped| FirewallDrop::of_docker(self.config.bridge(), dropped));
        Ok(drops.into_iter().collect())
    }

    pub(crate) async fn attach(&self, endpoint: &Endpoint) -> Result<()> {
        let mut state = self.begin(NetworkCall::Attach)?;
        let others = state.rules.values().filter(|other| other.tap() != endpoint.tap());
        self.config.check_endpoints(others.chain([endpoint]))?;
        if !state.has_bridge {
            return Err(Error::Gone(self.config.bridge().to_owned()));
        }
        state.has_tables = true;
        state.insert(endpoint);
        Ok(())
    }

    pub(crate) async fn detach(&self, endpoint: &Endpoint) -> Result<()> {
        let mut state = self.begin(NetworkCall::Detach)?;
        state.taps.remove(endpoint.tap());
        state.rules.remove(endpoint.tap());
        Ok(())
    }

    pub(crate) async fn reconcile(&self, wanted: &[Endpoint]) -> Result<Reconciled> {
        let mut state = self.begin(NetworkCall::Reconcile)?;
        self.config.check_endpoints(wanted)?;
        let mut done = Reconciled::default();
        let is_wanted = |tap: &String| wanted.iter().any(|endpoint| endpoint.tap() == tap);
        let orphaned = state.taps.keys().filter(|tap| !is_wanted(tap));
        done.removed.extend(orphaned.cloned());
        state.taps.retain(|tap, _| is_wanted(tap));
        let orphaned = state.rules.keys().filter(|tap| !is_wanted(tap));
        done.removed.extend(orphaned.map(|tap| format!("the rules of {tap}")));
        state.rules.retain(|tap, _| is_wanted(tap));
        for endpoint in wanted {
            if state.rules.get(endpoint.tap()) != Some(endpoint) {
                done.added.push(format!("the rules of {}", endpoint.tap()));
            }
            if !state.taps.contains_key(endpoint.tap()) {
                done.added.push(endpoint.tap().to_owned());
            }
            state.insert(endpoint);
        }
        (state.has_bridge, state.has_tables) = (true, true);
        Ok(done)
    }

    pub(crate) async fn is_whole(&self) -> Result<bool> {
        let state = self.begin(NetworkCall::IsWhole)?;
        Ok(state.has_bridge && state.has_tables)
    }

    pub(crate) async fn repair(&self) -> Result<()> {
        let mut state = self.begin(NetworkCall::Repair)?;
        (state.has_bridge, state.has_tables) = (true, true);
        Ok(())
    }

    pub(crate) async fn teardown(&self) -> Result<()> {
        let mut state = self.begin(NetworkCall::Teardown)?;
        (state.has_bridge, state.has_tables) = (false, false);
        state.taps.clear();
        state.rules.clear();
        Ok(())
    }
}

impl State {
    fn insert(&mut self, endpoint: &Endpoint) {
        self.taps.insert(endpoint.tap().to_owned(), endpoint.clone());
        self.rules.insert(endpoint.tap().to_owned(), endpoint.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Mbps, Network};
    use std::net::Ipv4Addr;

    fn network() -> Network {
        let subnet = "10.77.0.0/24".parse().expect("a subnet");
        Network::simulated(NetConfig::new("sbtest0", subnet, 22001..=22100).expect("a configuration"))
    }

    fn endpoint(n: u8) -> Endpoint {
        let id = format!("vm-00000000000{n:x}").parse().expect("an id");
        Endpoint::new(&id, Ipv4Addr::new(10, 77, 0, 10 + n), 22001 + u16::from(n))
    }

    fn simulation(network: &Network) -> &Simulation {
        network.simulation().expect("simulated")
    }

    #[tokio::test]
    async fn endpoints_are_attached_changed_and_detached() {
        let network = network();
        network.attach(&endpoint(1)).await.expect("attach");
        network.attach(&endpoint(2)).await.expect("attach");
        let limited = endpoint(1).with_rate(Some(Mbps::new(10)));
        network.attach(&limited).await.expect("another rate");
        assert_eq!(simulation(&network).attached(), [limited, endpoint(2)]);
        network.detach(&endpoint(1)).await.expect("detach");
        network.detach(&endpoint(1)).await.expect("twice");
        assert_eq!(simulation(&network.clone()).attached(), [endpoint(2)]);
    }

    #[tokio::test]
    async fn invalid_and_taken_addresses_and_ports_are_rejected() {
        let network = network();
        network.attach(&endpoint(1)).await.expect("attach");
        let id = "vm-0000000000ff".parse().expect("an id");
        let same_port = Endpoint::new(&id, Ipv4Addr::new(10, 77, 0, 99), endpoint(1).ssh_port());
        assert!(matches!(network.attach(&same_port).await, Err(Error::Taken { .. })));
        let gateway = Endpoint::new(&id, Ipv4Addr::new(10, 77, 0, 1), 22050);
        let error = network.attach(&gateway).await.expect_err("the gateway");
        assert!(matches!(error, Error::NotAGuestAddress { .. }), "{error}");
        assert_eq!(simulation(&network).attached(), [endpoint(1)]);
    }

    #[tokio::test]
    async fn what_others_remove_is_restored() {
        let network = network();
        network.attach(&endpoint(1)).await.expect("attach");
        simulation(&network).flush_rules();
        assert!(!network.is_whole().await.expect("a state"));
        network.repair().await.expect("repair");
        assert!(network.is_whole().await.expect("a state"));
        assert!(simulation(&network).attached().is_empty(), "until it is attached again");
        network.attach(&endpoint(1)).await.expect("attach");

        simulation(&network).delete_bridge();
        assert!(matches!(network.attach(&endpoint(2)).await, Err(Error::Gone(_))));
        network.repair().await.expect("repair");
        simulation(&network).delete_tap(endpoint(1).tap());
        let done = network.reconcile(&[endpoint(1), endpoint(3)]).await.expect("reconcile");
        assert_eq!(done.added.len(), 3, "{done:?}");
        assert_eq!(simulation(&network).attached(), [endpoint(1), endpoint(3)]);
        let done = network.reconcile(&[endpoint(1)]).await.expect("reconcile");
        assert_eq!(done.removed.len(), 2, "{done:?}");
        assert_eq!(
            network.reconcile(&[endpoint(1)]).await.expect("reconcile"),
            Reconciled::default()
        );
        network.teardown().await.expect("teardown");
        assert!(simulation(&network).taps().is_empty());
    }

    #[tokio::test]
    async fn the_next_call_can_fail_and_then_changes_nothing() {
        let network = network();
        simulation(&network).fail_next(NetworkCall::Attach);
        let error = network.attach(&endpoint(1)).await.expect_err("as decided");
        assert!(error.to_string().contains("simulated failure"), "{error}");
        assert!(simulation(&network).attached().is_empty());
        network.attach(&endpoint(1)).await.expect("the next one");
    }

    #[tokio::test]
    async fn drops_of_the_host_s_firewall_are_reported() {
        let network = network();
        assert!(network.firewall_drops().await.expect("drops").is_empty());
        simulation(&network).set_dropped(Some(Dropped::Sent));
        let drops = network.firewall_drops().await.expect("drops");
        assert!(drops[0].to_string().contains("outgoing"), "{}", drops[0]);
    }
}
