//! Machines: how a VM's is brought up, shut down, followed to its end and taken away with the VM.

use crate::cleanup::Cleanup;
use crate::error::ServiceError;
use crate::pool_watch;
use crate::reboot_loop;
use crate::service::{BASE_TEMPLATE, Service, blocking, fault_point, vm_id};
use crate::state::{Record, VmLimits};
use crate::undo::Steps;
use crate::vms::{CalledOff, Operation};
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

/// How long a guest may take to shut itself down before it is killed. An emulated Debian takes
/// about eight seconds.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(60);

/// How often the end of a machine is recorded again while the state cannot be written.
const PERSIST_INTERVAL: Duration = Duration::from_secs(5);

/// Why a VM is recorded as stopped whose machine may still be on its way down.
pub(crate) const STOPPING: &str = "being stopped";

/// How much of the console goes into the reason of a failure: a few lines.
const LAST_WORDS: Bytes = Bytes::new(512);

impl Service {
    pub(crate) async fn start_now(&self, reference: &str) -> Result<Vm, ServiceError> {
        let operation = self.inner().vms.begin(reference, "being started")?;
        let record = &operation.record;
        if matches!(record.status, VmStatus::Running | VmStatus::Paused) {
            return Err(ServiceError::WrongState(format!(
                "VM {} is {} already",
                record.name, record.status
            )));
        }
        self.boot(record).await
    }

    /// # Errors
    /// 409 when the VM's disk is gone, 500 when the host cannot tell.
    pub(crate) async fn require_disk(&self, record: &Record) -> Result<(), ServiceError> {
        let (pool, disk) = (Arc::clone(&self.inner().pool), vm_id(&record.id)?);
        if !blocking(move || pool.has_disk(&disk)).await? {
            return Err(ServiceError::WrongState(format!(
                "the disk of VM {} is gone from the pool: there is nothing left but to delete the VM",
                record.name
            )));
        }
        Ok(())
    }

    /// Starts the machine of a VM that has none.
    pub(crate) async fn boot(&self, record: &Record) -> Result<Vm, ServiceError> {
        self.require_disk(record).await?;
        self.force_stop(record).await?;
        let record = &self.assign_driver(record).await?;
        let mut steps = Steps::new();
        let started = async {
            let machine = self.bring_up(record, &mut steps).await?;
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
                tracing::info!(vm = record.id, name = record.name, "started");
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

    /// Seed drive, tap and forward, machine. The undos of the steps taken stand in `steps`.
    pub(crate) async fn bring_up(&self, record: &Record, steps: &mut Steps) -> Result<Arc<dyn Machine>, ServiceError> {
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
                // The console's log stays when the machine ends: it tells why.
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
                "this host has no kernel for its guests yet: run `scaleboxd template build {BASE_TEMPLATE}` on it"
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
                "VM {} is {} already",
                record.name, record.status
            )));
        };
        self.shut_down(record, machine).await
    }

    /// Shuts a VM's machine down.
    ///
    /// The intent is recorded first, so that a failure to record it leaves the machine running.
    /// Behind the machine's end the VM is stopped, whatever else fails; a crash in between is
    /// carried through by the next start.
    pub(crate) async fn shut_down(&self, record: &Record, machine: &Arc<dyn Machine>) -> Result<Vm, ServiceError> {
        self.persist(&record.id, VmStatus::Stopped, Some(STOPPING)).await?;
        let ended = async {
            fault_point("stop: intent recorded")?;
            Ok::<_, ServiceError>(machine.stop(STOP_GRACE).await?)
        };
        let outcome = match ended.await {
            Ok(outcome) => outcome,
            Err(error) => {
                let reason = record.status_reason.as_deref();
                if let Err(undo) = self.persist(&record.id, record.status, reason).await {
                    tracing::error!(vm = record.id, error = %undo, "the intent to stop the VM is still recorded; the next start stops it");
                }
                return Err(error);
            }
        };
        crash_point("stop: machine ended");
        self.inner().vms.set(&record.id, VmStatus::Stopped, None, None);
        Cleanup::of_stopped(self, record)?.begin(self).await;
        if let Err(error) = self.persist(&record.id, VmStatus::Stopped, None).await {
            tracing::warn!(vm = record.id, %error, "stopped, and still recorded as being stopped");
        }
        crash_point("stop: recorded");
        tracing::info!(vm = record.id, name = record.name, ?outcome, "stopped");
        self.inner()
            .events
            .publish(EventKind::Stopped, Some(record), json!({ "by": "request" }));
        self.get(&record.id)
    }

    pub(crate) async fn delete_now(&self, reference: &str) -> Result<(), ServiceError> {
        // By its id, once it is known: the name may be another VM's meanwhile.
        let made = match self.inner().vms.call_off(reference).await {
            CalledOff::Undone => return Ok(()),
            CalledOff::TooLate(id) => Some(id),
            CalledOff::NotBeingMade => None,
        };
        let operation = match &made {
            None => self.inner().vms.begin(reference, "being deleted")?,
            Some(id) => match self.inner().vms.begin(id, "being deleted") {
                // Somebody was faster.
                Err(ServiceError::NotFound(_)) => return Ok(()),
                other => other?,
            },
        };
        let Operation { record, machine, .. } = &operation;
        let (state, id) = (Arc::clone(&self.inner().state), record.id.clone());
        // First, because it alone can be refused; from here on the VM is gone, and the rest is
        // removed until it is.
        blocking(move || state.delete(&id)).await?;
        crash_point("delete: record gone");
        let vacated = self.inner().vms.remove(&record.id);
        Cleanup::of_deleted(self, record, machine.clone(), vacated)
            .begin(self)
            .await;
        tracing::info!(vm = record.id, name = record.name, "deleted");
        self.inner()
            .events
            .publish(EventKind::Deleted, Some(record), Value::Null);
        Ok(())
    }

    /// Force-stops whatever there is of the machine of a VM that has no handle on one, and removes
    /// its folder. What fails is tried again later, until the VM has a machine.
    pub(crate) async fn force_stop(&self, record: &Record) -> Result<(), ServiceError> {
        let stopped = self.force_stop_once(&record.id).await.map(drop);
        stopped.inspect_err(|error| Cleanup::of_stray(self, record).begin_later(self, error))
    }

    /// As [`Service::force_stop`], without trying again. Returns whether there was a process.
    pub(crate) async fn force_stop_once(&self, id: &str) -> Result<bool, ServiceError> {
        let run_dir = self.run_dir(id);
        let ended = self.inner().vmm.force_stop(&vm_id(id)?, &run_dir).await?;
        blocking(move || remove_dir(&run_dir)).await?;
        Ok(ended)
    }

    /// Follows a machine to its end, and notes what came of the VM.
    pub(crate) fn watch(&self, id: String, machine: Arc<dyn Machine>) {
        let service = self.clone();
        // Not in `tasks`: a shutdown does not wait for machines.
        tokio::spawn(async move {
            let (reason, failure) = tokio::select! {
                reason = machine.exited() => (reason, None),
                failure = reboot_loop::seen(&machine) => {
                    if let Err(error) = machine.kill().await {
                        tracing::warn!(vm = id, %error, "a guest that cannot boot was not ended");
                    }
                    (machine.exited().await, Some(failure))
                }
                never = pool_watch::follow(&service, &id, &machine) => match never {},
            };
            service.note_exit(&id, &machine, reason, failure).await;
        });
    }

    /// Notes that a machine has ended, which is a failure of the VM if there is one to tell.
    async fn note_exit(&self, id: &str, machine: &Arc<dyn Machine>, reason: ExitReason, failure: Option<String>) {
        let Ok(operation) = self.inner().vms.begin_when_idle(id, "ending").await else {
            return;
        };
        // An operation that ended the machine itself has noted what came of it.
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
            Some(failure) => (VmStatus::Failed, Some(failure + &self.last_words(id).await)),
        };
        tracing::info!(vm = id, status = status.as_str(), reason, "machine ended");
        match Cleanup::of_stopped(self, &operation.record) {
            Ok(cleanup) => cleanup.begin(self).await,
            Err(error) => tracing::error!(vm = id, %error, "tap and forward are left; the next start removes them"),
        }
        let persisted = self.persist(id, status, reason.as_deref()).await;
        self.inner().vms.set(id, status, reason.clone(), None);
        let record = operation.record.clone();
        drop(operation);
        match persisted {
            Ok(()) => self.publish_exit(&record, reason),
            Err(error) => {
                tracing::error!(vm = id, %error, "the end of the machine is not recorded; trying again");
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

    /// Records the end of a machine as soon as the state can be written, unless the VM was started
    /// or deleted meanwhile.
    async fn persist_exit_later(&self, record: &Record, status: VmStatus, failure: Option<String>) {
        loop {
            tokio::time::sleep(PERSIST_INTERVAL).await;
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

    /// What the console said last, to go behind the reason of a failure; nothing when it said
    /// nothing.
    async fn last_words(&self, id: &str) -> String {
        let log = self.console_log(id);
        let read =
            blocking(move || console_tail(&log, LAST_WORDS).map_err(|error| ServiceError::Internal(error.to_string())));
        match read.await {
            Ok(said) if !said.trim().is_empty() => format!("; its console's last words: {}", said.trim()),
            Ok(_) => String::new(),
            Err(error) => {
                tracing::warn!(vm = id, %error, "the console's log cannot be read");
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

/// Each VM's machine runs as a user of its own, so that one that breaks out of its hypervisor finds
/// nothing of another's. The numbers lie in the range that <https://systemd.io/UIDS-GIDS/> lists as
/// unused (1879048192 to 2147352575).
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

/// A record that no version of this program writes: edited by hand, or damaged.
fn unusable(record: &Record, field: &str, form: InvalidFormat) -> ServiceError {
    ServiceError::WrongState(format!(
        "VM {} cannot be started with its recorded {field}, which {form}: make a template of it (snapshot), and a new VM of that",
        record.id
    ))
}

fn make_private_dir(dir: &Path) -> Result<(), ServiceError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| ServiceError::Internal(format!("cannot create {}: {error}", dir.display())))
}

/// Removes a folder and all in it; one that is not there is no error.
pub(crate) fn remove_dir(dir: &Path) -> Result<(), ServiceError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(ServiceError::Internal(format!(
            "cannot remove {}: {error}",
            dir.display()
        ))),
        _ => Ok(()),
    }
}
