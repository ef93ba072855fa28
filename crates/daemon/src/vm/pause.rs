//! Pausing VMs because storage is full, and resuming them.
//!
//! A pause is a fact about the machine and is not recorded: a machine that a previous daemon paused
//! is found paused when it is adopted.

use crate::host::Host;
use crate::host::advice::advised;
use crate::vm::transition::{Transition, transition};
use scalebox_units::VmId;
use scalebox_vmm::{Machine, MachineEvent, MachineState};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::sync::broadcast::error::RecvError;

/// The reason of a VM that is paused because the pool or its host disk is full.
pub(crate) const STORAGE_FULL: &str = "storage_full";

/// Marks a VM as paused, if `machine` is still the VM's machine.
pub(crate) async fn mark_paused(host: &Host, id: &VmId, machine: &Arc<dyn Machine>, reason: &str) {
    tracing::warn!(vm = %id, reason, "VM paused");
    change(
        host,
        id,
        Transition::Paused {
            machine: Arc::clone(machine),
            reason: reason.to_owned(),
        },
    )
    .await;
    host.paused.lock().insert(id.to_owned(), Arc::clone(machine));
}

/// Makes a transition that is not recorded, and therefore does not fail.
async fn change(host: &Host, id: &VmId, to: Transition) {
    // A VM that was deleted in the meantime has no status.
    let Ok(record) = host.vms.find(id.as_str()) else { return };
    if let Err(error) = transition(host, &record, to).await {
        tracing::error!(vm = %id, %error, "cannot change the VM's status");
    }
}

/// Resumes the VMs that were paused because storage was full. Failures are retried by the next
/// call.
pub(crate) async fn resume_paused(host: &Host) {
    let paused: Vec<_> = host.paused.lock().drain().collect();
    for (id, machine) in paused {
        match machine.resume().await {
            Ok(()) => {
                change(host, &id, Transition::Resumed(machine)).await;
                tracing::info!(vm = %id, "VM resumed: the pool has free space again");
            }
            // The VM was stopped or deleted in the meantime.
            Err(scalebox_vmm::Error::Ended { .. }) => {}
            Err(error) => {
                tracing::warn!(vm = %id, error = %advised(&error), "cannot resume the VM; retrying");
                host.paused.lock().insert(id, machine);
            }
        }
    }
}

/// Follows the events of one machine for as long as it is polled. A machine that its hypervisor
/// pauses stays paused until there is space.
pub(crate) async fn follow(host: &Host, id: &VmId, machine: &Arc<dyn Machine>) -> Infallible {
    let mut events = machine.events();
    // A VM paused by a previous daemon is still paused.
    mark_if_paused(host, id, machine).await;
    loop {
        match events.recv().await {
            Ok(MachineEvent::IoError { nospace: true, .. }) => mark_paused(host, id, machine, STORAGE_FULL).await,
            // A layer below the pool may report a full disk as another error. If there is enough
            // space, the VM is resumed at once.
            Ok(MachineEvent::IoError { nospace: false, reason }) => {
                mark_paused(host, id, machine, &format!("disk_error: {reason}")).await;
            }
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => mark_if_paused(host, id, machine).await,
            // The channel closes when the machine ends; another task waits for that.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

async fn mark_if_paused(host: &Host, id: &VmId, machine: &Arc<dyn Machine>) {
    if matches!(machine.state().await, Ok(MachineState::Stalled | MachineState::Paused)) {
        mark_paused(host, id, machine, STORAGE_FULL).await;
    }
}
