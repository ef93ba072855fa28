//! Putting things right at start, from the state file alone.
//!
//! What a client was told about is there: its record, its disk, and its machine if that still runs.
//! What has no record belongs to nobody and goes: machines, taps, forwards, disks, folders. What
//! does not have our form is never touched.
//!
//! A VM that cannot be put right is told as failed, with the reason, and keeps no other from being
//! served.

use crate::error::ServiceError;
use crate::host;
use crate::lifecycle::{STOPPING, disk_limits, endpoint, remove_dir};
use crate::service::{Service, blocking, vm_id};
use crate::state::{Fact, Record, State};
use scalebox_client::{EventKind, VmStatus};
use scalebox_storage::jails_dir;
use scalebox_units::{Gib, VmId};
use scalebox_vmm::Machine;
use serde_json::json;
use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// What was found and done, for the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// VMs in the state file.
    pub vms: usize,
    /// Machines that ran on and are ours again.
    pub adopted: usize,
    /// Machines that had no record and were ended.
    pub strays_ended: usize,
    /// Files in the pool that belonged to nobody.
    pub files_removed: usize,
    /// VMs that ran when the host went down, for [`start_again`].
    pub to_start: Vec<String>,
    /// VMs whose stop a crash interrupted, for [`stop_again`].
    pub to_stop: Vec<String>,
    /// VMs that run and are not connected to the network, for
    /// [`network_watch`](crate::network_watch).
    pub unconnected: Vec<String>,
}

/// Fills the service's table from the state file and removes leftovers. To be called once, before
/// the first request.
///
/// # Errors
/// When the state, the pool or the network as a whole cannot be read or put right.
pub async fn recover(service: &Service) -> Result<Recovered, ServiceError> {
    let state = Arc::clone(&service.inner().state);
    let records = blocking(move || state.vms()).await?;
    let known: HashSet<VmId> = records
        .iter()
        .map(|record| vm_id(&record.id))
        .collect::<Result<_, _>>()?;

    // Strays first: a machine that nobody owns has its disk open.
    let mut recovered = Recovered {
        vms: records.len(),
        strays_ended: end_strays(service, &known).await?,
        ..Recovered::default()
    };
    let pool = Arc::clone(&service.inner().pool);
    let swept = blocking(move || pool.sweep(&known)).await?;
    recovered.files_removed = swept.removed.len();
    for path in &swept.removed {
        tracing::info!(path = %path.display(), "removed a file that belongs to no VM");
    }

    let rebooted = is_another_boot(service).await?;
    let with_process = blocking(vms_with_process).await?;
    sweep_jails(service, &with_process).await?;
    let mut attached = Vec::new();
    for record in records {
        let lost = swept.missing.iter().any(|missing| missing.as_str() == record.id);
        let (endpoint, id) = (endpoint(&record)?, record.id.clone());
        match restore(service, record, lost, rebooted, &with_process).await? {
            Restored::Running => {
                recovered.adopted += 1;
                attached.push((endpoint, id));
            }
            Restored::ToStop => {
                recovered.to_stop.push(id.clone());
                attached.push((endpoint, id));
            }
            // Its guest may run as well as ever.
            Restored::Unreachable => attached.push((endpoint, id)),
            Restored::ToStart => recovered.to_start.push(id),
            Restored::Still => {}
        }
    }
    let (endpoints, ids): (Vec<_>, Vec<_>) = attached.into_iter().unzip();
    let reconciled = service.inner().network.reconcile(&endpoints).await?;
    for (tap, error) in reconciled.failed {
        tracing::error!(tap, error, "a machine is not connected to the network; trying again");
        let found = endpoints.iter().position(|endpoint| endpoint.tap() == tap);
        recovered.unconnected.extend(found.and_then(|at| ids.get(at).cloned()));
    }
    Ok(recovered)
}

/// Why a VM that ran before the host's reboot does not run yet.
const WAITING: &str = "waiting to be started after the host's reboot";

/// Starts the VMs that ran when the host went down, one after the other, and notes that this boot's
/// were seen to. Until then the state says that they run: a crash in between starts the rest at the
/// next start.
pub async fn start_again(service: Service, vms: Vec<String>) {
    for id in vms {
        let one = service.clone();
        let started = service.detached(async move { start_one_again(&one, &id).await });
        if let Err(error) = started.await {
            tracing::error!(%error, "a failure could not be noted");
        }
    }
    let state = Arc::clone(&service.inner().state);
    // A restart within one boot writes nothing.
    let noted = blocking(move || match state.fact(Fact::BootId)? {
        Some(noted) if noted == boot_id()? => Ok(()),
        _ => note_boot(&state),
    })
    .await;
    if let Err(error) = noted {
        tracing::error!(%error, "this boot of the host could not be noted");
    }
}

/// Carries through the stops that a crash interrupted, all at the same time: a guest may take a
/// minute.
pub fn stop_again(service: &Service, vms: Vec<String>) {
    for id in vms {
        let one = service.clone();
        service.inner().tasks.spawn(async move {
            let Ok(operation) = one.inner().vms.begin_when_idle(&id, "being stopped").await else {
                return;
            };
            let Some(machine) = &operation.machine else { return };
            if let Err(error) = one.shut_down(&operation.record, machine).await {
                tracing::error!(vm = id, %error, "a stop that a crash interrupted cannot be carried through");
            }
        });
    }
}

async fn start_one_again(service: &Service, id: &str) -> Result<(), ServiceError> {
    let inner = service.inner();
    // Deleted meanwhile, there is nothing to do.
    let Ok(operation) = inner.vms.begin_when_idle(id, "being started").await else {
        return Ok(());
    };
    let record = &operation.record;
    // Somebody was faster, whatever came of it.
    if operation.machine.is_some() || record.status_reason.as_deref() != Some(WAITING) {
        return Ok(());
    }
    if !record.autostart {
        service.persist(id, VmStatus::Stopped, None).await?;
        inner.vms.set(id, VmStatus::Stopped, None, None);
        return Ok(());
    }
    let Err(error) = service.boot(record).await else {
        return Ok(());
    };
    tracing::error!(vm = id, %error, "could not be started after the host's reboot");
    let reason = format!("it could not be started after the host's reboot: {error}");
    let persisted = service.persist(id, VmStatus::Failed, Some(&reason)).await;
    inner.vms.set(id, VmStatus::Failed, Some(reason.clone()), None);
    // Events follow what is durable.
    persisted?;
    let details = json!({ "reason": reason });
    inner.events.publish(EventKind::Failed, Some(record), details);
    Ok(())
}

fn note_boot(state: &State) -> Result<(), ServiceError> {
    Ok(state.set_fact(Fact::BootId, &boot_id()?)?)
}

/// Stands in place of a boot's id when the VMs were shut down with the host: no boot has it, so the
/// next start takes itself for the first after a reboot.
const HOST_DOWN: &str = "down";

/// Notes that the host is going down: VMs that the state knows as running are started again by the
/// next start.
///
/// # Errors
/// When the state cannot be written.
pub fn note_host_down(state: &State) -> Result<(), ServiceError> {
    Ok(state.set_fact(Fact::BootId, HOST_DOWN)?)
}

fn boot_id() -> Result<String, ServiceError> {
    host::boot_id().map_err(|error| ServiceError::Internal(format!("cannot read the boot's id: {error}")))
}

/// Whether the host was rebooted since the VMs were last seen to.
async fn is_another_boot(service: &Service) -> Result<bool, ServiceError> {
    let state = Arc::clone(&service.inner().state);
    let last = blocking(move || state.fact(Fact::BootId)).await?;
    Ok(last.is_some() && last != Some(boot_id()?))
}

enum Restored {
    Running,
    /// A crash interrupted its stop.
    ToStop,
    /// Its process may be there, and is not ours again.
    Unreachable,
    /// It ran when the host went down.
    ToStart,
    Still,
}

/// Enters one VM.
async fn restore(
    service: &Service,
    mut record: Record,
    lost: bool,
    rebooted: bool,
    with_process: &HashSet<String>,
) -> Result<Restored, ServiceError> {
    let stopping = record.status == VmStatus::Stopped && record.status_reason.as_deref() == Some(STOPPING);
    let found = match record.status {
        VmStatus::Stopped if stopping => adopt(service, &record).await?,
        VmStatus::Running | VmStatus::Paused => adopt(service, &record).await?,
        // A start that a crash interrupted before it was recorded: nobody was told of its machine.
        VmStatus::Stopped | VmStatus::Failed => {
            let left = with_process.contains(&record.id) || service.run_dir(&record.id).exists();
            match left {
                true => match service.force_stop_once(&record.id).await {
                    Ok(_) => Found::Nothing,
                    Err(error) => {
                        tracing::error!(vm = record.id, %error, "what a crash left of its machine is not ended");
                        Found::Unreachable(format!("what a crash left of its machine is not ended: {error}"))
                    }
                },
                false => Found::Nothing,
            }
        }
    };
    let (machine, unreachable) = match found {
        Found::Machine(machine) => (Some(machine), None),
        Found::Unreachable(why) => (None, Some(why)),
        Found::Nothing => (None, None),
    };
    // A change that a crash interrupted may not have reached it.
    if let Some(machine) = &machine
        && let Err(error) = machine.limit_disk(disk_limits(record.limits)).await
    {
        tracing::warn!(vm = record.id, %error, "its disk may not be limited as it should: stop and start it");
    }
    // A disk that an unreachable machine has open is left alone.
    if !lost && unreachable.is_none() {
        let agreed = agree_on_disk_size(service, &mut record, machine.as_ref()).await;
        if let Err(error) = agreed {
            tracing::error!(vm = record.id, %error, "its disk may not be as large as it should");
        }
    }
    service.inner().pool.restore(Gib::new(record.disk_size_gib).bytes());
    let was_running = matches!(record.status, VmStatus::Running | VmStatus::Paused);
    if rebooted && was_running && record.autostart && machine.is_none() && !lost && unreachable.is_none() {
        let waiting = Some(WAITING.to_owned());
        let id = record.id.clone();
        tracing::info!(vm = id, name = record.name, "ran when the host went down");
        service.inner().vms.restore(
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
        (_, true, _) => (VmStatus::Failed, Some("its disk is gone from the pool".to_owned())),
        (Some(_), ..) => (VmStatus::Running, None),
        _ if unreachable.is_some() => (VmStatus::Failed, unreachable),
        (None, _, VmStatus::Running | VmStatus::Paused) if rebooted => (
            VmStatus::Stopped,
            Some("the host went down, and its autostart is off".to_owned()),
        ),
        (None, _, VmStatus::Running | VmStatus::Paused) => (
            VmStatus::Stopped,
            Some("its machine ended while scaleboxd was not running".to_owned()),
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
        // The next start is to try again to take an unreachable machine over.
        if !is_unreachable
            && !to_stop
            && let Err(error) = service.persist(&record.id, status, reason.as_deref()).await
        {
            tracing::error!(vm = record.id, %error, "its status is not recorded; the next start does it");
        }
        let kind = match status {
            VmStatus::Running => EventKind::Resumed,
            VmStatus::Paused => EventKind::Paused,
            VmStatus::Stopped => EventKind::Stopped,
            VmStatus::Failed => EventKind::Failed,
        };
        let details = json!({ "reason": reason });
        service.inner().events.publish(kind, Some(&record), details);
        (record.status, record.status_reason) = (status, reason);
    }
    let id = record.id.clone();
    service.inner().vms.restore(record, machine.clone());
    match machine {
        Some(machine) => {
            service.watch(id, machine);
            Ok(if to_stop { Restored::ToStop } else { Restored::Running })
        }
        None if is_unreachable => Ok(Restored::Unreachable),
        None => Ok(Restored::Still),
    }
}

/// A crash in the middle of a growth leaves the disk smaller than the state says: the growth is
/// carried through. If that fails, the growth is taken back, of which nobody was told. A disk that
/// is larger was left by a growth that failed: it is promised as it is, because the guest may have
/// seen it.
async fn agree_on_disk_size(
    service: &Service,
    record: &mut Record,
    machine: Option<&Arc<dyn Machine>>,
) -> Result<(), ServiceError> {
    let recorded = Gib::new(record.disk_size_gib);
    let disk = vm_id(&record.id)?;
    let mut found = service.inner().pool.provisioned(&disk)?;
    if found < recorded.bytes() {
        tracing::info!(vm = record.id, %found, to = recorded.as_u64(), "carrying a growth of the disk through");
        if let Err(error) = service.grow(record, machine, recorded).await {
            tracing::error!(vm = record.id, %error, "a growth of the disk that a crash interrupted is taken back");
        }
        found = service.inner().pool.provisioned(&disk)?;
    }
    if found.ceil_gib() != recorded {
        record.disk_size_gib = found.ceil_gib().as_u64();
        service.persist_disk_size(&record.id, found.ceil_gib()).await?;
    }
    Ok(())
}

enum Found {
    Machine(Arc<dyn Machine>),
    /// Its process may be there, and is not ours again: why, and what to do.
    Unreachable(String),
    Nothing,
}

async fn adopt(service: &Service, record: &Record) -> Result<Found, ServiceError> {
    let run_dir = service.run_dir(&record.id);
    let (vmm, id) = (&service.inner().vmm, vm_id(&record.id)?);
    match vmm.adopt(&id, record.vmm.as_deref(), &run_dir).await {
        Ok(Some(machine)) => Ok(Found::Machine(machine)),
        Ok(None) => {
            if let Err(error) = blocking(move || remove_dir(&run_dir)).await {
                tracing::warn!(vm = record.id, %error, "its machine is gone, and its folder is left");
            }
            Ok(Found::Nothing)
        }
        Err(error) => {
            tracing::error!(vm = record.id, %error, "a machine is not taken over; the others are served all the same");
            Ok(Found::Unreachable(match error {
                scalebox_vmm::Error::Hung { .. } => {
                    "its hypervisor does not answer: start or delete the VM to end it".to_owned()
                }
                other => format!("its machine could not be taken over ({other}): start or delete the VM to end it"),
            }))
        }
    }
}

/// Ends the machines, and removes the folders, of VMs that have no record.
async fn end_strays(service: &Service, known: &HashSet<VmId>) -> Result<usize, ServiceError> {
    let stray = |id: &String| !known.iter().any(|name| name.as_str() == id);
    let mut ended = 0;
    for id in vm_folders(&service.inner().settings.run_dir.join("vms"))?
        .into_iter()
        .filter(stray)
    {
        match service.force_stop_once(&id).await {
            Ok(true) => {
                tracing::info!(vm = id, "ended a machine that belongs to no VM");
                ended += 1;
            }
            Ok(false) => {}
            Err(error) => tracing::error!(vm = id, %error, "a machine that belongs to no VM is not ended"),
        }
    }
    for id in vm_folders(&service.inner().settings.state_dir.join("console"))?
        .into_iter()
        .filter(stray)
    {
        let console = service.console_dir(&id);
        blocking(move || remove_dir(&console)).await?;
    }
    Ok(ended)
}

/// Removes the jails of machines whose process is gone. After a reboot of the host there may be
/// many.
async fn sweep_jails(service: &Service, with_process: &HashSet<String>) -> Result<(), ServiceError> {
    let jails = jails_dir(&service.inner().settings.data_dir);
    let running: Vec<VmId> = with_process.iter().filter_map(|id| id.parse().ok()).collect();
    blocking(move || scalebox_vmm::sweep_jails(&jails, &running).map_err(ServiceError::from)).await
}

/// The VMs that some process of this host names in its arguments: one look for all of them, because
/// a host has thousands of stopped VMs and few processes. Whether a process really is a VM's
/// machine is for the driver to prove.
fn vms_with_process() -> Result<HashSet<String>, ServiceError> {
    let failed = |error: io::Error| ServiceError::Internal(format!("cannot list /proc: {error}"));
    let mut ids = HashSet::new();
    for entry in fs::read_dir("/proc").map_err(failed)? {
        // A process that ended meanwhile has no arguments any more, and what is no process never
        // had.
        let Ok(arguments) = fs::read(entry.map_err(failed)?.path().join("cmdline")) else {
            continue;
        };
        let arguments = String::from_utf8_lossy(&arguments);
        for (at, _) in arguments.match_indices("vm-") {
            ids.extend(
                arguments
                    .get(at..at + VM_ID_LENGTH)
                    .filter(|id| id.parse::<VmId>().is_ok())
                    .map(str::to_owned),
            );
        }
    }
    Ok(ids)
}

/// `vm-` and twelve hex digits.
const VM_ID_LENGTH: usize = 15;

/// The ids for which there is a folder in `folder`. What does not have the form of an id is not
/// ours.
pub(crate) fn vm_folders(folder: &Path) -> Result<Vec<String>, ServiceError> {
    let failed = |error: io::Error| ServiceError::Internal(format!("cannot list {}: {error}", folder.display()));
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        ids.extend(
            name.to_str()
                .filter(|name| name.parse::<VmId>().is_ok())
                .map(str::to_owned),
        );
    }
    Ok(ids)
}
