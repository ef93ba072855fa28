//! The network of a host, and its simulation for tests.

use crate::config::NetConfig;
use crate::endpoint::Endpoint;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::firewall::FirewallDrop;
use crate::host_network::HostNetwork;
use crate::reconciled::Reconciled;
#[cfg(any(test, feature = "simulated"))]
use crate::simulated::Simulation;
use std::sync::Arc;

/// The network of a host: its bridge is up and its rules are in force. Clones refer to the same
/// network.
///
/// Calls may run concurrently; they change the host one at a time. A cancelled call may leave
/// partial changes, which [`reconcile`](Network::reconcile) repairs.
#[derive(Clone)]
pub struct Network {
    backend: Backend,
}

#[derive(Clone)]
enum Backend {
    Host(Arc<HostNetwork>),
    #[cfg(any(test, feature = "simulated"))]
    Simulated(Arc<Simulation>),
}

/// Calls a method of the backend.
macro_rules! on_backend {
    ($network:expr, $backend:ident => $call:expr) => {
        match &$network.backend {
            Backend::Host($backend) => $call,
            #[cfg(any(test, feature = "simulated"))]
            Backend::Simulated($backend) => $call,
        }
    };
}

impl Network {
    /// Creates or repairs the bridge, its address, the kernel settings and the tables. Existing
    /// taps and forwards are not touched. The netlink socket belongs to the network namespace of
    /// the calling thread.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignBridge`] if another program owns an interface with the bridge's name,
    /// [`Error::Overlap`] if the subnet is in use on this host (in both cases nothing was changed);
    /// otherwise the errors of the tools. Can be repeated once the cause is gone.
    pub async fn ensure(config: NetConfig) -> Result<Network> {
        let host = HostNetwork::ensure(config).await?;
        Ok(Network {
            backend: Backend::Host(Arc::new(host)),
        })
    }

    /// Returns a network in memory, which needs no privileges and changes nothing on the host. For
    /// tests.
    #[cfg(any(test, feature = "simulated"))]
    pub fn simulated(config: NetConfig) -> Network {
        Network {
            backend: Backend::Simulated(Arc::new(Simulation::new(config))),
        }
    }

    /// Returns the handle with which a test controls a [simulated](Network::simulated) network;
    /// `None` for the network of a host.
    #[cfg(any(test, feature = "simulated"))]
    pub fn simulation(&self) -> Option<&Simulation> {
        match &self.backend {
            Backend::Host(_) => None,
            Backend::Simulated(simulation) => Some(simulation),
        }
    }

    /// Returns the settings of the network.
    pub fn config(&self) -> &NetConfig {
        on_backend!(self, network => network.config())
    }

    /// Returns whether frames are checked per tap.
    ///
    /// This needs a kernel with `CONFIG_NF_TABLES_BRIDGE`; [`ensure`](Network::ensure) logs a
    /// warning otherwise. Without the check, a guest with root can take over the address *and* MAC
    /// of another VM, and can respond to the host's ARP requests in its place. Packets whose source
    /// belongs to no VM are dropped in any case.
    pub fn guards_taps(&self) -> bool {
        on_backend!(self, network => network.guards_taps())
    }

    /// Returns the host's firewall chains that drop guests' packets. The `Display` of each names
    /// the remedy.
    ///
    /// # Errors
    ///
    /// The errors of the program `nft`.
    pub async fn firewall_drops(&self) -> Result<Vec<FirewallDrop>> {
        on_backend!(self, network => network.firewall_drops().await)
    }

    /// Adds a VM's tap, address, forward and rate limit. Existing parts are kept, except for
    /// another rate limit, which is replaced. Call it again to change a limit.
    ///
    /// # Errors
    ///
    /// [`Error::NotAGuestAddress`], [`Error::Taken`], [`Error::ForeignTap`] if an interface of
    /// another owner has the tap's name; otherwise the errors of the tools. The changes of a failed
    /// call are undone.
    pub async fn attach(&self, endpoint: &Endpoint) -> Result<()> {
        on_backend!(self, network => network.attach(endpoint).await)
    }

    /// Removes a VM's tap, address and forward. Succeeds if some of them do not exist.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignTap`] if an interface of another owner has the tap's name; otherwise the
    /// errors of the tools.
    pub async fn detach(&self, endpoint: &Endpoint) -> Result<()> {
        on_backend!(self, network => network.detach(endpoint).await)
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
        on_backend!(self, network => network.reconcile(wanted).await)
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
        on_backend!(self, network => network.is_whole().await)
    }

    /// Restores the bridge and the tables, without the items of VMs: [`attach`](Network::attach)
    /// restores those.
    ///
    /// # Errors
    ///
    /// The errors of [`ensure`](Network::ensure).
    pub async fn repair(&self) -> Result<()> {
        on_backend!(self, network => network.repair().await)
    }

    /// Removes the taps, the bridge and the tables. `net.ipv4.ip_forward` stays set, because other
    /// software may rely on it. Can be repeated. Other clones of this value must not be used
    /// afterwards.
    ///
    /// # Errors
    ///
    /// The errors of the tools.
    pub async fn teardown(&self) -> Result<()> {
        on_backend!(self, network => network.teardown().await)
    }
}
