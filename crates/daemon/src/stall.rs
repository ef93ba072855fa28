//! Machines that stand still because the host could not write for them, and go on when there is room.
//!
//! The hypervisor stops a guest whose disk request the host refuses, rather than hand the error on: the guest sees neither an I/O error nor a
//! read-only root, only time that passed. Such a VM is `paused`, and resumed when the pool can take data again; a request that is
//! refused once more stops it once more.

use crate::service::Service;
use scalebox_client::VmStatus;
use scalebox_storage::Bytes;
use scalebox_vmm::{Machine, MachineEvent, MachineState};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;

/// The reason that `paused` has while the pool is full.
const STORAGE_FULL: &str = "storage_full";
/// A stalled guest goes on when so much can be written.
const ENOUGH: Bytes = Bytes::from_mib(256);
/// How often the pool is looked at meanwhile.
const INTERVAL: Duration = Duration::from_secs(1);

/// Rides out every stall of a machine, for as long as it is polled.
pub async fn ride_out(service: &Service, id: &str, machine: &Arc<dyn Machine>) -> Infallible {
    let mut events = machine.events();
    // One that an earlier daemon left may be stalled already.
    if matches!(machine.state().await, Ok(MachineState::Stalled)) {
        until_it_goes_on(service, id, machine, STORAGE_FULL).await;
    }
    loop {
        match events.recv().await {
            Ok(MachineEvent::IoError { nospace, reason }) => {
                let reason = if nospace || is_full(service) {
                    STORAGE_FULL.to_owned()
                } else {
                    format!("disk_error: {reason}")
                };
                until_it_goes_on(service, id, machine, &reason).await;
            }
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => {
                if matches!(machine.state().await, Ok(MachineState::Stalled)) {
                    until_it_goes_on(service, id, machine, STORAGE_FULL).await;
                }
            }
            // It ends with the machine, whose end somebody else waits for.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

async fn until_it_goes_on(service: &Service, id: &str, machine: &Arc<dyn Machine>, reason: &str) {
    service.inner().vms.note(id, machine, VmStatus::Paused, Some(reason));
    tracing::warn!(vm = id, reason, "paused: the host could not write for it");
    loop {
        tokio::time::sleep(INTERVAL).await;
        if is_full(service) {
            continue;
        }
        match machine.resume().await {
            Ok(()) => break,
            Err(error) => tracing::warn!(vm = id, %error, "could not be resumed; trying again"),
        }
    }
    service.inner().vms.note(id, machine, VmStatus::Running, None);
    tracing::info!(vm = id, "resumed: there is room again");
}

fn is_full(service: &Service) -> bool {
    match service.inner().pool.space() {
        Ok(space) => space.free < ENOUGH,
        Err(error) => {
            tracing::warn!(%error, "the pool's space cannot be read");
            true
        }
    }
}
