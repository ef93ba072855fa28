//! Changing a VM: its disk grows, and what is kept about it changes.
//!
//! The intent is recorded before the disk grows; a crash in between is carried through by the next start.

use crate::auto_extend;
use crate::error::ServiceError;
use crate::lifecycle::{disk_limits, endpoint};
use crate::resize;
use crate::service::{Service, blocking, disk_name};
use crate::state::{Record, VmLimits};
use crate::vms::Operation;
use scalebox_client::{Disk, EventKind, UpdateVm, Vm};
use scalebox_fault_points::crash_point;
use scalebox_storage::{Gib, Reservation};
use scalebox_vmm::Machine;
use serde_json::{Value, json};
use std::sync::Arc;

impl Service {
    pub(crate) async fn update_now(&self, reference: &str, request: UpdateVm) -> Result<Vm, ServiceError> {
        let operation = self.inner().vms.begin_when_idle(reference, "being changed").await?;
        let record = &operation.record;
        let current = Gib::new(record.disk_size_gib);
        let size = request.disk_size_gib.map_or(current, Gib::new);
        if size < current {
            return Err(ServiceError::Invalid(format!(
                "disk_size_gib must be at least {current}: the disk of {} is {current} GiB large, and disks do not shrink",
                record.name
            )));
        }
        if let Some(Some(extend)) = request.disk_auto_extend {
            auto_extend::check(extend, size)?;
        }
        // First what can be refused.
        let disk = if size > current {
            self.require_disk(record).await?;
            // Offline, the disk gives way to a grown clone, and a machine that does not answer has it open.
            if operation.machine.is_none() && self.run_dir(&record.id).exists() {
                return Err(ServiceError::Conflict(format!(
                    "the machine of VM {} does not answer: start or delete the VM to end it",
                    record.name
                )));
            }
            let reservation = self.admit(size.bytes() - current.bytes()).await?;
            let before = match &operation.machine {
                Some(machine) => resize::guest_total(machine).await,
                None => None,
            };
            self.enlarge(&operation, reservation, json!({ "by": "request" }))
                .await?;
            Some(match &operation.machine {
                Some(machine) => {
                    let (pool, disk) = (Arc::clone(&self.inner().pool), disk_name(record)?);
                    // Without an answer, the usual advice is given.
                    let obstacle = blocking(move || pool.obstacle_to_live_growth(&disk))
                        .await
                        .ok()
                        .flatten();
                    resize::confirm(machine, before, size.bytes() - current.bytes(), obstacle).await
                }
                None => Disk {
                    confirmed: true,
                    guest_total_bytes: None,
                    note: None,
                },
            })
        } else {
            None
        };
        self.keep(&operation, &request).await?;
        Ok(Vm {
            disk,
            ..self.get(&record.id)?
        })
    }

    /// Carries out what of a change is not the disk's size: on the machine if there is one, in the state, in memory.
    async fn keep(&self, operation: &Operation, request: &UpdateVm) -> Result<(), ServiceError> {
        let Operation { record, machine, .. } = operation;
        let limits = VmLimits {
            disk_iops: request.disk_iops.unwrap_or(record.limits.disk_iops),
            disk_mbps: request.disk_mbps.unwrap_or(record.limits.disk_mbps),
            net_mbps: request.net_mbps.unwrap_or(record.limits.net_mbps),
        };
        let extend = request.disk_auto_extend.unwrap_or(record.auto_extend);
        let autostart = request.autostart.unwrap_or(record.autostart);
        if (limits, extend, autostart) == (record.limits, record.auto_extend, record.autostart) {
            return Ok(());
        }
        let (state, id) = (Arc::clone(&self.inner().state), record.id.clone());
        // What runs is changed last: should that fail or a crash come before it, the next start does it from the state.
        blocking(move || state.set_keeping(&id, extend, limits, autostart)).await?;
        self.inner().vms.change(&record.id, |record| {
            (record.limits, record.auto_extend, record.autostart) = (limits, extend, autostart);
        });
        tracing::info!(
            vm = record.id,
            name = record.name,
            auto_extend = ?extend,
            ?limits,
            autostart,
            "changed"
        );
        if let Some(machine) = machine
            && limits != record.limits
        {
            machine.limit_disk(disk_limits(limits)).await?;
            let limited = Record {
                limits,
                ..record.clone()
            };
            self.inner().network.attach(&endpoint(&limited)?).await?;
        }
        Ok(())
    }

    /// Grows a VM's disk by what was admitted, and tells of it: `cause` says by whom it was asked for.
    pub(crate) async fn enlarge(
        &self,
        operation: &Operation,
        admitted: Reservation,
        cause: Value,
    ) -> Result<(), ServiceError> {
        let Operation { record, machine, .. } = operation;
        let current = Gib::new(record.disk_size_gib);
        let size = (current.bytes() + admitted.size()).floor_gib();
        if machine.is_none() {
            // Grown offline, the disk gives way to a grown clone: nothing may have it open, not even a machine that hangs.
            self.put_down(&record.id).await?;
        }
        // The intent first: a crash from here on is carried through by the next start.
        self.persist_disk_size(&record.id, size).await?;
        crash_point("grow: size recorded");
        if let Err(error) = self.grow(record, machine.as_ref(), size).await {
            let (pool, disk) = (Arc::clone(&self.inner().pool), disk_name(record)?);
            let found = blocking(move || pool.provisioned(&disk)).await;
            if found.is_ok_and(|found| found >= size.bytes()) {
                // It came about after all: the guest may have seen it, and it stays promised.
                admitted.commit();
                self.inner()
                    .vms
                    .change(&record.id, |record| record.disk_size_gib = size.as_u64());
            } else if let Err(undo) = self.persist_disk_size(&record.id, current).await {
                tracing::error!(vm = record.id, error = %undo, "a growth that failed is not taken back; the next start does it");
            }
            return Err(error);
        }
        crash_point("grow: disk grown");
        admitted.commit();
        let (from, to) = (current.as_u64(), size.as_u64());
        self.inner().vms.change(&record.id, |record| record.disk_size_gib = to);
        tracing::info!(vm = record.id, name = record.name, from, to, %cause, "disk grown");
        let mut details = cause;
        details["from_gib"] = from.into();
        details["to_gib"] = to.into();
        self.inner().events.publish(EventKind::Grown, Some(record), details);
        Ok(())
    }

    /// Makes the disk as large as the state says: through the machine if there is one, else offline with its file system.
    pub(crate) async fn grow(
        &self,
        record: &Record,
        machine: Option<&Arc<dyn Machine>>,
        size: Gib,
    ) -> Result<(), ServiceError> {
        match machine {
            Some(machine) => {
                machine.resize_root(size.bytes()).await?;
                // The hypervisor does not: a power cut would make the disk smaller than it was said to be.
                let (pool, disk) = (Arc::clone(&self.inner().pool), disk_name(record)?);
                blocking(move || pool.settle_disk(&disk)).await
            }
            None => {
                let (pool, disk) = (Arc::clone(&self.inner().pool), disk_name(record)?);
                blocking(move || pool.grow_disk(&disk, size.bytes())).await
            }
        }
    }

    pub(crate) async fn persist_disk_size(&self, id: &str, size: Gib) -> Result<(), ServiceError> {
        let (state, id) = (Arc::clone(&self.inner().state), id.to_owned());
        blocking(move || state.set_disk_size(&id, size.as_u64())).await
    }
}
