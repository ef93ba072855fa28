//! Snapshots: creates a template from a VM's disk.
//!
//! The guest is kept from writing only while its disk is cloned, which copies no data: its agent
//! freezes the file systems, or the VM is paused if no agent responds. All other steps work on the
//! clone, when other operations on the VM are allowed again.

use crate::host::error::ServiceError;
use crate::host::files::vm_folders;
use crate::host::guest_agent::{GuestAgent, GuestAgentError};
use crate::host::vms::Operation;
use crate::host::{BASE_TEMPLATE, Host, blocking};
use crate::pool::kernels;
use crate::state::Record;
use crate::vm::lifecycle;
use scalebox_api::{EventKind, Snapshot, SnapshotVm, VmStatus};
use scalebox_guest::QgaError;
use scalebox_images::scrub;
use scalebox_storage::{EditedFile, PendingSnapshot, Pool, Scrub, StorageError, Template};
use scalebox_units::VmId;
use scalebox_vmm::{Machine, MachineState};
use serde_json::json;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time limit for a guest to flush its caches before its file systems are frozen.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(20);
/// Limit on attempts to thaw or resume a guest; then the daemon's next start tries again. Each
/// attempt has its own deadline.
const MAX_ATTEMPTS: u32 = 20;
/// Pause between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The way in which a guest was kept from writing while its disk was cloned, and the duration.
enum Quiesced {
    NotRunning,
    Paused(Duration),
    Frozen(Duration),
}

/// Creates a template from a VM's disk, running or not. Completes even if the caller stops
/// waiting.
///
/// # Errors
/// 403 for [`BASE_TEMPLATE`]; 404; 409 if the template name is in use, the disk's file system
/// is damaged, or another operation is running on the VM; 507 if the template does not fit.
/// Nothing is left behind then, and the guest continues to run.
pub(crate) async fn snapshot(host: &Host, reference: String, request: SnapshotVm) -> Result<Snapshot, ServiceError> {
    host.detached(|host| async move { snapshot_now(&host, &reference, &request).await })
        .await
}

async fn snapshot_now(host: &Host, reference: &str, request: &SnapshotVm) -> Result<Snapshot, ServiceError> {
    let template = request.template_name.as_str();
    host.vms.find(reference)?;
    if template == BASE_TEMPLATE {
        return Err(ServiceError::Forbidden(format!(
            "the template {BASE_TEMPLATE} is protected: choose another name"
        )));
    }
    let (pool, name) = (Arc::clone(&host.pool), request.template_name.clone());
    let clone = blocking(move || pool.begin_snapshot(&name)).await?;
    let operation = host.vms.begin(reference, "being snapshotted")?;
    lifecycle::require_disk(host, &operation.record).await?;
    let (mut clone, quiesced) = clone_quiesced(host, &operation, clone).await?;
    let record = operation.record.clone();
    let (on, kernel) = (host.clone(), record.kernel.clone());
    // The guard keeps the kernel until the template names it, even if the VM is deleted meanwhile.
    let kernel = blocking(move || kernels::choose(&on, kernel.as_ref())).await?;
    clone.set_kernel(kernel.as_ref().map(|held| held.id().clone()));
    if let Some(guest) = &record.guest {
        clone.set_image(guest.image.clone(), guest.init);
    }
    // Other operations on the VM are allowed from here on.
    drop(operation);

    let (pool, source) = (Arc::clone(&host.pool), record.clone());
    let made = blocking(move || finish(&pool, clone, &source)).await?;
    let (held, held_for) = match quiesced {
        Quiesced::NotRunning => ("not_running", Duration::ZERO),
        Quiesced::Paused(time) => ("paused", time),
        Quiesced::Frozen(time) => ("frozen", time),
    };
    let stood_still_ms = held_for.as_millis() as u64;
    tracing::info!(
        vm = %record.id,
        name = record.name,
        template,
        held,
        stood_still_ms,
        "snapshot of the VM created"
    );
    host.events.publish(
        EventKind::Snapshotted,
        Some(&record),
        json!({ "template": template, "stood_still_ms": stood_still_ms }),
    );
    host.events
        .publish(EventKind::TemplateCreated, None, json!({ "template": template }));
    Ok(Snapshot {
        template: made.name.to_string(),
        source_vm: record.id.to_string(),
        size_bytes: made.size.as_u64(),
        created_at: crate::host::rfc3339(made.created_at.try_into().unwrap_or(jiff::Timestamp::UNIX_EPOCH)),
        stood_still_ms,
        held: held.to_owned(),
    })
}

/// Clones a VM's disk while its guest writes nothing. The guest resumes in every case.
async fn clone_quiesced(
    host: &Host,
    operation: &Operation,
    clone: PendingSnapshot,
) -> Result<(PendingSnapshot, Quiesced), ServiceError> {
    let record = &operation.record;
    let (pool, disk) = (Arc::clone(&host.pool), record.id.clone());
    blocking(move || pool.flush_disk(&disk)).await?;
    let machine = match &operation.machine {
        Some(machine) if record.status == VmStatus::Running => machine,
        // The guest of a paused VM does not run; it is not resumed, because another task has
        // paused it.
        _ => return Ok((clone_disk_now(host, record, clone).await?, Quiesced::NotRunning)),
    };
    let mut agent = agent_of(host, machine).await;
    if let Some(flushed) = &agent
        && let Err(error) = flushed.flush(FLUSH_TIMEOUT).await
    {
        tracing::debug!(vm = %record.id, %error, "cannot flush the guest before freezing it");
        // The connection may have ended with it.
        agent = agent_of(host, machine).await;
    }
    if let Some(agent) = &agent {
        mark_frozen(host, &record.id).await?;
        let begun = Instant::now();
        let cloned = match agent.freeze().await {
            Ok(()) => Ok(clone_disk_now(host, record, clone).await),
            Err(error) => Err((clone, error)),
        };
        // The guest is thawed also after an error, because it may have frozen after the time limit.
        thaw(host, &record.id, machine, Some(agent)).await;
        let held_for = begun.elapsed();
        return match cloned {
            Ok(cloned) => Ok((cloned?, Quiesced::Frozen(held_for))),
            Err((clone, error)) => {
                tracing::info!(vm = %record.id, %error, "cannot freeze the guest; pausing the VM instead");
                clone_paused(host, record, machine, clone).await
            }
        };
    }
    clone_paused(host, record, machine, clone).await
}

async fn clone_paused(
    host: &Host,
    record: &Record,
    machine: &Arc<dyn Machine>,
    clone: PendingSnapshot,
) -> Result<(PendingSnapshot, Quiesced), ServiceError> {
    let begun = Instant::now();
    let cloned = match machine.pause().await {
        Ok(()) => clone_disk_now(host, record, clone).await,
        Err(error) => Err(error.into()),
    };
    // If the pool ran full in the meantime, the pool watch resumes the VM.
    let paused_by_watch = host
        .vms
        .find(record.id.as_str())
        .is_ok_and(|now| now.status == VmStatus::Paused);
    if !paused_by_watch {
        resume(machine).await?;
    }
    Ok((cloned?, Quiesced::Paused(begun.elapsed())))
}

async fn clone_disk_now(
    host: &Host,
    record: &Record,
    mut clone: PendingSnapshot,
) -> Result<PendingSnapshot, ServiceError> {
    let (pool, disk) = (Arc::clone(&host.pool), record.id.clone());
    blocking(move || pool.take_snapshot(&mut clone, &disk).map(|()| clone)).await
}

/// Thaws a guest, with retries. The next start retries a guest that is still frozen then.
async fn thaw(host: &Host, id: &VmId, machine: &Arc<dyn Machine>, first: Option<&GuestAgent>) {
    let mut last: Result<(), GuestAgentError> = match first {
        Some(agent) => agent.thaw().await,
        None => Err(QgaError::Timeout.into()),
    };
    for _ in 0..MAX_ATTEMPTS {
        if last.is_ok() || matches!(machine.state().await, Ok(MachineState::Ended(_))) {
            unmark_frozen(host, id).await;
            return;
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
        if let Some(agent) = agent_of(host, machine).await {
            last = agent.thaw().await;
        }
    }
    tracing::error!(
        vm = %id,
        "the guest's file systems may still be frozen: restart scaleboxd, or stop and start the VM"
    );
}

/// Returns the folder with one file for each frozen guest. It is outside the VM's own folder, where
/// its hypervisor can write.
fn frozen_dir(host: &Host) -> PathBuf {
    host.settings.run_dir.join("frozen")
}

async fn mark_frozen(host: &Host, id: &VmId) -> Result<(), ServiceError> {
    let (folder, mark) = (frozen_dir(host), frozen_dir(host).join(id.as_str()));
    blocking(move || {
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&mark, ""))
            .map_err(|error| ServiceError::Internal(format!("cannot create {}: {error}", mark.display())))
    })
    .await
}

/// Removes the file that marks a guest as frozen. A failure is logged.
async fn unmark_frozen(host: &Host, id: &VmId) {
    let mark = frozen_dir(host).join(id.as_str());
    let removed = blocking(move || match fs::remove_file(&mark) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ServiceError::Internal(format!(
            "cannot remove {}: {error}",
            mark.display()
        ))),
        _ => Ok(()),
    });
    if let Err(error) = removed.await {
        tracing::warn!(vm = %id, %error, "cannot remove the file that marks the guest as frozen; the next start removes it");
    }
}

/// Thaws the guests that were frozen when the daemon ended.
pub(crate) async fn thaw_left_frozen(host: Host) {
    let folder = frozen_dir(&host);
    let frozen = match blocking(move || vm_folders(&folder)).await {
        Ok(frozen) => frozen,
        Err(error) => {
            tracing::error!(%error, "cannot list the guests that are still frozen; they are not thawed");
            return;
        }
    };
    for id in frozen {
        // Prevents another snapshot from freezing the guest in the meantime.
        let operation = host.vms.begin_when_idle(id.as_str(), "being thawed").await;
        match operation.as_ref().map(|operation| &operation.machine) {
            Ok(Some(machine)) => {
                tracing::info!(vm = %id, "thawing a guest that was frozen when scaleboxd ended");
                thaw(&host, &id, machine, None).await;
            }
            _ => unmark_frozen(&host, &id).await,
        }
    }
}

async fn resume(machine: &Arc<dyn Machine>) -> Result<(), ServiceError> {
    let mut last = machine.resume().await;
    for _ in 0..MAX_ATTEMPTS {
        match last {
            Ok(()) | Err(scalebox_vmm::Error::Ended { .. }) => return Ok(()),
            Err(_) => {
                tokio::time::sleep(RETRY_INTERVAL).await;
                last = machine.resume().await;
            }
        }
    }
    Ok(last?)
}

async fn agent_of(host: &Host, machine: &Arc<dyn Machine>) -> Option<GuestAgent> {
    match GuestAgent::reach(host, machine).await {
        Ok(agent) => Some(agent),
        Err(error) => {
            tracing::debug!(vm = %machine.id(), %error, "the guest agent does not respond");
            None
        }
    }
}

/// Makes a template of the clone, without the identity of the VM whose disk it is.
fn finish(pool: &Pool, clone: PendingSnapshot, source: &Record) -> Result<Template, StorageError> {
    let hosts = |line: &[u8]| scrub::without_host(line, source.name.as_bytes());
    let key = source.ssh_public_key.as_deref().unwrap_or_default();
    let keys = |line: &[u8]| scrub::without_key(line, key);
    let mut edited = vec![EditedFile {
        path: scrub::HOSTS,
        edit: &hosts,
    }];
    edited.extend(scrub::AUTHORIZED_KEYS.map(|path| EditedFile { path, edit: &keys }));
    let identity = Scrub {
        removed_files: &scrub::REMOVED_FILES,
        emptied_files: &scrub::EMPTIED_FILES,
        removed_by_prefix: &scrub::REMOVED_BY_PREFIX,
        removed_trees: &scrub::REMOVED_TREES,
        recreated_folders: &scrub::RECREATED_FOLDERS,
        edited_files: &edited,
    };
    pool.finish_snapshot(clone, &identity)
}
