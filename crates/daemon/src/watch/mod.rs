//! Background loops, each of which watches one thing for as long as the daemon runs.

pub mod extend;
pub mod network;
pub mod reclaim;
pub mod space;
pub mod trim;
pub mod usage;

use crate::host::Host;
use crate::pool::growth;
use crate::vm::cleanup;
use scalebox_units::VmId;

/// Starts all background loops. `unconnected` are the VMs that recovery could not connect.
pub fn start(host: &Host, unconnected: Vec<VmId>) {
    tokio::spawn(space::run(host.clone()));
    tokio::spawn(reclaim::run(host.clone()));
    tokio::spawn(cleanup::run(host.clone()));
    tokio::spawn(usage::run(host.clone()));
    tokio::spawn(network::run(host.clone(), unconnected));
    tokio::spawn(trim::run(host.clone()));
    tokio::spawn(extend::run(host.clone()));
    tokio::spawn(growth::reconcile(host.clone()));
}
