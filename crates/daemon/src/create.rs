//! Creating a VM: claim a name, an address and a port → admit → clone the disk → (seed drive → tap
//! and forward → launch) → record.
//!
//! Nothing is visible before the record, and a client is told only after it. A crash at any point
//! leaves either a recorded VM or leftovers that [`recovery`](crate::recovery) removes at the next
//! start. Creations run side by side; the only lock they share is held for microseconds.

use crate::auto_extend;
use crate::error::ServiceError;
use crate::idempotency::Once;
use crate::lifecycle::remove_dir;
use crate::random::random_hex;
use crate::service::{Service, blocking, fault_point, rfc3339, vm_id};
use crate::state::{Record, VmLimits};
use crate::undo::Steps;
use crate::vms::Claim;
use scalebox_client::{CreateVm, EventKind, Vm, VmStatus};
use scalebox_fault_points::crash_point;
use scalebox_net::Lease;
use scalebox_storage::{Pool, Reservation};
use scalebox_units::{Bytes, Gib};
use scalebox_vmm::Machine;
use serde_json::{Value, json};
use std::sync::Arc;

impl Service {
    pub(crate) async fn create_now(&self, request: CreateVm) -> Result<Vm, ServiceError> {
        let inner = self.inner();
        let claim = inner.vms.claim(request.name.as_ref().map(|name| name.as_str()))?;
        let in_use = inner.cloning.hold(request.template.as_str());
        let request = Arc::new(request);
        let allot = || {
            let (service, request, name, lease) = (self.clone(), Arc::clone(&request), claim.name.clone(), claim.lease);
            // In one go: a change of threads costs as much as the clone.
            blocking(move || service.allot(&request, name, lease))
        };
        let (record, reservation) = self.until_admitted(allot).await?;

        drop(in_use);
        let disk = vm_id(&record.id)?;
        let mut steps = Steps::new();
        let pool = Arc::clone(&inner.pool);
        steps.taken("clone the disk", async move {
            blocking(move || pool.delete_disk(&disk)).await
        });
        let console = self.console_dir(&record.id);
        steps.taken("make the console's folder", async move {
            blocking(move || remove_dir(&console)).await
        });

        let once = Once::of(&request);
        match self.complete(&record, &claim, once, &mut steps).await {
            Ok(machine) => {
                reservation.commit();
                claim.publish(record.clone(), machine.clone());
                self.tell_created(&record);
                if let Some(machine) = machine {
                    self.watch(record.id.clone(), machine);
                }
                tracing::info!(
                    vm = record.id,
                    name = record.name,
                    status = record.status.as_str(),
                    "created"
                );
                Ok(self.describe(&record))
            }
            Err(error) => {
                steps.undo_all().await;
                Err(error)
            }
        }
    }

    fn tell_created(&self, record: &Record) {
        let events = &self.inner().events;
        let details = json!({
            "template": record.template, "status": record.status,
            "disk_size_gib": record.disk_size_gib, "ssh_port": record.ssh_port,
        });
        events.publish(EventKind::Created, Some(record), details);
        if record.status == VmStatus::Running {
            events.publish(EventKind::Started, Some(record), Value::Null);
        }
    }

    /// Admits what was asked for and makes its disk. Blocks; on a failure nothing is left.
    fn allot(&self, request: &CreateVm, name: String, lease: Lease) -> Result<(Record, Reservation), ServiceError> {
        let inner = self.inner();
        let template = inner.pool.template(&request.template)?;
        let asked = request.disk_size_gib.map(Gib::new);
        let disk_size = Pool::disk_size(&template, asked, inner.settings.default_disk_size)?;
        if disk_size > inner.settings.max_disk_size {
            let (size, max) = (disk_size, inner.settings.max_disk_size);
            return Err(ServiceError::invalid_field(
                "disk_size_gib",
                format!(
                    "the template {} needs a disk of {size} GiB, and MAX_DISK_SIZE_GIB is {max}",
                    template.name
                ),
            ));
        }
        if let Some(extend) = request.disk_auto_extend {
            auto_extend::check(extend, disk_size)?;
        }
        let reservation = inner.pool.admit(disk_size.bytes())?;

        let record = Record {
            id: new_id()?,
            name,
            template: template.name.to_string(),
            ssh_public_key: request.ssh_public_key.as_str().to_owned(),
            created_at: rfc3339(jiff::Timestamp::now()),
            vcpu_count: request
                .vcpu_count
                .unwrap_or(inner.settings.default_vcpu_count.min(inner.limits.max_vcpus)),
            mem_size_mib: request.mem_size_mib.unwrap_or(inner.settings.default_mem_size_mib),
            disk_size_gib: disk_size.as_u64(),
            vmm: Some(inner.vmm.for_new().name().to_owned()),
            auto_extend: request.disk_auto_extend,
            limits: VmLimits {
                disk_iops: request.disk_iops,
                disk_mbps: request.disk_mbps,
                net_mbps: request.net_mbps,
            },
            autostart: request.autostart,
            guest_ip: lease.guest_ip,
            ssh_port: lease.ssh_port,
            status: if request.start {
                VmStatus::Running
            } else {
                VmStatus::Stopped
            },
            status_reason: None,
        };
        tracing::info!(
            vm = record.id,
            name = record.name,
            template = record.template,
            disk_size_gib = record.disk_size_gib,
            "admitted"
        );

        fault_point("create: admitted")?;
        inner
            .pool
            .create_disk(&vm_id(&record.id)?, &template.name, &reservation)?;
        Ok((record, reservation))
    }

    /// What comes after the disk: the machine, if it is to run, and the record.
    async fn complete(
        &self,
        record: &Record,
        claim: &Claim,
        once: Option<Once>,
        steps: &mut Steps,
    ) -> Result<Option<Arc<dyn Machine>>, ServiceError> {
        fault_point("create: disk durable")?;
        claim.still_wanted()?;
        let machine = match record.status {
            VmStatus::Running => Some(self.bring_up(record, steps).await?),
            _ => None,
        };
        claim.still_wanted()?;
        let (state, row) = (Arc::clone(&self.inner().state), record.clone());
        blocking(move || state.insert(&row, once.as_ref())).await?;
        crash_point("create: recorded");
        Ok(machine)
    }

    pub(crate) async fn admit(&self, size: Bytes) -> Result<Reservation, ServiceError> {
        let once = || {
            let pool = Arc::clone(&self.inner().pool);
            blocking(move || pool.admit(size))
        };
        self.until_admitted(once).await
    }

    /// Asks again while deleted disks are on their way back, and once more when the pool may grow
    /// by itself.
    async fn until_admitted<T, F>(&self, ask: impl Fn() -> F) -> Result<T, ServiceError>
    where
        F: Future<Output = Result<T, ServiceError>>,
    {
        let answer = self.inner().reclaim.ask_again(is_refusal, &ask).await;
        if answer.as_ref().is_err_and(is_refusal) && self.low_water().is_some() {
            // Asked again also when another request has made it grow meanwhile.
            self.extend_pool().await;
            return ask().await;
        }
        answer
    }
}

pub(crate) fn is_refusal(error: &ServiceError) -> bool {
    matches!(error, ServiceError::Insufficient { .. })
}

/// `vm-` and 48 random bits in hex.
fn new_id() -> Result<String, ServiceError> {
    let bits = random_hex(6).map_err(|error| ServiceError::Internal(format!("no id could be drawn: {error}")))?;
    Ok(format!("vm-{bits}"))
}
