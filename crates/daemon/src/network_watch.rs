//! Bridge and tables come back by themselves when somebody sweeps them away.
//!
//! `nft flush ruleset`, or a restart of a firewall's service, removes every table of the host. Ours keep guests from the host's services and
//! from one another, and carry the way in: they are looked for every few seconds and put back, each VM's part under that VM's own
//! operation, so that nothing is given to one that is being deleted. As long as a VM's part is missing, it is tried again.

use crate::error::ServiceError;
use crate::lifecycle::endpoint;
use crate::service::Service;
use std::convert::Infallible;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_secs(5);

/// Watches the network for as long as it is polled.
pub async fn run(service: Service) -> Infallible {
    // Whether some VM was not connected again by the last attempt.
    let mut torn = false;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let whole = match service.inner().network.is_whole().await {
            Ok(whole) => whole,
            Err(error) => {
                tracing::warn!(%error, "the network cannot be looked at");
                continue;
            }
        };
        if !whole {
            tracing::warn!("bridge or nftables tables were removed by another program: putting them back");
        } else if !torn {
            continue;
        }
        torn = match put_back(&service, torn).await {
            Ok(Connected { vms, missing: 0 }) => {
                tracing::info!(vms, "the network is whole again");
                false
            }
            Ok(Connected { vms, missing }) => {
                if !torn {
                    tracing::warn!(vms, missing, "the network is back; some VMs are not connected yet");
                }
                true
            }
            Err(error) => {
                tracing::error!(%error, "the network could not be put back; trying again");
                true
            }
        };
    }
}

/// How many VMs have their network again, and how many do not.
struct Connected {
    vms: usize,
    missing: usize,
}

/// The rules first, which close what stands open; then each VM's tap and forward. One that fails, or has something under way, is left for the
/// next attempt and holds up no other. `again`: what failed before is not told once more.
async fn put_back(service: &Service, again: bool) -> Result<Connected, ServiceError> {
    let inner = service.inner();
    inner.network.repair().await?;
    let mut connected = Connected { vms: 0, missing: 0 };
    for record in inner.vms.all() {
        let operation = match inner.vms.begin(&record.id, "being connected again") {
            Ok(operation) => operation,
            Err(ServiceError::NotFound(_)) => continue,
            Err(_) => {
                connected.missing += 1;
                continue;
            }
        };
        if operation.machine.is_none() {
            continue;
        }
        let attached = async { Ok::<_, ServiceError>(inner.network.attach(&endpoint(&operation.record)?).await?) };
        match attached.await {
            Ok(()) => connected.vms += 1,
            Err(error) => {
                connected.missing += 1;
                if !again {
                    tracing::error!(vm = record.id, %error, "it could not be connected again");
                }
            }
        }
    }
    Ok(connected)
}
