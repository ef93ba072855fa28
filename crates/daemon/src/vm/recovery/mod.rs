//! Recovery at start, from the state file alone.
//!
//! Everything that was reported to a client exists: the record, the disk, and the machine if it
//! still runs. Machines, taps, forwards, disks and folders without a record are orphaned and
//! removed. Files and interfaces whose names do not match our format are never touched.
//!
//! A VM that cannot be recovered is reported as failed, with the reason, and does not keep the
//! others from being served.

use crate::host::error::ServiceError;
use crate::host::files::{remove_dir, vm_folders};
use crate::host::{Host, blocking, system};
use crate::state::{Fact, Record, State};
use crate::vm::change;
use crate::vm::lifecycle::{self, STOPPING};
use crate::vm::spec::{disk_limits, endpoint, machine_id};
use scalebox_api::{EventKind, VmStatus, is_vm_id};
use scalebox_storage::{Gib, Name, jails_dir};
use scalebox_vmm::{Machine, MachineId};
use serde_json::json;
use std::collections::HashSet;
use std::fs;
use std::io;
use std::sync::Arc;

/// The result of a recovery, for the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// VMs in the state file.
    pub vms: usize,
    /// Machines that kept running and were adopted.
    pub adopted: usize,
    /// Machines without a record that were killed.
    pub orphans_killed: usize,
    /// Orphaned files in the pool that were removed.
    pub files_removed: usize,
    /// VMs that were running when the host went down, for [`start_after_reboot`].
    pub to_start: Vec<String>,
    /// VMs whose stop was interrupted by a crash, for [`complete_stops`].
    pub to_stop: Vec<String>,
    /// Running VMs without a network connection, for [`network_watch`](crate::watch::network).
    pub unconnected: Vec<String>,
}

/// Fills the service's table from the state file and removes leftovers. Call it once, before the
/// first request.
///
/// # Errors
/// If the state, the pool or the network as a whole cannot be read or repaired.
pub async fn recover(host: &Host) -> Result<Recovered, ServiceError> {
    let state = Arc::clone(&host.state);
    let records = blocking(move || state.vms()).await?;
    let known: HashSet<Name> = records
        .iter()
        .map(|record| record.id.parse())
        .collect::<Result<_, _>>()?;

    // Orphaned machines first, because they may have an orphaned disk open.
    let mut recovered = Recovered {
        vms: records.len(),
        orphans_killed: kill_orphans(host, &known).await?,
        ..Recovered::default()
    };
    let pool = Arc::clone(&host.pool);
    let swept = blocking(move || pool.sweep(&known)).await?;
    recovered.files_removed = swept.removed.len();
    for path in &swept.removed {
        tracing::info!(path = %path.display(), "removed an orphaned file");
    }

    let rebooted = is_another_boot(host).await?;
    let with_process = blocking(vms_with_process).await?;
    sweep_jails(host, &with_process).await?;
    let mut attached = Vec::new();
    for record in records {
        let lost = swept.missing.iter().any(|missing| missing.as_str() == record.id);
        let (endpoint, id) = (endpoint(&record)?, record.id.clone());
        match restore(host, record, lost, rebooted, &with_process).await? {
            Restored::Running => {
                recovered.adopted += 1;
                attached.push((endpoint, id));
            }
            Restored::ToStop => {
                recovered.to_stop.push(id.clone());
                attached.push((endpoint, id));
            }
            // The guest may still be running normally.
            Restored::Unreachable => attached.push((endpoint, id)),
            Restored::ToStart => recovered.to_start.push(id),
            Restored::Unchanged => {}
        }
    }
    let (endpoints, ids): (Vec<_>, Vec<_>) = attached.into_iter().unzip();
    let reconciled = host.network.reconcile(&endpoints).await?;
    for (tap, error) in reconciled.failed {
        tracing::error!(tap, error, "cannot connect a machine to the network; retrying");
        let found = endpoints.iter().position(|endpoint| endpoint.tap() == tap);
        recovered.unconnected.extend(found.and_then(|at| ids.get(at).cloned()));
    }
    Ok(recovered)
}

/// Status reason of a VM that was running before the host's reboot and is not started yet.
const WAITING: &str = "waiting to be started after the host's reboot";

/// Starts the VMs that were running when the host went down, one after the other.
///
/// Records the boot id when all are started. Until then the state has them as running: after a
/// crash in between, the next start continues.
pub async fn start_after_reboot(host: Host, vms: Vec<String>) {
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

/// Completes the stops that a crash interrupted. All at once, because a guest may take a minute.
pub fn complete_stops(host: &Host, vms: Vec<String>) {
    for id in vms {
        let one = host.clone();
        host.tasks.spawn(async move {
            let Ok(operation) = one.vms.begin_when_idle(&id, "being stopped").await else {
                return;
            };
            let Some(machine) = &operation.machine else { return };
            if let Err(error) = lifecycle::shut_down(&one, &operation.record, machine).await {
                tracing::error!(vm = id, %error, "cannot complete the stop of the VM that a crash interrupted");
            }
        });
    }
}

async fn start_one_after_reboot(host: &Host, id: &str) -> Result<(), ServiceError> {
    let inner = host;
    // A VM that was deleted in the meantime.
    let Ok(operation) = inner.vms.begin_when_idle(id, "being started").await else {
        return Ok(());
    };
    let record = &operation.record;
    // Another request has started the VM, or tried to.
    if operation.machine.is_some() || record.status_reason.as_deref() != Some(WAITING) {
        return Ok(());
    }
    if !record.autostart {
        host.persist(id, VmStatus::Stopped, None).await?;
        inner.vms.set(id, VmStatus::Stopped, None, None);
        return Ok(());
    }
    let Err(error) = lifecycle::boot(host, record).await else {
        return Ok(());
    };
    tracing::error!(vm = id, %error, "cannot start the VM after the host's reboot");
    let reason = format!("the VM could not be started after the host's reboot: {error}");
    let persisted = host.persist(id, VmStatus::Failed, Some(&reason)).await;
    inner.vms.set(id, VmStatus::Failed, Some(reason.clone()), None);
    // Events are published only after the change is durable.
    persisted?;
    let details = json!({ "reason": reason });
    inner.events.publish(EventKind::Failed, Some(record), details);
    Ok(())
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
pub fn record_host_down(state: &State) -> Result<(), ServiceError> {
    Ok(state.set_fact(Fact::BootId, HOST_DOWN)?)
}

fn boot_id() -> Result<String, ServiceError> {
    system::boot_id().map_err(|error| ServiceError::Internal(format!("cannot read the host's boot id: {error}")))
}

/// Returns whether the host was rebooted since the VMs were last started.
async fn is_another_boot(host: &Host) -> Result<bool, ServiceError> {
    let state = Arc::clone(&host.state);
    let last = blocking(move || state.fact(Fact::BootId)).await?;
    Ok(last.is_some() && last != Some(boot_id()?))
}

enum Restored {
    Running,
    /// A crash interrupted the VM's stop.
    ToStop,
    /// The machine's process may exist, but could not be adopted.
    Unreachable,
    /// The VM was running when the host went down.
    ToStart,
    Unchanged,
}

/// Restores one VM: adopts its machine, reconciles its disk and adds it to the table.
async fn restore(
    host: &Host,
    mut record: Record,
    lost: bool,
    rebooted: bool,
    with_process: &HashSet<String>,
) -> Result<Restored, ServiceError> {
    let stopping = record.status == VmStatus::Stopped && record.status_reason.as_deref() == Some(STOPPING);
    let found = match record.status {
        VmStatus::Stopped if stopping => adopt(host, &record).await?,
        VmStatus::Running | VmStatus::Paused => adopt(host, &record).await?,
        // A crash may have interrupted a start before it was recorded; no client saw it succeed.
        VmStatus::Stopped | VmStatus::Failed => {
            let left = with_process.contains(&record.id) || host.run_dir(&record.id).exists();
            match left {
                true => kill_leftover(host, &record).await,
                false => Found::Nothing,
            }
        }
    };
    let (machine, unreachable) = match found {
        Found::Machine(machine) => (Some(machine), None),
        Found::Unreachable(why) => (None, Some(why)),
        Found::Nothing => (None, None),
    };
    // A crash may have interrupted a change before it reached the machine.
    if let Some(machine) = &machine
        && let Err(error) = machine.limit_disk(disk_limits(record.limits)).await
    {
        tracing::warn!(vm = record.id, %error, "cannot limit the VM's disk as recorded: stop and start the VM");
    }
    // An unreachable machine may have the disk open, so it is not touched.
    if !lost && unreachable.is_none() {
        let reconciled = reconcile_disk_size(host, &mut record, machine.as_ref()).await;
        if let Err(error) = reconciled {
            tracing::error!(vm = record.id, %error, "cannot reconcile the size of the VM's disk with its record");
        }
    }
    host.pool.restore(Gib::new(record.disk_size_gib).bytes());
    let was_running = matches!(record.status, VmStatus::Running | VmStatus::Paused);
    if rebooted && was_running && record.autostart && machine.is_none() && !lost && unreachable.is_none() {
        let waiting = Some(WAITING.to_owned());
        let id = record.id.clone();
        tracing::info!(vm = id, name = record.name, "VM was running when the host went down");
        host.vms.restore(
            Record {
                status: VmStatus::Stopped,
                status_reason: waiting,
                ..record
            },
            None,
        );
        return Ok(Restored::ToStart);
    }
    let is_unreachable = unreachable.is_some() && !lost;
    let to_stop = stopping && machine.is_some();
    let (status, reason) = match (&machine, lost, record.status) {
        (_, true, _) => (
            VmStatus::Failed,
            Some("the VM's disk is missing from the pool".to_owned()),
        ),
        (Some(_), ..) => (VmStatus::Running, None),
        _ if unreachable.is_some() => (VmStatus::Failed, unreachable),
        (None, _, VmStatus::Running | VmStatus::Paused) if rebooted => (
            VmStatus::Stopped,
            Some("the host went down, and the VM's autostart is off".to_owned()),
        ),
        (None, _, VmStatus::Running | VmStatus::Paused) => (
            VmStatus::Stopped,
            Some("the VM's machine ended while scaleboxd was not running".to_owned()),
        ),
        (None, _, VmStatus::Stopped) if stopping => (VmStatus::Stopped, None),
        (None, _, unchanged) => (unchanged, record.status_reason.clone()),
    };
    if (status, &reason) != (record.status, &record.status_reason) {
        tracing::info!(
            vm = record.id,
            name = record.name,
            from = record.status.as_str(),
            to = status.as_str(),
            reason
        );
        // An unreachable machine keeps its recorded status, so that the next start tries to adopt
        // it again.
        if !is_unreachable
            && !to_stop
            && let Err(error) = host.persist(&record.id, status, reason.as_deref()).await
        {
            tracing::error!(vm = record.id, %error, "cannot record the VM's status; the next start does");
        }
        let kind = match status {
            VmStatus::Running => EventKind::Resumed,
            VmStatus::Paused => EventKind::Paused,
            VmStatus::Stopped => EventKind::Stopped,
            VmStatus::Failed => EventKind::Failed,
        };
        let details = json!({ "reason": reason });
        host.events.publish(kind, Some(&record), details);
        (record.status, record.status_reason) = (status, reason);
    }
    let id = record.id.clone();
    host.vms.restore(record, machine.clone());
    match machine {
        Some(machine) => {
            lifecycle::watch(host, id, machine);
            Ok(if to_stop { Restored::ToStop } else { Restored::Running })
        }
        None if is_unreachable => Ok(Restored::Unreachable),
        None => Ok(Restored::Unchanged),
    }
}

/// Reconciles the size of a VM's disk with its record.
///
/// If a crash interrupted a growth, the disk is smaller than recorded: the growth is completed. If
/// that fails, the growth is rolled back; no client saw it succeed. A growth that failed may leave
/// the disk larger than recorded: the larger size is committed, because the guest may have seen it.
async fn reconcile_disk_size(
    host: &Host,
    record: &mut Record,
    machine: Option<&Arc<dyn Machine>>,
) -> Result<(), ServiceError> {
    let recorded = Gib::new(record.disk_size_gib);
    let disk = record.id.parse()?;
    let mut found = host.pool.provisioned(&disk)?;
    if found < recorded.bytes() {
        tracing::info!(vm = record.id, %found, to = recorded.as_u64(), "completing an interrupted growth of the VM's disk");
        if let Err(error) = change::grow(host, record, machine, recorded).await {
            tracing::error!(vm = record.id, %error, "cannot complete the interrupted growth of the VM's disk; rolling it back");
        }
        found = host.pool.provisioned(&disk)?;
    }
    if found.ceil_gib() != recorded {
        record.disk_size_gib = found.ceil_gib().as_u64();
        change::persist_disk_size(host, &record.id, found.ceil_gib()).await?;
    }
    Ok(())
}

enum Found {
    Machine(Arc<dyn Machine>),
    /// The machine's process may exist, but could not be adopted. Holds the cause and the remedy.
    Unreachable(String),
    Nothing,
}

/// Kills the process that a crash left of a stopped VM's machine.
async fn kill_leftover(host: &Host, record: &Record) -> Found {
    match lifecycle::force_stop_once(host, &record.id).await {
        Ok(_) => Found::Nothing,
        Err(error) => {
            tracing::error!(vm = record.id, %error, "cannot kill the process that a crash left of the VM's machine");
            Found::Unreachable(format!(
                "the process that a crash left of the VM's machine cannot be killed: {error}"
            ))
        }
    }
}

async fn adopt(host: &Host, record: &Record) -> Result<Found, ServiceError> {
    let run_dir = host.run_dir(&record.id);
    let (vmm, id) = (&host.vmm, machine_id(&record.id)?);
    match vmm.adopt(&id, record.vmm.as_deref(), &run_dir).await {
        Ok(Some(machine)) => Ok(Found::Machine(machine)),
        Ok(None) => {
            if let Err(error) = blocking(move || remove_dir(&run_dir)).await {
                tracing::warn!(vm = record.id, %error, "the VM's machine has ended, but its folder cannot be removed");
            }
            Ok(Found::Nothing)
        }
        Err(error) => {
            tracing::error!(vm = record.id, %error, "cannot adopt the VM's process; continuing with the other VMs");
            Ok(Found::Unreachable(match error {
                scalebox_vmm::Error::Hung { .. } => {
                    "the VM's hypervisor does not respond: start or delete the VM to kill it".to_owned()
                }
                other => format!("the VM's process could not be adopted ({other}): start or delete the VM to kill it"),
            }))
        }
    }
}

/// Kills machines, and removes folders, of VMs that have no record.
async fn kill_orphans(host: &Host, known: &HashSet<Name>) -> Result<usize, ServiceError> {
    let stray = |id: &String| !known.iter().any(|name| name.as_str() == id);
    let mut ended = 0;
    for id in vm_folders(&host.settings.run_dir.join("vms"))?
        .into_iter()
        .filter(stray)
    {
        match lifecycle::force_stop_once(host, &id).await {
            Ok(true) => {
                tracing::info!(vm = id, "killed an orphaned machine");
                ended += 1;
            }
            Ok(false) => {}
            Err(error) => tracing::error!(vm = id, %error, "cannot kill an orphaned machine"),
        }
    }
    for id in vm_folders(&host.settings.state_dir.join("console"))?
        .into_iter()
        .filter(stray)
    {
        let console = host.console_dir(&id);
        blocking(move || remove_dir(&console)).await?;
    }
    Ok(ended)
}

/// Removes the jails of machines whose process is gone. After a reboot of the host there may be
/// many.
async fn sweep_jails(host: &Host, with_process: &HashSet<String>) -> Result<(), ServiceError> {
    let jails = jails_dir(&host.settings.data_dir);
    let running: Vec<MachineId> = with_process.iter().filter_map(|id| id.parse().ok()).collect();
    blocking(move || scalebox_vmm::sweep_jails(&jails, &running).map_err(ServiceError::from)).await
}

/// Returns the VM ids that occur in the arguments of the host's processes.
///
/// One scan serves all VMs, because a host has thousands of stopped VMs and few processes. The
/// driver verifies whether such a process really is the VM's machine.
fn vms_with_process() -> Result<HashSet<String>, ServiceError> {
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
            ids.extend(
                arguments
                    .get(at..at + VM_ID_LENGTH)
                    .filter(|id| is_vm_id(id))
                    .map(str::to_owned),
            );
        }
    }
    Ok(ids)
}

/// `vm-` and twelve hex digits.
const VM_ID_LENGTH: usize = 15;
