//! Background loops, each of which watches one thing for as long as the daemon runs.

pub(crate) mod extend;
pub(crate) mod network;
pub(crate) mod reclaim;
pub(crate) mod space;
pub(crate) mod trim;
pub(crate) mod usage;

use crate::host::Host;
use crate::pool::growth;
use crate::vm::cleanup;
use scalebox_units::VmId;

/// Starts all background loops. `unconnected` are the VMs that recovery could not connect.
pub(crate) fn start(host: &Host, unconnected: Vec<VmId>) {
    tokio::spawn(space::run(host.clone()));
    tokio::spawn(reclaim::run(host.clone()));
    tokio::spawn(cleanup::run(host.clone()));
    tokio::spawn(usage::run(host.clone()));
    tokio::spawn(network::run(host.clone(), unconnected));
    tokio::spawn(trim::run(host.clone()));
    tokio::spawn(extend::run(host.clone()));
    tokio::spawn(growth::reconcile(host.clone()));
}
