//! Bridge and tables come back by themselves when somebody sweeps them away.
//!
//! `nft flush ruleset`, or a restart of a firewall's service, removes every table of the host. Ours keep guests from the host's services and
//! from one another, and carry the way in: they are looked for every few seconds and put back, each VM's part under that VM's own
//! operation, so that nothing is given to one that is being deleted.

use crate::error::ServiceError;
use crate::lifecycle::endpoint;
use crate::service::Service;
use std::convert::Infallible;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_secs(5);

/// Watches the network for as long as it is polled.
pub async fn run(service: Service) -> Infallible {
    loop {
        tokio::time::sleep(INTERVAL).await;
        match service.inner().network.is_whole().await {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!("bridge or nftables tables were removed by another program: putting them back");
                match put_back(&service).await {
                    Ok(vms) => tracing::info!(vms, "the network is whole again"),
                    Err(error) => tracing::error!(%error, "the network could not be put back; trying again"),
                }
            }
            Err(error) => tracing::warn!(%error, "the network cannot be looked at"),
        }
    }
}

/// The rules first, which close what stands open; then each VM's tap and forward. Returns how many VMs have theirs again.
async fn put_back(service: &Service) -> Result<usize, ServiceError> {
    let inner = service.inner();
    inner.network.repair().await?;
    let mut vms = 0;
    for record in inner.vms.all() {
        let operation = match inner.vms.begin_when_idle(&record.id, "being connected again").await {
            Ok(operation) => operation,
            Err(ServiceError::NotFound(_)) => continue,
            Err(error) => return Err(error),
        };
        if operation.machine.is_some() {
            inner.network.attach(&endpoint(&operation.record)?).await?;
            vms += 1;
        }
    }
    Ok(vms)
}
