//! Bridge and tables come back by themselves when somebody sweeps them away.
//!
//! `nft flush ruleset`, or a restart of a firewall's service, removes every table of the host. Ours
//! keep guests from the host's services and from one another, and carry the way in: they are looked
//! for every few seconds and put back, each VM's part under that VM's own operation, so that
//! nothing is given to one that is being deleted. As long as a VM's part is missing, it is tried
//! again.

use crate::error::ServiceError;
use crate::lifecycle::endpoint;
use crate::service::Service;
use std::convert::Infallible;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_secs(5);

/// Watches the network for as long as it is polled. `missing`: VMs that the start could not
/// connect.
pub async fn run(service: Service, mut missing: Vec<String>) -> Infallible {
    loop {
        tokio::time::sleep(INTERVAL).await;
        match service.inner().network.is_whole().await {
            Ok(true) if missing.is_empty() => {}
            Ok(true) => {
                missing = connect(&service, missing, false).await;
                if missing.is_empty() {
                    tracing::info!("every VM has its network again");
                }
            }
            Ok(false) => {
                tracing::warn!("bridge or nftables tables were removed by another program: putting them back");
                if let Err(error) = service.inner().network.repair().await {
                    tracing::error!(%error, "the network could not be put back; trying again");
                    continue;
                }
                let all = service.inner().vms.all().into_iter().map(|record| record.id).collect();
                missing = connect(&service, all, true).await;
                tracing::info!(missing = missing.len(), "the network is back");
            }
            Err(error) => tracing::warn!(%error, "the network cannot be looked at"),
        }
    }
}

/// Gives each of these VMs its tap and its forward, and returns those that are to be tried again:
/// where it fails, or something is under way. None holds up another. `tell`: whether a failure is
/// news.
async fn connect(service: &Service, vms: Vec<String>, tell: bool) -> Vec<String> {
    let inner = service.inner();
    let mut missing = Vec::new();
    for id in vms {
        let operation = match inner.vms.begin(&id, "being connected again") {
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
            if tell {
                tracing::error!(vm = id, %error, "it could not be connected again; trying again");
            }
            missing.push(id);
        }
    }
    missing
}
