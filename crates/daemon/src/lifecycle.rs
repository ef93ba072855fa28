//! Machines: how a VM's is brought up, shut down, followed to its end and taken away with the VM.

use crate::error::ServiceError;
use crate::pool_watch;
use crate::reboot_loop;
use crate::reclaim;
use crate::service::{BASE_TEMPLATE, Service, blocking, disk_name};
use crate::state::{Record, VmLimits};
use crate::undo::Steps;
use crate::vms::{CalledOff, Operation};
use scalebox_client::{EventKind, Vm, VmStatus};
use scalebox_fault_points::crash_point;
use scalebox_guest::SeedDrive;
use scalebox_net::{Endpoint, Mbps};
use scalebox_storage::{Bytes, Gib};
use scalebox_vmm::{DiskLimits, ExitReason, Machine, MachineId, MachineSpec, Nic, RunAs, console_tail};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a guest may take to shut itself down before it is killed. An emulated Debian takes about eight seconds.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(60);

/// How much of the console goes into the reason of a failure: a few lines.
const LAST_WORDS: Bytes = Bytes::new(512);

impl Service {
    pub(crate) async fn start_now(&self, reference: &str) -> Result<Vm, ServiceError> {
        let operation = self.inner().vms.begin(reference, "being started")?;
        let record = &operation.record;
        if matches!(record.status, VmStatus::Running | VmStatus::Paused) {
            return Err(ServiceError::Conflict(format!(
                "VM {} is {} already",
                record.name, record.status
            )));
        }
        self.boot(record).await
    }

    /// Says no where there is nothing to work with.
    pub(crate) async fn require_disk(&self, record: &Record) -> Result<(), ServiceError> {
        let (pool, disk) = (Arc::clone(&self.inner().pool), disk_name(record)?);
        if blocking(move || pool.provisioned(&disk)).await.is_err() {
            return Err(ServiceError::Conflict(format!(
                "the disk of VM {} is gone from the pool: there is nothing left but to delete the VM",
                record.name
            )));
        }
        Ok(())
    }

    /// Starts the machine of a VM that has none.
    pub(crate) async fn boot(&self, record: &Record) -> Result<Vm, ServiceError> {
        self.require_disk(record).await?;
        self.put_down(&record.id).await?;
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
            hostname: record.name.clone(),
            ssh_public_key: record.ssh_public_key.clone(),
            mac: endpoint.mac().to_string(),
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
        crash_point("start: seed drive written");
        steps.taken("write the seed drive", async move {
            blocking(move || remove_dir(&undo_dir)).await
        });

        inner.network.attach(&endpoint).await?;
        crash_point("start: tap and forward there");
        let (network, undo_endpoint) = (inner.network.clone(), endpoint.clone());
        steps.taken(
            "attach to the network",
            async move { network.detach(&undo_endpoint).await },
        );

        let driver = inner.vmm.to_start(record.vmm.as_deref());
        let machine = driver.launch(&self.spec(record, &endpoint, run_dir, seed)?).await?;
        crash_point("start: machine launched");
        let undo_machine = Arc::clone(&machine);
        steps.taken("launch the machine", async move { undo_machine.kill().await.map(drop) });
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
            return Err(ServiceError::Unavailable(format!(
                "this host has no kernel for its guests yet: run `scaleboxd template build {BASE_TEMPLATE}` on it"
            )));
        }
        Ok(MachineSpec {
            id: machine_id(&record.id)?,
            vcpus: record.vcpu_count,
            memory_mib: record.mem_size_mib,
            kernel,
            initrd: Some(initrd),
            cmdline: self.inner().cmdline.clone(),
            root: self.inner().pool.disk_location(&disk_name(record)?),
            root_limits: disk_limits(record.limits),
            seed,
            nic: Nic {
                tap: endpoint.tap().to_owned(),
                mac: endpoint.mac().to_string(),
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
            return Err(ServiceError::Conflict(format!(
                "VM {} is {} already",
                record.name, record.status
            )));
        };
        self.shut_down(record, machine).await
    }

    /// Ends a VM's machine as the guest would have it, and notes that.
    pub(crate) async fn shut_down(&self, record: &Record, machine: &Arc<dyn Machine>) -> Result<Vm, ServiceError> {
        let outcome = machine.stop(STOP_GRACE).await?;
        crash_point("stop: machine ended");
        self.inner().vms.set(&record.id, VmStatus::Stopped, None, None);
        self.take_down(record).await?;
        crash_point("stop: tap and forward gone");
        self.persist(&record.id, VmStatus::Stopped, None).await?;
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
        match machine {
            Some(machine) => drop(machine.kill().await?),
            // One that does not answer is no machine of ours, and still has to end.
            None => drop(self.put_down(&record.id).await?),
        }
        crash_point("delete: machine ended");
        self.take_down(record).await?;
        crash_point("delete: tap and forward gone");
        // The record goes before the disk: a disk without a record is removed at the next start, a record without a disk is a loss.
        let (state, id) = (Arc::clone(&self.inner().state), record.id.clone());
        blocking(move || state.delete(&id)).await?;
        crash_point("delete: record gone");
        // From here on it is gone; what cannot be removed now is removed at the next start.
        self.inner().vms.remove(&record.id);
        let (pool, disk) = (Arc::clone(&self.inner().pool), disk_name(record)?);
        let console = self.console_dir(&record.id);
        let unlinked = blocking(move || pool.unlink_disk(&disk)).await;
        let removed = blocking(move || remove_dir(&console)).await;
        if let Err(error) = removed {
            tracing::warn!(vm = record.id, %error, "deleted, but its console's log is left; the next start removes it");
        }
        match unlinked {
            Ok(disk) => reclaim::give_back(self, record.id.clone(), disk, Gib::new(record.disk_size_gib)),
            // Its blocks are not free, so they stay promised.
            Err(error) => {
                tracing::warn!(vm = record.id, %error, "deleted, but its disk is left; the next start removes it");
            }
        }
        tracing::info!(vm = record.id, name = record.name, "deleted");
        self.inner()
            .events
            .publish(EventKind::Deleted, Some(record), Value::Null);
        Ok(())
    }

    /// Ends whatever there is of a VM's machine without asking it, and removes its folder. Returns whether a process was ended.
    pub(crate) async fn put_down(&self, id: &str) -> Result<bool, ServiceError> {
        let run_dir = self.run_dir(id);
        let ended = self.inner().vmm.put_down(&machine_id(id)?, &run_dir).await?;
        blocking(move || remove_dir(&run_dir)).await?;
        Ok(ended)
    }

    /// Tap, forward, seed drive and sockets of a machine that is gone.
    pub(crate) async fn take_down(&self, record: &Record) -> Result<(), ServiceError> {
        self.inner().network.detach(&endpoint(record)?).await?;
        let run_dir = self.run_dir(&record.id);
        blocking(move || remove_dir(&run_dir)).await
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
        let noted = async {
            self.take_down(&operation.record).await?;
            self.persist(id, status, reason.as_deref()).await
        };
        let noted = noted.await;
        // Seen when it can be started again.
        self.inner().vms.set(id, status, reason.clone(), None);
        let (kind, details) = match &reason {
            None => (EventKind::Stopped, json!({ "by": "guest" })),
            Some(reason) => (EventKind::Failed, json!({ "reason": reason })),
        };
        self.inner().events.publish(kind, Some(&operation.record), details);
        if let Err(error) = noted {
            tracing::error!(vm = id, %error, "the end of a machine could not be noted; the next start puts it right");
        }
    }

    /// What the console said last, to go behind the reason of a failure; nothing when it said nothing.
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

/// Each VM's machine runs as a user of its own, so that one that breaks out of its hypervisor finds nothing of another's. The
/// numbers lie in the range that <https://systemd.io/UIDS-GIDS/> lists as unused (1879048192 to 2147352575).
fn vmm_user(record: &Record) -> RunAs {
    let uid = 1_900_000_000 + u32::from(record.ssh_port);
    RunAs { uid, gid: uid }
}

pub(crate) fn endpoint(record: &Record) -> Result<Endpoint, ServiceError> {
    let endpoint = Endpoint::new(&record.id, record.guest_ip, record.ssh_port)?;
    let rate = record.limits.net_mbps;
    Ok(endpoint
        .with_owner(vmm_user(record).uid)
        .with_rate(rate.map(|rate| Mbps::new(rate.try_into().unwrap_or(u32::MAX)))))
}

pub(crate) fn machine_id(id: &str) -> Result<MachineId, ServiceError> {
    Ok(id.parse()?)
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
