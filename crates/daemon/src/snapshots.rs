//! Snapshots: a VM's disk becomes a template.
//!
//! The guest stands still only while its disk is cloned, which copies nothing: frozen by its agent,
//! or paused where no agent answers. All else is done on the clone, when the VM is free again.

use crate::agent;
use crate::error::ServiceError;
use crate::recovery::vm_folders;
use crate::service::{BASE_TEMPLATE, Service, blocking, vm_id};
use crate::state::Record;
use crate::vms::Operation;
use scalebox_client::{EventKind, Snapshot, SnapshotVm, VmStatus};
use scalebox_guest::{Agent, AgentError};
use scalebox_storage::{GuestIdentity, PendingSnapshot};
use scalebox_vmm::{Machine, MachineState};
use serde_json::json;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a guest may take to write out what it holds back, before its file systems are frozen.
const FLUSH: Duration = Duration::from_secs(20);
/// How often a guest is told to go on before that is left to the daemon's next start; each attempt
/// has a deadline of its own.
const ATTEMPTS: u32 = 20;
/// How long to wait before the next attempt.
const INTERVAL: Duration = Duration::from_millis(100);

/// The templates of which disks are being cloned.
#[derive(Default)]
pub struct Cloning {
    counts: Arc<Mutex<HashMap<String, usize>>>,
}

/// A template that stays while this lives.
pub struct InUse {
    counts: Arc<Mutex<HashMap<String, usize>>>,
    template: String,
}

impl Cloning {
    /// Keeps a template from being deleted.
    pub fn hold(&self, template: &str) -> InUse {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(template.to_owned()).or_default() += 1;
        InUse {
            counts: Arc::clone(&self.counts),
            template: template.to_owned(),
        }
    }

    /// # Errors
    /// 409 while a disk is being cloned from it.
    pub fn require_idle(&self, template: &str) -> Result<(), ServiceError> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.contains_key(template) {
            return Err(ServiceError::Busy(format!(
                "a VM is being made from the template {template}: try again when that is done"
            )));
        }
        Ok(())
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.template) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.template);
            }
        }
    }
}

/// How a guest was held still while its disk was cloned.
enum Held {
    NotRunning,
    Paused(Duration),
    Frozen(Duration),
}

impl Service {
    /// Makes a template of a VM's disk, running or not. Runs to its end even when the caller stops
    /// waiting.
    ///
    /// # Errors
    /// 403 for [`BASE_TEMPLATE`], 404, 409 when there is a template of that name, the disk's file
    /// system is damaged or something is under way on the VM, 507 when it does not fit. Nothing is
    /// left then, and the VM goes on.
    pub async fn snapshot(&self, reference: String, request: SnapshotVm) -> Result<Snapshot, ServiceError> {
        let service = self.clone();
        self.detached(async move { service.snapshot_now(&reference, &request).await })
            .await
    }

    async fn snapshot_now(&self, reference: &str, request: &SnapshotVm) -> Result<Snapshot, ServiceError> {
        let template = request.template_name.as_str();
        self.inner().vms.find(reference)?;
        if template == BASE_TEMPLATE {
            return Err(ServiceError::Forbidden(format!(
                "the template {BASE_TEMPLATE} is protected: choose another name"
            )));
        }
        let (pool, name) = (Arc::clone(&self.inner().pool), request.template_name.clone());
        let clone = blocking(move || pool.begin_snapshot(&name)).await?;
        let operation = self.inner().vms.begin(reference, "being snapshotted")?;
        self.require_disk(&operation.record).await?;
        let (clone, held) = self.clone_still(&operation, clone).await?;
        let record = operation.record.clone();
        // From here on the VM is free again.
        drop(operation);

        let (pool, source) = (Arc::clone(&self.inner().pool), identity(&record));
        let made = blocking(move || pool.finish_snapshot(clone, &source)).await?;
        let (held, stood_still) = match held {
            Held::NotRunning => ("not_running", Duration::ZERO),
            Held::Paused(time) => ("paused", time),
            Held::Frozen(time) => ("frozen", time),
        };
        let stood_still_ms = stood_still.as_millis() as u64;
        tracing::info!(
            vm = record.id,
            name = record.name,
            template,
            held,
            stood_still_ms,
            "snapshotted"
        );
        self.inner().events.publish(
            EventKind::Snapshotted,
            Some(&record),
            json!({ "template": template, "stood_still_ms": stood_still_ms }),
        );
        self.inner()
            .events
            .publish(EventKind::TemplateCreated, None, json!({ "template": template }));
        Ok(Snapshot {
            template: made.name.to_string(),
            source_vm: record.id,
            size_bytes: made.size.as_u64(),
            created_at: crate::service::rfc3339(made.created_at.try_into().unwrap_or(jiff::Timestamp::UNIX_EPOCH)),
            stood_still_ms,
            held: held.to_owned(),
        })
    }

    /// Clones a VM's disk while its guest writes nothing. On any outcome the guest goes on.
    async fn clone_still(
        &self,
        operation: &Operation,
        clone: PendingSnapshot,
    ) -> Result<(PendingSnapshot, Held), ServiceError> {
        let record = &operation.record;
        let (pool, disk) = (Arc::clone(&self.inner().pool), vm_id(&record.id)?);
        blocking(move || pool.flush_disk(&disk)).await?;
        let machine = match &operation.machine {
            Some(machine) if record.status == VmStatus::Running => machine,
            // A paused one stands still already, and is not ours to resume.
            _ => return Ok((self.clone_disk_now(record, clone).await?, Held::NotRunning)),
        };
        let agent = agent_of(machine).await;
        if let Some(agent) = &agent {
            if let Err(error) = agent.flush(FLUSH).await {
                tracing::debug!(vm = record.id, %error, "the guest was not flushed before it is frozen");
            }
            self.mark_frozen(&record.id)?;
            let begun = Instant::now();
            let cloned = match agent.freeze().await {
                Ok(()) => Ok(self.clone_disk_now(record, clone).await),
                Err(error) => Err((clone, error)),
            };
            // Also after an error: a freeze that was answered too late is one all the same.
            self.thaw(&record.id, machine, Some(agent)).await;
            let stood_still = begun.elapsed();
            return match cloned {
                Ok(cloned) => Ok((cloned?, Held::Frozen(stood_still))),
                Err((clone, error)) => {
                    tracing::info!(vm = record.id, %error, "the guest is not frozen but paused");
                    self.clone_paused(record, machine, clone).await
                }
            };
        }
        self.clone_paused(record, machine, clone).await
    }

    async fn clone_paused(
        &self,
        record: &Record,
        machine: &Arc<dyn Machine>,
        clone: PendingSnapshot,
    ) -> Result<(PendingSnapshot, Held), ServiceError> {
        let begun = Instant::now();
        let cloned = match machine.pause().await {
            Ok(()) => self.clone_disk_now(record, clone).await,
            Err(error) => Err(error.into()),
        };
        // Where the pool ran full meanwhile, who watches it has the say.
        let watched = self
            .inner()
            .vms
            .find(&record.id)
            .is_ok_and(|now| now.status == VmStatus::Paused);
        if !watched {
            resume(machine).await?;
        }
        Ok((cloned?, Held::Paused(begun.elapsed())))
    }

    async fn clone_disk_now(
        &self,
        record: &Record,
        mut clone: PendingSnapshot,
    ) -> Result<PendingSnapshot, ServiceError> {
        let (pool, disk) = (Arc::clone(&self.inner().pool), vm_id(&record.id)?);
        blocking(move || pool.take_snapshot(&mut clone, &disk).map(|()| clone)).await
    }

    /// Tells a guest to go on until it does. One that does not by then is told at the next start.
    async fn thaw(&self, id: &str, machine: &Arc<dyn Machine>, first: Option<&Agent>) {
        let mut last: Result<(), AgentError> = match first {
            Some(agent) => agent.thaw().await,
            None => Err(AgentError::Timeout),
        };
        for _ in 0..ATTEMPTS {
            if last.is_ok() || matches!(machine.state().await, Ok(MachineState::Ended(_))) {
                self.unmark_frozen(id);
                return;
            }
            tokio::time::sleep(INTERVAL).await;
            if let Some(agent) = agent_of(machine).await {
                last = agent.thaw().await;
            }
        }
        tracing::error!(
            vm = id,
            "the guest's file systems may still be frozen: restart scaleboxd, or stop and start the VM"
        );
    }

    /// Not in the VM's own folder, in which its hypervisor may write.
    fn frozen_dir(&self) -> PathBuf {
        self.inner().settings.run_dir.join("frozen")
    }

    fn mark_frozen(&self, id: &str) -> Result<(), ServiceError> {
        let mark = self.frozen_dir().join(id);
        fs::create_dir_all(self.frozen_dir())
            .and_then(|()| fs::write(&mark, ""))
            .map_err(|error| ServiceError::Internal(format!("cannot create {}: {error}", mark.display())))
    }

    fn unmark_frozen(&self, id: &str) {
        let mark = self.frozen_dir().join(id);
        remove_mark(&mark);
    }
}

/// Thaws the guests that an earlier daemon froze and did not live to thaw.
pub async fn thaw_left_frozen(service: Service) {
    let frozen = match vm_folders(&service.frozen_dir()) {
        Ok(frozen) => frozen,
        Err(error) => {
            tracing::error!(%error, "guests that an earlier scaleboxd froze are not thawed");
            return;
        }
    };
    for id in frozen {
        // So that no other snapshot freezes it meanwhile.
        let operation = service.inner().vms.begin_when_idle(&id, "being thawed").await;
        match operation.as_ref().map(|operation| &operation.machine) {
            Ok(Some(machine)) => {
                tracing::info!(vm = id, "thawing a guest that was frozen when scaleboxd ended");
                service.thaw(&id, machine, None).await;
            }
            _ => service.unmark_frozen(&id),
        }
    }
}

fn remove_mark(mark: &Path) {
    if let Err(error) = fs::remove_file(mark)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %mark.display(), %error, "a mark is left; the next start removes it");
    }
}

async fn resume(machine: &Arc<dyn Machine>) -> Result<(), ServiceError> {
    let mut last = machine.resume().await;
    for _ in 0..ATTEMPTS {
        match last {
            Ok(()) | Err(scalebox_vmm::Error::Ended { .. }) => return Ok(()),
            Err(_) => {
                tokio::time::sleep(INTERVAL).await;
                last = machine.resume().await;
            }
        }
    }
    Ok(last?)
}

async fn agent_of(machine: &Arc<dyn Machine>) -> Option<Agent> {
    match agent::reach(machine).await {
        Ok(agent) => Some(agent),
        Err(error) => {
            tracing::debug!(vm = %machine.id(), %error, "the guest agent did not answer");
            None
        }
    }
}

fn identity(record: &Record) -> GuestIdentity {
    GuestIdentity {
        hostname: record.name.clone(),
        ssh_public_key: record.ssh_public_key.clone(),
    }
}
