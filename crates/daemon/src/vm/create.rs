//! Creating a VM, step by step.
//!
//! Claim a name, an address and a port → (pull the image) → admit → clone the disk → (seed drive →
//! tap and forward → launch) → record. A VM becomes visible when it is recorded, and only then does
//! the client get a response. A crash at any point leaves either a recorded VM or leftovers that
//! [`recovery`](crate::vm::recovery) removes at the next start. Creations run concurrently; the
//! only lock they share is held for microseconds.

use crate::host::error::ServiceError;
use crate::host::files::remove_dir;
use crate::host::kernels_in_use::KernelInUse;
use crate::host::random::random_hex;
use crate::host::templates_in_use::TemplateInUse;
use crate::host::undo::Steps;
use crate::host::vms::Claim;
use crate::host::{Host, blocking, fault_point, rfc3339};
use crate::pool::{admission, kernels};
use crate::state::{KeyedRequest, Record, VmLimits};
use crate::templates::image::Image;
use crate::vm::{auto_extend, lifecycle, main_process, view};
use scalebox_api::{CreateVm, EventKind, TemplateName, Vm, VmSource, VmStatus};
use scalebox_fault_points::crash_point;
use scalebox_net::Lease;
use scalebox_storage::{Pool, Reservation};
use scalebox_units::{Gib, InvalidFormat, VmId};
use scalebox_vmm::Machine;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Creates the VM of a request. `pull_wait` is the maximum time to wait for the pull of an image.
pub(crate) async fn create_now(host: &Host, request: CreateVm, pull_wait: Duration) -> Result<Vm, ServiceError> {
    let inner = host;
    let claim = inner.vms.claim(request.name.as_ref().map(|name| name.as_str()))?;
    let (template, in_use) = template_of(host, &request, &claim, pull_wait).await?;
    let request = Arc::new(request);
    let admit_and_clone = || {
        let (host, request, template) = (host.clone(), Arc::clone(&request), template.clone());
        let (name, lease) = (claim.name.clone(), claim.lease);
        // One blocking task for both: a second thread hop costs as much as the clone.
        blocking(move || admit_and_clone(&host, &request, &template, name, lease))
    };
    // The guard keeps the kernel from being removed until the VM is in the table.
    let (record, reservation, _kernel) = admission::until_admitted(host, admit_and_clone).await?;

    drop(in_use);
    let disk = record.id.clone();
    let mut steps = Steps::new();
    let pool = Arc::clone(&inner.pool);
    steps.taken("clone the disk", async move {
        blocking(move || pool.delete_disk(&disk)).await
    });
    let console = host.console_dir(&record.id);
    steps.taken("create the console directory", async move {
        blocking(move || remove_dir(&console)).await
    });

    let keyed = KeyedRequest::of(&request);
    match complete(host, &record, &claim, keyed, &mut steps).await {
        Ok(machine) => {
            reservation.commit();
            claim.publish(record.clone(), machine.clone());
            publish_created(host, &record);
            if let Some(machine) = machine {
                lifecycle::watch(host, record.id.clone(), machine);
            }
            tracing::info!(
                vm = %record.id,
                name = record.name,
                status = record.status.as_str(),
                "VM created"
            );
            Ok(view::describe(host, &record))
        }
        Err(error) => {
            steps.undo_all().await;
            Err(error)
        }
    }
}

fn publish_created(host: &Host, record: &Record) {
    let events = &host.events;
    let details = json!({
        "template": record.template, "status": record.status,
        "disk_size_gib": record.disk_size, "ssh_port": record.ssh_port,
    });
    events.publish(EventKind::Created, Some(record), details);
    if record.status == VmStatus::Running {
        events.publish(EventKind::Started, Some(record), Value::Null);
    }
}

/// Returns the template to clone, and keeps it from being deleted. Pulls the image if it is not a
/// template yet; the pull continues if the creation ends before it.
async fn template_of(
    host: &Host,
    request: &CreateVm,
    claim: &Claim,
    pull_wait: Duration,
) -> Result<(TemplateName, TemplateInUse), ServiceError> {
    let image = match &request.source {
        VmSource::Template(name) => return Ok((name.clone(), host.templates_in_use.hold(name.as_str()))),
        VmSource::Image(image) => Image::of(image)?,
    };
    let found = match image.find(host).await? {
        Some(found) => found,
        None => {
            require_creatable(host, request).await?;
            tokio::select! {
                pulled = image.pull(host, pull_wait) => pulled?,
                cancelled = claim.cancelled() => return Err(cancelled),
            }
        }
    };
    Ok((image.template().clone(), found))
}

/// Checks what a creation needs besides its template, before that is pulled. The disk is at least
/// as large as is checked here.
async fn require_creatable(host: &Host, request: &CreateVm) -> Result<(), ServiceError> {
    let size = request.disk_size_gib.map_or(host.settings.default_disk_size, Gib::new);
    if let Some(extend) = request.disk_auto_extend {
        auto_extend::check(extend, size)?;
    }
    if request.start {
        let host = host.clone();
        blocking(move || {
            let newest = kernels::choose(&host, None)?;
            kernels::require(&host, newest.as_ref().map(|held| held.id())).map(drop)
        })
        .await?;
    }
    admission::admit(host, size.bytes()).await.map(drop)
}

/// Admits the request and clones the disk. Blocks. Leaves nothing behind on failure.
fn admit_and_clone(
    host: &Host,
    request: &CreateVm,
    template: &TemplateName,
    name: String,
    lease: Lease,
) -> Result<(Record, Reservation, Option<KernelInUse>), ServiceError> {
    let inner = host;
    let template = inner.pool.template(template)?;
    let requested = request.disk_size_gib.map(Gib::new);
    let disk_size = Pool::disk_size(&template, requested, inner.settings.default_disk_size)?;
    if disk_size > inner.settings.max_disk_size {
        let (size, max) = (disk_size, inner.settings.max_disk_size);
        return Err(ServiceError::invalid_field(
            "disk_size_gib",
            format!(
                "the template {} needs a disk of {size} GiB, which is over MAX_DISK_SIZE_GIB ({max})",
                template.name
            ),
        ));
    }
    if let Some(extend) = request.disk_auto_extend {
        auto_extend::check(extend, disk_size)?;
    }
    let guest = main_process::guest_config(&template, request)?;
    let reservation = inner.pool.admit(disk_size.bytes())?;

    let kernel = kernels::choose(host, template.kernel.as_ref())?;
    let mut record = new_record(host, request, &template.name, (name, lease), disk_size)?;
    record.kernel = kernel.as_ref().map(|held| held.id().clone());
    record.guest = guest;
    tracing::info!(
        vm = %record.id,
        name = record.name,
        template = record.template,
        disk_size_gib = record.disk_size.as_u64(),
        "VM admitted"
    );

    fault_point("create: admitted")?;
    inner.pool.create_disk(&record.id, &template.name, &reservation)?;
    Ok((record, reservation, kernel))
}

fn new_record(
    host: &Host,
    request: &CreateVm,
    template: &TemplateName,
    (name, lease): (String, Lease),
    disk_size: Gib,
) -> Result<Record, ServiceError> {
    let inner = host;
    Ok(Record {
        id: new_id()?,
        name,
        template: template.to_string(),
        ssh_public_key: request.ssh_public_key.as_ref().map(|key| key.as_str().to_owned()),
        created_at: rfc3339(jiff::Timestamp::now()),
        vcpu_count: request
            .vcpu_count
            .unwrap_or(inner.settings.default_vcpu_count.min(inner.limits.max_vcpus)),
        mem_size_mib: request.mem_size_mib.unwrap_or(inner.settings.default_mem_size_mib),
        disk_size,
        vmm: Some(inner.vmm.for_new().name().to_owned()),
        kernel: None,
        guest: None,
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
    })
}

/// Starts the machine, if the VM is to run, and writes the record.
async fn complete(
    host: &Host,
    record: &Record,
    claim: &Claim,
    keyed: Option<KeyedRequest>,
    steps: &mut Steps,
) -> Result<Option<Arc<dyn Machine>>, ServiceError> {
    fault_point("create: disk durable")?;
    claim.require_not_cancelled()?;
    let machine = match record.status {
        VmStatus::Running => Some(lifecycle::launch(host, record, steps).await?),
        _ => None,
    };
    claim.require_not_cancelled()?;
    let (state, row) = (Arc::clone(&host.state), record.clone());
    blocking(move || state.insert(&row, keyed.as_ref())).await?;
    crash_point("create: recorded");
    Ok(machine)
}

/// Makes a new id: `vm-` and 48 random bits in hex.
fn new_id() -> Result<VmId, ServiceError> {
    let failed = |error: String| ServiceError::Internal(format!("cannot draw a random VM id: {error}"));
    let bits = random_hex(6).map_err(|error| failed(error.to_string()))?;
    format!("vm-{bits}")
        .parse()
        .map_err(|error: InvalidFormat| failed(error.to_string()))
}
