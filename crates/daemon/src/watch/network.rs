//! Restores the bridge and the nftables tables if another program removes them.
//!
//! `nft flush ruleset`, or a restart of a firewall service, removes all tables of the host. Ours
//! isolate guests from the host's services and from one another, and forward SSH to them. Every few
//! seconds this task checks that they exist. It restores each VM's part during an operation on that
//! VM, so that no VM is reconnected while it is being deleted, and retries until no part is
//! missing.

use crate::host::Host;
use crate::host::advice::advised;
use crate::host::error::ServiceError;
use crate::vm::spec::endpoint;
use scalebox_units::VmId;
use std::convert::Infallible;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_secs(5);

/// Watches the network for as long as it is polled. `missing` lists the VMs that could not be
/// connected at start.
pub(crate) async fn run(host: Host, mut missing: Vec<VmId>) -> Infallible {
    loop {
        tokio::time::sleep(INTERVAL).await;
        match host.network.is_whole().await {
            Ok(true) if missing.is_empty() => {}
            Ok(true) => {
                missing = connect(&host, missing, false).await;
                if missing.is_empty() {
                    tracing::info!("all VMs are connected to the network again");
                }
            }
            Ok(false) => {
                tracing::warn!("another program has removed the bridge or nftables tables: restoring them");
                if let Err(error) = host.network.repair().await {
                    tracing::error!(error = %advised(&error), "cannot restore the network; retrying");
                    continue;
                }
                let all = host.vms.all().into_iter().map(|record| record.id).collect();
                missing = connect(&host, all, true).await;
                tracing::info!(missing = missing.len(), "network restored");
            }
            Err(error) => tracing::warn!(error = %advised(&error), "cannot check the network"),
        }
    }
}

/// Attaches tap and forward of each VM. Returns the VMs to retry: those that fail, and those with
/// an operation in progress. `log_failures` is false on retries.
async fn connect(host: &Host, vms: Vec<VmId>, log_failures: bool) -> Vec<VmId> {
    let inner = host;
    let mut missing = Vec::new();
    for id in vms {
        let operation = match inner.vms.begin(id.as_str(), "being connected again") {
            Ok(operation) => operation,
            Err(ServiceError::NotFound(_)) => continue,
            Err(_) => {
                missing.push(id);
                continue;
            }
        };
        if operation.machine.is_none() {
            continue;
        }
        let attached = async { Ok::<_, ServiceError>(inner.network.attach(&endpoint(&operation.record)?).await?) };
        if let Err(error) = attached.await {
            if log_failures {
                tracing::error!(vm = %id, %error, "cannot reconnect the VM to the network; retrying");
            }
            missing.push(id);
        }
    }
    missing
}
