//! Changing a VM: growing its disk, and changing its settings.
//!
//! The intent is recorded before the disk grows. After a crash in between, the next start completes
//! the growth.

use crate::host::error::ServiceError;
use crate::host::undo::Steps;
use crate::host::vms::Operation;
use crate::host::{Host, blocking, fault_point};
use crate::pool::admission;
use crate::state::{Record, VmLimits};
use crate::vm::spec::{disk_limits, endpoint};
use crate::vm::{auto_extend, guest_fs, lifecycle, view};
use scalebox_api::{AutoExtend, Disk, EventKind, UpdateVm, Vm};
use scalebox_fault_points::crash_point;
use scalebox_storage::Reservation;
use scalebox_units::{Gib, VmId};
use scalebox_vmm::Machine;
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) async fn update_now(host: &Host, reference: &str, request: UpdateVm) -> Result<Vm, ServiceError> {
    let operation = host.vms.begin_when_idle(reference, "being changed").await?;
    let record = &operation.record;
    let current = record.disk_size;
    let size = request.disk_size_gib.map_or(current, Gib::new);
    if size < current {
        return Err(ServiceError::invalid_field(
            "disk_size_gib",
            format!(
                "disk_size_gib must be at least {current}: the disk of VM {} has {current} GiB, and disks do not shrink",
                record.name
            ),
        ));
    }
    if let Some(Some(extend)) = request.disk_auto_extend {
        auto_extend::check(extend, size)?;
    }
    // The order is: checks that can reject the request, steps that can be undone, and last the
    // growth, which cannot be undone.
    let admitted = if size > current {
        Some(admit_growth(host, &operation, size).await?)
    } else {
        None
    };
    let settings = Settings::of(record).changed_by(&request);
    let mut steps = Steps::new();
    let changed = async {
        apply(host, &operation, settings, &mut steps).await?;
        match admitted {
            Some(admitted) => grow_and_confirm(host, &operation, admitted).await.map(Some),
            None => Ok(None),
        }
    };
    let disk = match changed.await {
        Ok(disk) => disk,
        Err(error) => {
            steps.undo_all().await;
            return Err(error);
        }
    };
    if settings != Settings::of(record) {
        host.vms.change(&record.id, |record| settings.write_to(record));
        tracing::info!(vm = %record.id, name = record.name, ?settings, "VM settings changed");
    }
    Ok(Vm {
        disk,
        ..view::get(host, record.id.as_str())?
    })
}

async fn admit_growth(host: &Host, operation: &Operation, size: Gib) -> Result<Reservation, ServiceError> {
    let record = &operation.record;
    lifecycle::require_disk(host, record).await?;
    // Offline growth replaces the disk by a resized clone, but an unresponsive machine still
    // has the old disk open.
    if operation.machine.is_none() && host.run_dir(&record.id).exists() {
        return Err(ServiceError::WrongState(format!(
            "cannot grow VM {}: its hypervisor does not respond. Start the VM, which kills the hypervisor first, or delete the VM",
            record.name
        )));
    }
    admission::admit(host, size.bytes() - record.disk_size.bytes()).await
}

async fn grow_and_confirm(host: &Host, operation: &Operation, admitted: Reservation) -> Result<Disk, ServiceError> {
    let growth = admitted.size();
    let before = match &operation.machine {
        Some(machine) => guest_fs::guest_total(host, machine).await,
        None => None,
    };
    grow_and_publish(host, operation, admitted, json!({ "by": "request" })).await?;
    Ok(match &operation.machine {
        Some(machine) => {
            let (pool, disk) = (Arc::clone(&host.pool), operation.record.id.clone());
            // If this fails, the response has the general advice.
            let obstacle = blocking(move || pool.obstacle_to_live_growth(&disk))
                .await
                .ok()
                .flatten();
            guest_fs::confirm(host, machine, before, growth, obstacle).await
        }
        None => Disk {
            confirmed: true,
            guest_total_bytes: None,
            note: None,
        },
    })
}

/// Applies settings to the VM's machine, if it has one, and records them. Adds the undos to
/// `steps`.
///
/// After a crash between the two steps, the next start applies the recorded settings.
async fn apply(host: &Host, operation: &Operation, settings: Settings, steps: &mut Steps) -> Result<(), ServiceError> {
    let Operation { record, machine, .. } = operation;
    let before = Settings::of(record);
    if settings == before {
        return Ok(());
    }
    if let Some(machine) = machine
        && settings.limits != before.limits
    {
        let (undo_host, undo_record, undo_machine) = (host.clone(), record.clone(), Arc::clone(machine));
        steps.taken("limit disk and network", async move {
            limit(&undo_host, &undo_record, &undo_machine, before.limits).await
        });
        limit(host, record, machine, settings.limits).await?;
        fault_point("change: limits applied")?;
    }
    persist_settings(host, &record.id, settings).await?;
    let (undo_host, id) = (host.clone(), record.id.clone());
    steps.taken("record the settings", async move {
        persist_settings(&undo_host, &id, before).await
    });
    fault_point("change: settings recorded")
}

async fn limit(host: &Host, record: &Record, machine: &Arc<dyn Machine>, limits: VmLimits) -> Result<(), ServiceError> {
    machine.limit_disk(disk_limits(limits)).await?;
    let limited = Record {
        limits,
        ..record.clone()
    };
    Ok(host.network.attach(&endpoint(&limited)?).await?)
}

async fn persist_settings(host: &Host, id: &VmId, settings: Settings) -> Result<(), ServiceError> {
    let (state, id) = (Arc::clone(&host.state), id.to_owned());
    let Settings {
        limits,
        extend,
        autostart,
    } = settings;
    blocking(move || state.set_settings(&id, extend, limits, autostart)).await
}

/// Grows a VM's disk by the admitted size and publishes an event; `cause` names the initiator.
pub(crate) async fn grow_and_publish(
    host: &Host,
    operation: &Operation,
    admitted: Reservation,
    cause: Value,
) -> Result<(), ServiceError> {
    let Operation { record, machine, .. } = operation;
    let current = record.disk_size;
    let size = (current.bytes() + admitted.size()).floor_gib();
    if machine.is_none() {
        // Offline growth replaces the disk by a resized clone, so no machine may have it open,
        // not even an unresponsive one.
        lifecycle::force_stop(host, record).await?;
    }
    // The intent is recorded first: after a crash from here on, the next start completes the
    // growth.
    persist_disk_size(host, &record.id, size).await?;
    let grown = async {
        fault_point("grow: size recorded")?;
        grow(host, record, machine.as_ref(), size).await
    };
    let grown = match grown.await {
        Ok(()) => Ok(()),
        Err(error) => match outcome_of_failed_growth(host, record, size).await {
            FailedGrowth::Grown => Ok(()),
            FailedGrowth::NotFlushed => Err(error),
            FailedGrowth::NotGrown => {
                if let Err(undo) = persist_disk_size(host, &record.id, current).await {
                    tracing::error!(vm = %record.id, error = %undo, "cannot roll back a failed growth of the VM's disk; the next start completes it or rolls it back");
                }
                return Err(error);
            }
        },
    };
    crash_point("grow: disk grown");
    // A guest may have seen the new size, so it stays committed, whatever else failed.
    admitted.commit();
    let (from, to) = (current.as_u64(), size.as_u64());
    host.vms.change(&record.id, |record| record.disk_size = size);
    grown?;
    tracing::info!(vm = %record.id, name = record.name, from, to, %cause, "disk grown");
    let mut details = cause;
    details["from_gib"] = from.into();
    details["to_gib"] = to.into();
    host.events.publish(EventKind::Grown, Some(record), details);
    Ok(())
}

async fn outcome_of_failed_growth(host: &Host, record: &Record, size: Gib) -> FailedGrowth {
    let found = async {
        let (pool, disk) = (Arc::clone(&host.pool), record.id.clone());
        blocking(move || pool.provisioned(&disk)).await
    };
    match found.await {
        Ok(found) if found >= size.bytes() => {}
        Ok(_) => return FailedGrowth::NotGrown,
        Err(error) => {
            tracing::error!(vm = %record.id, %error, "cannot read the size of the VM's disk after a failed growth; the next start reconciles it with the record");
            return FailedGrowth::NotGrown;
        }
    }
    let flushed = async {
        let (pool, disk) = (Arc::clone(&host.pool), record.id.clone());
        blocking(move || pool.flush_disk(&disk)).await
    };
    match flushed.await {
        Ok(()) => FailedGrowth::Grown,
        Err(error) => {
            tracing::error!(vm = %record.id, %error, "the VM's disk has grown, but may be smaller again after a power cut");
            FailedGrowth::NotFlushed
        }
    }
}

/// Grows the disk to the recorded size. With a machine, the disk grows live; otherwise it grows
/// offline, together with its file system.
pub(crate) async fn grow(
    host: &Host,
    record: &Record,
    machine: Option<&Arc<dyn Machine>>,
    size: Gib,
) -> Result<(), ServiceError> {
    match machine {
        Some(machine) => {
            machine.resize_root(size.bytes()).await?;
            // The hypervisor does not flush the new size: a power cut could revert it after it
            // was reported.
            let (pool, disk) = (Arc::clone(&host.pool), record.id.clone());
            blocking(move || pool.flush_disk(&disk)).await
        }
        None => {
            let (pool, disk) = (Arc::clone(&host.pool), record.id.clone());
            let grown = blocking(move || pool.grow_disk(&disk, size.bytes())).await;
            // The old disk is unlinked only after the new one is durable, and may be left
            // behind.
            host.cleanups.sweep_soon();
            grown
        }
    }
}

pub(crate) async fn persist_disk_size(host: &Host, id: &VmId, size: Gib) -> Result<(), ServiceError> {
    let (state, id) = (Arc::clone(&host.state), id.to_owned());
    blocking(move || state.set_disk_size(&id, size)).await
}

/// The state of a disk after its growth returned an error.
enum FailedGrowth {
    NotGrown,
    /// The disk has the new size, durably; only a later step failed.
    Grown,
    /// The disk has the new size, but may lose it in a power cut.
    NotFlushed,
}

/// The settings of a VM that a request can change, besides the size of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Settings {
    limits: VmLimits,
    extend: Option<AutoExtend>,
    autostart: bool,
}

impl Settings {
    fn of(record: &Record) -> Settings {
        Settings {
            limits: record.limits,
            extend: record.auto_extend,
            autostart: record.autostart,
        }
    }

    fn changed_by(self, request: &UpdateVm) -> Settings {
        Settings {
            limits: VmLimits {
                disk_iops: request.disk_iops.unwrap_or(self.limits.disk_iops),
                disk_mbps: request.disk_mbps.unwrap_or(self.limits.disk_mbps),
                net_mbps: request.net_mbps.unwrap_or(self.limits.net_mbps),
            },
            extend: request.disk_auto_extend.unwrap_or(self.extend),
            autostart: request.autostart.unwrap_or(self.autostart),
        }
    }

    fn write_to(self, record: &mut Record) {
        (record.limits, record.auto_extend, record.autostart) = (self.limits, self.extend, self.autostart);
    }
}
