//! Rejects commands that need a running VM.

use crate::error::Error;
use scalebox_api::{Vm, VmStatus};

/// Returns an error with the remedy unless the VM is running.
pub(crate) fn check_runs(vm: &Vm) -> Result<(), Error> {
    let remedy = match vm.status {
        VmStatus::Running => return Ok(()),
        VmStatus::Stopped => format!("start it with: scalebox vm start {}", vm.name),
        VmStatus::Paused | VmStatus::Failed => format!("see: scalebox vm get {}", vm.name),
    };
    Err(Error::NotRunning {
        name: vm.name.clone(),
        status: vm.status,
        reason: vm.status_reason.clone(),
        remedy,
    })
}
