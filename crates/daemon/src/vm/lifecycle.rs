//! Starts and stops the machines of VMs, and watches for their end.

use crate::host::error::ServiceError;
use crate::host::undo::Steps;
use crate::host::vms::{Cancellation, Operation};
use crate::host::{BASE_TEMPLATE, Service, blocking, fault_point, vm_id};
use crate::state::{Record, VmLimits};
use crate::vm::cleanup::Cleanup;
use crate::vm::reboot_loop;
use crate::watch::space;
use scalebox_client::{EventKind, InvalidFormat, SshPublicKey, Vm, VmStatus};
use scalebox_fault_points::crash_point;
use scalebox_guest::SeedDrive;
use scalebox_net::{Endpoint, Mbps};
use scalebox_units::Bytes;
use scalebox_vmm::{DiskLimits, ExitReason, Machine, MachineSpec, Nic, RunAs, console_tail};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Time limit for a guest to shut down before it is killed. An emulated Debian takes about 8 s.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Retry interval for recording the end of a machine while the state cannot be written.
const PERSIST_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Recorded reason of a stopped VM whose machine may still be shutting down.
pub(crate) const STOPPING: &str = "being stopped";

/// How much console output is added to the reason of a failure: a few lines.
const MAX_CONSOLE_TAIL: Bytes = Bytes::new(512);

impl Service {
    pub(crate) async fn start_now(&self, reference: &str) -> Result<Vm, ServiceError> {
        let operation = self.inner().vms.begin(reference, "being started")?;
        let record = &operation.record;
        if matches!(record.status, VmStatus::Running | VmStatus::Paused) {
            return Err(ServiceError::WrongState(format!(
                "VM {} is already {}",
                record.name, record.status
            )));
        }
        self.boot(record).await
    }

    /// Checks that the VM's disk exists.
    ///
    /// # Errors
    /// 409 if the disk is gone; 500 if the pool cannot be read.
    pub(crate) async fn require_disk(&self, record: &Record) -> Result<(), ServiceError> {
        let (pool, disk) = (Arc::clone(&self.inner().pool), vm_id(&record.id)?);
        if !blocking(move || pool.has_disk(&disk)).await? {
            return Err(ServiceError::WrongState(format!(
                "the disk of VM {} is missing from the pool: delete the VM",
                record.name
            )));
        }
        Ok(())
    }

    /// Starts a VM that has no machine.
    pub(crate) async fn boot(&self, record: &Record) -> Result<Vm, ServiceError> {
        self.require_disk(record).await?;
        self.force_stop(record).await?;
        let record = &self.assign_driver(record).await?;
        let mut steps = Steps::new();
        let started = async {
            let machine = self.launch(record, &mut steps).await?;
            self.persist(&record.id, VmStatus::Running, None).await?;
            crash_point("start: recorded");
            Ok(machine)
        };
        match started.await {
            Ok(machine) => {
                self.inner()
                    .vms
                    .set(&record.id, VmStatus::Running, None, Some(Arc::clone(&machine)));
                self.watch(record.id.clone(), machine);
                tracing::info!(vm = record.id, name = record.name, "VM started");
                self.inner()
                    .events
                    .publish(EventKind::Started, Some(record), Value::Null);
                self.get(&record.id)
            }
            Err(error) => {
                steps.undo_all().await;
                Err(error)
            }
        }
    }

    /// Writes the seed drive, attaches tap and forward, and launches the machine. Adds the undo of
    /// each completed step to `steps`.
    pub(crate) async fn launch(&self, record: &Record, steps: &mut Steps) -> Result<Arc<dyn Machine>, ServiceError> {
        let inner = self.inner();
        let endpoint = endpoint(record)?;
        let run_dir = self.run_dir(&record.id);
        let seed = run_dir.join("seed.img");

        let drive = SeedDrive {
            instance_id: record.id.clone(),
            hostname: record.name.parse().map_err(|form| unusable(record, "name", form))?,
            ssh_public_key: SshPublicKey::from_record(&record.ssh_public_key)
                .map_err(|form| unusable(record, "ssh_public_key", form))?,
            mac: endpoint.mac(),
            address: ipnet::Ipv4Net::new(record.guest_ip, inner.settings.net.subnet().prefix_len())
                .map_err(|error| ServiceError::Internal(error.to_string()))?,
            gateway: inner.settings.net.gateway(),
            dns: inner.resolvers.clone(),
        };
        {
            let (run_dir, console, seed) = (run_dir.clone(), self.console_dir(&record.id), seed.clone());
            blocking(move || {
                // Kept when the machine ends, because the console log shows the cause.
                make_private_dir(&console)?;
                make_private_dir(&run_dir)?;
                drive
                    .write(&seed)
                    .map_err(|error| ServiceError::Internal(error.to_string()))
            })
            .await?;
        }
        let undo_dir = run_dir.clone();
        steps.taken("write the seed drive", async move {
            blocking(move || remove_dir(&undo_dir)).await
        });
        fault_point("start: seed drive written")?;

        inner.network.attach(&endpoint).await?;
        let (network, undo_endpoint) = (inner.network.clone(), endpoint.clone());
        steps.taken(
            "attach to the network",
            async move { network.detach(&undo_endpoint).await },
        );
        fault_point("start: tap and forward there")?;

        let driver = inner.vmm.to_start(record.vmm.as_deref());
        let machine = driver.launch(&self.spec(record, &endpoint, run_dir, seed)?).await?;
        let undo_machine = Arc::clone(&machine);
        steps.taken("launch the machine", async move { undo_machine.kill().await.map(drop) });
        fault_point("start: machine launched")?;
        tracing::info!(
            vm = record.id,
            pid = machine.pid(),
            tap = endpoint.tap(),
            ssh_port = record.ssh_port,
            "launched"
        );
        Ok(machine)
    }

    fn spec(
        &self,
        record: &Record,
        endpoint: &Endpoint,
        run_dir: PathBuf,
        seed: PathBuf,
    ) -> Result<MachineSpec, ServiceError> {
        let kernel_dir = self.inner().pool.kernel_dir();
        let (kernel, initrd) = (kernel_dir.join("vmlinuz"), kernel_dir.join("initrd.img"));
        if !kernel.is_file() || !initrd.is_file() {
            return Err(ServiceError::NotReady(format!(
                "this host has no guest kernel yet: run `scaleboxd template build {BASE_TEMPLATE}` on it"
            )));
        }
        Ok(MachineSpec {
            id: vm_id(&record.id)?,
            vcpus: record.vcpu_count,
            memory_mib: record.mem_size_mib,
            kernel,
            initrd: Some(initrd),
            cmdline: self.inner().cmdline.clone(),
            root: self.inner().pool.disk_location(&vm_id(&record.id)?),
            root_limits: disk_limits(record.limits),
            seed,
            nic: Nic {
                tap: endpoint.tap().to_owned(),
                mac: endpoint.mac(),
            },
            console_log: self.console_log(&record.id),
            run_dir,
            run_as: Some(vmm_user(record)),
        })
    }

    pub(crate) async fn stop_now(&self, reference: &str) -> Result<Vm, ServiceError> {
        let operation = self.inner().vms.begin(reference, "being stopped")?;
        let record = &operation.record;
        let Some(machine) = &operation.machine else {
            return Err(ServiceError::WrongState(format!(
                "VM {} is already {}",
                record.name, record.status
            )));
        };
        self.shut_down(record, machine).await
    }

    /// Shuts a VM's machine down.
    ///
    /// The intent is recorded first, so that the machine keeps running if that fails. Once the
    /// machine has ended, the VM is stopped, whatever else fails; after a crash in between, the
    /// next start completes the stop.
    pub(crate) async fn shut_down(&self, record: &Record, machine: &Arc<dyn Machine>) -> Result<Vm, ServiceError> {
        self.persist(&record.id, VmStatus::Stopped, Some(STOPPING)).await?;
        let ended = async {
            fault_point("stop: intent recorded")?;
            Ok::<_, ServiceError>(machine.stop(STOP_TIMEOUT).await?)
        };
        let outcome = match ended.await {
            Ok(outcome) => outcome,
            Err(error) => {
                let reason = record.status_reason.as_deref();
                if let Err(undo) = self.persist(&record.id, record.status, reason).await {
                    tracing::error!(vm = record.id, error = %undo, "cannot withdraw the recorded intent to stop the VM; the next start stops it");
                }
                return Err(error);
            }
        };
        crash_point("stop: machine ended");
        self.inner().vms.set(&record.id, VmStatus::Stopped, None, None);
        Cleanup::of_stopped(self, record)?.begin(self).await;
        if let Err(error) = self.persist(&record.id, VmStatus::Stopped, None).await {
            tracing::warn!(vm = record.id, %error, "VM stopped, but still recorded as being stopped");
        }
        crash_point("stop: recorded");
        tracing::info!(vm = record.id, name = record.name, ?outcome, "VM stopped");
        self.inner()
            .events
            .publish(EventKind::Stopped, Some(record), json!({ "by": "request" }));
        self.get(&record.id)
    }

    pub(crate) async fn delete_now(&self, reference: &str) -> Result<(), ServiceError> {
        // Continues with the id once it is known: another VM may have the name by now.
        let created = match self.inner().vms.cancel_creation(reference).await {
            Cancellation::Undone => return Ok(()),
            Cancellation::TooLate(id) => Some(id),
            Cancellation::NotBeingCreated => None,
        };
        let operation = match &created {
            None => self.inner().vms.begin(reference, "being deleted")?,
            Some(id) => match self.inner().vms.begin(id, "being deleted") {
                // Another request has deleted the VM.
                Err(ServiceError::NotFound(_)) => return Ok(()),
                other => other?,
            },
        };
        let Operation { record, machine, .. } = &operation;
        let (state, id) = (Arc::clone(&self.inner().state), record.id.clone());
        // First, because only this step can fail the request. The VM is gone from here on, and
        // cleanup retries the remaining steps until they succeed.
        blocking(move || state.delete(&id)).await?;
        crash_point("delete: record gone");
        let lease = self.inner().vms.remove(&record.id);
        Cleanup::of_deleted(self, record, machine.clone(), lease)
            .begin(self)
            .await;
        tracing::info!(vm = record.id, name = record.name, "VM deleted");
        self.inner()
            .events
            .publish(EventKind::Deleted, Some(record), Value::Null);
        Ok(())
    }

    /// Force-stops the machine of a VM that has no handle on it, and removes its folder. On
    /// failure, retries in the background until the VM is started again.
    pub(crate) async fn force_stop(&self, record: &Record) -> Result<(), ServiceError> {
        let stopped = self.force_stop_once(&record.id).await.map(drop);
        stopped.inspect_err(|error| Cleanup::of_unadopted(self, record).begin_later(self, error))
    }

    /// Like [`Service::force_stop`], without retries. Returns whether there was a process.
    pub(crate) async fn force_stop_once(&self, id: &str) -> Result<bool, ServiceError> {
        let run_dir = self.run_dir(id);
        let ended = self.inner().vmm.force_stop(&vm_id(id)?, &run_dir).await?;
        blocking(move || remove_dir(&run_dir)).await?;
        Ok(ended)
    }

    /// Waits for a machine to end, in the background, and records the VM's new status.
    pub(crate) fn watch(&self, id: String, machine: Arc<dyn Machine>) {
        let service = self.clone();
        // Not tracked in `tasks`, because a shutdown of the daemon does not wait for machines.
        tokio::spawn(async move {
            let (reason, failure) = tokio::select! {
                reason = machine.exited() => (reason, None),
                failure = reboot_loop::detect(&machine) => {
                    if let Err(error) = machine.kill().await {
                        tracing::warn!(vm = id, %error, "cannot kill a guest that fails to boot");
                    }
                    (machine.exited().await, Some(failure))
                }
                never = space::follow(&service, &id, &machine) => match never {},
            };
            service.handle_exit(&id, &machine, reason, failure).await;
        });
    }

    /// Records that a machine has ended: the VM is stopped, or failed if there is a failure to
    /// report.
    async fn handle_exit(&self, id: &str, machine: &Arc<dyn Machine>, reason: ExitReason, failure: Option<String>) {
        let Ok(operation) = self.inner().vms.begin_when_idle(id, "ending").await else {
            return;
        };
        // An operation that ended the machine itself has already recorded the new status.
        if !operation
            .machine
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, machine))
        {
            return;
        }
        let failure = match reason {
            ExitReason::GuestShutdown => failure,
            other => Some(failure.unwrap_or_else(|| other.to_string())),
        };
        let (status, reason) = match failure {
            None => (VmStatus::Stopped, None),
            Some(failure) => (VmStatus::Failed, Some(failure + &self.last_console_output(id).await)),
        };
        tracing::info!(vm = id, status = status.as_str(), reason, "machine ended");
        match Cleanup::of_stopped(self, &operation.record) {
            Ok(cleanup) => cleanup.begin(self).await,
            Err(error) => {
                tracing::error!(vm = id, %error, "cannot remove the VM's tap and forward; the next start does")
            }
        }
        let persisted = self.persist(id, status, reason.as_deref()).await;
        self.inner().vms.set(id, status, reason.clone(), None);
        let record = operation.record.clone();
        drop(operation);
        match persisted {
            Ok(()) => self.publish_exit(&record, reason),
            Err(error) => {
                tracing::error!(vm = id, %error, "cannot record the end of the VM's machine; retrying");
                self.persist_exit_later(&record, status, reason).await;
            }
        }
    }

    fn publish_exit(&self, record: &Record, failure: Option<String>) {
        let (kind, details) = match failure {
            None => (EventKind::Stopped, json!({ "by": "guest" })),
            Some(reason) => (EventKind::Failed, json!({ "reason": reason })),
        };
        self.inner().events.publish(kind, Some(record), details);
    }

    /// Records the end of a machine once the state can be written. Gives up if the VM was started
    /// or deleted in the meantime.
    async fn persist_exit_later(&self, record: &Record, status: VmStatus, failure: Option<String>) {
        loop {
            tokio::time::sleep(PERSIST_RETRY_INTERVAL).await;
            let Ok(operation) = self.inner().vms.begin_when_idle(&record.id, "ending").await else {
                return;
            };
            if operation.machine.is_some() || operation.record.status != status {
                return;
            }
            if self.persist(&record.id, status, failure.as_deref()).await.is_ok() {
                self.publish_exit(record, failure);
                return;
            }
        }
    }

    /// Returns the end of the console log, as a suffix for the reason of a failure. It is empty if
    /// there was no output.
    async fn last_console_output(&self, id: &str) -> String {
        let log = self.console_log(id);
        let read = blocking(move || {
            console_tail(&log, MAX_CONSOLE_TAIL).map_err(|error| ServiceError::Internal(error.to_string()))
        });
        match read.await {
            Ok(tail) if !tail.trim().is_empty() => format!("; last console output: {}", tail.trim()),
            Ok(_) => String::new(),
            Err(error) => {
                tracing::warn!(vm = id, %error, "cannot read the console log");
                String::new()
            }
        }
    }
}

pub(crate) fn disk_limits(limits: VmLimits) -> DiskLimits {
    DiskLimits {
        iops: limits.disk_iops.map(|iops| iops.try_into().unwrap_or(u32::MAX)),
        bytes_per_second: limits.disk_mbps.map(|megabytes| megabytes.saturating_mul(1_000_000)),
    }
}

/// Returns the user that a VM's machine runs as.
///
/// Each machine has its own user, so that a guest that escapes its hypervisor cannot access another
/// VM's files. The range of ids is listed as unused in <https://systemd.io/UIDS-GIDS/> (1879048192
/// to 2147352575).
fn vmm_user(record: &Record) -> RunAs {
    let uid = 1_900_000_000 + u32::from(record.ssh_port);
    RunAs { uid, gid: uid }
}

pub(crate) fn endpoint(record: &Record) -> Result<Endpoint, ServiceError> {
    let endpoint = Endpoint::new(&vm_id(&record.id)?, record.guest_ip, record.ssh_port);
    let rate = record.limits.net_mbps;
    Ok(endpoint
        .with_owner(vmm_user(record).uid)
        .with_rate(rate.map(|rate| Mbps::new(rate.try_into().unwrap_or(u32::MAX)))))
}

/// The error for a record that no release writes: edited by hand, or damaged.
fn unusable(record: &Record, field: &str, form: InvalidFormat) -> ServiceError {
    ServiceError::WrongState(format!(
        "cannot start VM {}: its recorded {field} {form}; create a template from it (snapshot), and a new VM from that template",
        record.id
    ))
}

fn make_private_dir(dir: &Path) -> Result<(), ServiceError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| ServiceError::Internal(format!("cannot create {}: {error}", dir.display())))
}

/// Removes a folder and its contents. A missing folder is not an error.
pub(crate) fn remove_dir(dir: &Path) -> Result<(), ServiceError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(ServiceError::Internal(format!(
            "cannot remove {}: {error}",
            dir.display()
        ))),
        _ => Ok(()),
    }
}
