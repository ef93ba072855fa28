//! The host's reboots: which boot it is, and the VMs that are started again after one.

use crate::host::error::ServiceError;
use crate::host::{Host, blocking, system};
use crate::state::{Fact, State};
use crate::vm::lifecycle;
use crate::vm::transition::{Transition, transition};
use scalebox_units::VmId;
use std::sync::Arc;

/// Status reason of a VM that was running before the host's reboot and is not started yet.
pub(super) const WAITING: &str = "waiting to be started after the host's reboot";

/// Starts the VMs that were running when the host went down, one after the other.
///
/// Records the boot id when all are started. Until then the state has them as running: after a
/// crash in between, the next start continues.
pub(crate) async fn start_after_reboot(host: Host, vms: Vec<VmId>) {
    for id in vms {
        let started = host.detached(|host| async move { start_one_after_reboot(&host, &id).await });
        if let Err(error) = started.await {
            tracing::error!(%error, "cannot record that a VM failed to start");
        }
    }
    let state = Arc::clone(&host.state);
    // Restarts of the daemon within the same boot write nothing.
    let recorded = blocking(move || match state.fact(Fact::BootId)? {
        Some(recorded) if recorded == boot_id()? => Ok(()),
        _ => record_boot_id(&state),
    })
    .await;
    if let Err(error) = recorded {
        tracing::error!(%error, "cannot record the host's boot id");
    }
}

/// Starts one VM, unless it was started or deleted, or its autostart turned off, in the meantime.
async fn start_one_after_reboot(host: &Host, id: &VmId) -> Result<(), ServiceError> {
    let Ok(operation) = host.vms.begin_when_idle(id.as_str(), "being started").await else {
        return Ok(());
    };
    let record = &operation.record;
    if operation.machine.is_some() || record.status_reason.as_deref() != Some(WAITING) {
        return Ok(());
    }
    if !record.autostart {
        return transition(host, record, Transition::StartCancelled).await;
    }
    let Err(error) = lifecycle::boot(host, record).await else {
        return Ok(());
    };
    tracing::error!(vm = %id, %error, "cannot start the VM after the host's reboot");
    let reason = format!("the VM could not be started after the host's reboot: {error}");
    let failed = Transition::Failed { reason, machine: None };
    transition(host, record, failed).await
}

fn record_boot_id(state: &State) -> Result<(), ServiceError> {
    Ok(state.set_fact(Fact::BootId, &boot_id()?)?)
}

/// Recorded in place of a boot id when the VMs were shut down with the host. It differs from every
/// boot id, so the next start detects a reboot.
const HOST_DOWN: &str = "down";

/// Records that the host is going down: the next start starts the VMs that are recorded as running.
///
/// # Errors
/// If the state cannot be written.
pub(crate) fn record_host_down(state: &State) -> Result<(), ServiceError> {
    Ok(state.set_fact(Fact::BootId, HOST_DOWN)?)
}

fn boot_id() -> Result<String, ServiceError> {
    system::boot_id().map_err(|error| ServiceError::Internal(format!("cannot read the host's boot id: {error}")))
}

/// Returns whether the host was rebooted since the VMs were last started.
pub(super) async fn is_another_boot(host: &Host) -> Result<bool, ServiceError> {
    let state = Arc::clone(&host.state);
    let last = blocking(move || state.fact(Fact::BootId)).await?;
    Ok(last.is_some() && last != Some(boot_id()?))
}
