//! Removes machines, folders and jails that belong to no VM.

use crate::host::error::ServiceError;
use crate::host::files::{remove_dir, vm_folders};
use crate::host::{Host, blocking};
use crate::vm::lifecycle;
use scalebox_storage::jails_dir;
use scalebox_units::VmId;
use std::collections::HashSet;
use std::fs;
use std::io;

/// Kills machines, and removes folders, of VMs that have no record.
pub(super) async fn kill_orphans(host: &Host, known: &HashSet<VmId>) -> Result<usize, ServiceError> {
    let stray = |id: &VmId| !known.contains(id);
    let mut ended = 0;
    let machines = host.settings.run_dir.join("vms");
    for id in blocking(move || vm_folders(&machines)).await?.into_iter().filter(stray) {
        match lifecycle::force_stop_once(host, &id).await {
            Ok(true) => {
                tracing::info!(vm = %id, "killed an orphaned machine");
                ended += 1;
            }
            Ok(false) => {}
            Err(error) => tracing::error!(vm = %id, %error, "cannot kill an orphaned machine"),
        }
    }
    let consoles = host.settings.state_dir.join("console");
    for id in blocking(move || vm_folders(&consoles)).await?.into_iter().filter(stray) {
        let console = host.console_dir(&id);
        blocking(move || remove_dir(&console)).await?;
    }
    Ok(ended)
}

/// Removes the jails of machines whose process is gone. After a reboot of the host there may be
/// many.
pub(super) async fn sweep_jails(host: &Host, with_process: &HashSet<VmId>) -> Result<(), ServiceError> {
    let jails = jails_dir(&host.settings.data_dir);
    let running: Vec<VmId> = with_process.iter().cloned().collect();
    blocking(move || scalebox_vmm::sweep_jails(&jails, &running).map_err(ServiceError::from)).await
}

/// Returns the VM ids that occur in the arguments of the host's processes.
///
/// One scan serves all VMs, because a host has thousands of stopped VMs and few processes. The
/// driver verifies whether such a process really is the VM's machine.
pub(super) fn vms_with_process() -> Result<HashSet<VmId>, ServiceError> {
    let failed = |error: io::Error| ServiceError::Internal(format!("cannot list /proc: {error}"));
    let mut ids = HashSet::new();
    for entry in fs::read_dir("/proc").map_err(failed)? {
        // A process that has ended has no arguments, and neither does an entry that is not a
        // process.
        let Ok(arguments) = fs::read(entry.map_err(failed)?.path().join("cmdline")) else {
            continue;
        };
        let arguments = String::from_utf8_lossy(&arguments);
        for (at, _) in arguments.match_indices("vm-") {
            let id = arguments.get(at..at + VM_ID_LENGTH);
            ids.extend(id.and_then(|id| id.parse::<VmId>().ok()));
        }
    }
    Ok(ids)
}

/// `vm-` and twelve hex digits.
const VM_ID_LENGTH: usize = 15;
