//! Finds the remains of a VM: its machine, or a process that a crash left behind.

use crate::host::advice::advised;
use crate::host::error::ServiceError;
use crate::host::files::remove_dir;
use crate::host::{Host, blocking};
use crate::state::Record;
use crate::vm::lifecycle;
use crate::vm::recovery::decide::Found;
use crate::vm::transition::STOPPING;
use scalebox_api::VmStatus;
use scalebox_units::VmId;
use scalebox_vmm::Machine;
use std::collections::HashSet;
use std::sync::Arc;

/// Returns whether a stop was recorded and not completed.
pub(super) fn is_stopping(record: &Record) -> bool {
    record.status == VmStatus::Stopped && record.status_reason.as_deref() == Some(STOPPING)
}

/// Adopts the machine of a VM that should have one, and kills a leftover machine of any other VM.
///
/// # Errors
/// If the record was damaged outside the daemon.
pub(super) async fn find_machine(
    host: &Host,
    record: &Record,
    with_process: &HashSet<VmId>,
) -> Result<(Found, Option<Arc<dyn Machine>>), ServiceError> {
    match record.status {
        VmStatus::Running | VmStatus::Paused => adopt(host, record).await,
        VmStatus::Stopped if is_stopping(record) => adopt(host, record).await,
        // A crash may have interrupted a start before it was recorded; no client saw it succeed.
        VmStatus::Stopped | VmStatus::Failed => {
            let left = with_process.contains(&record.id) || host.run_dir(&record.id).exists();
            let found = if left {
                kill_leftover(host, record).await
            } else {
                Found::Nothing
            };
            Ok((found, None))
        }
    }
}

/// Kills the process that a crash left behind for a stopped VM.
async fn kill_leftover(host: &Host, record: &Record) -> Found {
    match lifecycle::force_stop_once(host, &record.id).await {
        Ok(_) => Found::Nothing,
        Err(error) => {
            tracing::error!(vm = %record.id, %error, "cannot kill the leftover process of the VM's machine");
            Found::Unreachable(format!("cannot kill the leftover process of the VM's machine: {error}"))
        }
    }
}

async fn adopt(host: &Host, record: &Record) -> Result<(Found, Option<Arc<dyn Machine>>), ServiceError> {
    let run_dir = host.run_dir(&record.id);
    let (vmm, id) = (&host.vmm, record.id.clone());
    match vmm.adopt(&id, record.vmm.as_deref(), &run_dir).await {
        Ok(Some(machine)) => Ok((Found::Adopted, Some(machine))),
        Ok(None) => {
            if let Err(error) = blocking(move || remove_dir(&run_dir)).await {
                tracing::warn!(vm = %record.id, %error, "the VM's machine has ended, but its folder cannot be removed");
            }
            Ok((Found::Nothing, None))
        }
        Err(error) => {
            tracing::error!(vm = %record.id, error = %advised(&error), "cannot adopt the VM's process; continuing with the other VMs");
            let why = match error {
                scalebox_vmm::Error::Hung { .. } => {
                    "the VM's hypervisor does not respond. Start the VM, which kills the hypervisor first, or delete the VM".to_owned()
                }
                other => format!(
                    "the VM's process could not be adopted ({}). Start the VM, which kills the process first, or delete the VM",
                    advised(&other)
                ),
            };
            Ok((Found::Unreachable(why), None))
        }
    }
}
