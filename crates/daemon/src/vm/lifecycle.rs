//! Starts and stops the machines of VMs, and watches for their end.

use crate::host::advice::advised;
use crate::host::cleanups::Cleanup;
use crate::host::error::ServiceError;
use crate::host::files::{make_private_dir, remove_dir};
use crate::host::undo::Steps;
use crate::host::vms::{Cancellation, Operation};
use crate::host::{Host, blocking, fault_point};
use crate::pool::kernels;
use crate::state::Record;
use crate::vm::spec::{disk_limits, endpoint, vmm_user};
use crate::vm::transition::{Transition, record_later, transition};
use crate::vm::{main_process, pause, reboot_loop, view};
use scalebox_api::{EventKind, InvalidFormat, SshPublicKey, Vm, VmStatus};
use scalebox_fault_points::crash_point;
use scalebox_guest::SeedDrive;
use scalebox_net::Endpoint;
use scalebox_units::{Bytes, VmId};
use scalebox_vmm::{ExitReason, Machine, MachineSpec, Nic, console_tail};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Time limit for a guest to shut down before it is killed. An emulated Debian takes about 8 s.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum console output, a few lines, in the reason of a failure.
const MAX_CONSOLE_TAIL: Bytes = Bytes::new(512);

pub(crate) async fn start_now(host: &Host, reference: &str) -> Result<Vm, ServiceError> {
    let operation = host.vms.begin(reference, "being started")?;
    let record = &operation.record;
    if matches!(record.status, VmStatus::Running | VmStatus::Paused) {
        return Err(ServiceError::WrongState(format!(
            "VM {} is already {}",
            record.name, record.status
        )));
    }
    boot(host, record).await
}

/// Checks that the VM's disk exists.
///
/// # Errors
/// 409 if the disk is gone; 500 if the pool cannot be read.
pub(crate) async fn require_disk(host: &Host, record: &Record) -> Result<(), ServiceError> {
    let (pool, disk) = (Arc::clone(&host.pool), record.id.clone());
    if !blocking(move || pool.has_disk(&disk)).await? {
        return Err(ServiceError::WrongState(format!(
            "the disk of VM {} is missing from the pool: delete the VM",
            record.name
        )));
    }
    Ok(())
}

/// Starts a VM that has no machine.
pub(crate) async fn boot(host: &Host, record: &Record) -> Result<Vm, ServiceError> {
    require_disk(host, record).await?;
    force_stop(host, record).await?;
    let record = &assign_driver(host, record).await?;
    let record = &assign_kernel(host, record).await?;
    let mut steps = Steps::new();
    let started = async {
        let machine = launch(host, record, &mut steps).await?;
        transition(host, record, Transition::Started(Arc::clone(&machine))).await?;
        crash_point("start: recorded");
        Ok(machine)
    };
    match started.await {
        Ok(machine) => {
            watch(host, record.id.clone(), machine);
            tracing::info!(vm = %record.id, name = record.name, "VM started");
            view::get(host, record.id.as_str())
        }
        Err(error) => {
            steps.undo_all().await;
            Err(error)
        }
    }
}

/// Selects the driver for a VM that is about to be started. Records it and returns the new
/// record.
async fn assign_driver(host: &Host, record: &Record) -> Result<Record, ServiceError> {
    let name = host.vmm.to_start(record.vmm.as_deref()).name();
    if record.vmm.as_deref() == Some(name) {
        return Ok(record.clone());
    }
    let (state, id) = (Arc::clone(&host.state), record.id.clone());
    blocking(move || state.set_vmm(&id, name)).await?;
    host.vms.change(&record.id, |record| record.vmm = Some(name.to_owned()));
    Ok(Record {
        vmm: Some(name.to_owned()),
        ..record.clone()
    })
}

/// Selects the kernel for a VM that is about to be started. This is the VM's own kernel, or the
/// newest if it has none or its own is gone. Records a change, and returns the new record.
async fn assign_kernel(host: &Host, record: &Record) -> Result<Record, ServiceError> {
    let (on, current) = (host.clone(), record.kernel.clone());
    let chosen = blocking(move || kernels::choose(&on, current.as_ref())).await?;
    let Some(kernel) = chosen.as_ref().map(|held| held.id().clone()) else {
        return Ok(record.clone());
    };
    if record.kernel.as_ref() == Some(&kernel) {
        return Ok(record.clone());
    }
    if let Some(gone) = &record.kernel {
        tracing::warn!(
            vm = %record.id,
            gone = gone.as_str(),
            kernel = kernel.as_str(),
            "the VM's kernel is missing; starting the VM with the newest kernel"
        );
    }
    let (state, id, chosen) = (Arc::clone(&host.state), record.id.clone(), kernel.clone());
    blocking(move || state.set_kernel(&id, &chosen)).await?;
    host.vms
        .change(&record.id, |record| record.kernel = Some(kernel.clone()));
    Ok(Record {
        kernel: Some(kernel),
        ..record.clone()
    })
}

fn ssh_public_key(record: &Record) -> Result<Option<SshPublicKey>, ServiceError> {
    let key = record.ssh_public_key.as_deref().map(SshPublicKey::from_record);
    key.transpose().map_err(|form| unusable(record, "ssh_public_key", form))
}

/// Writes the seed drive, attaches tap and forward, and launches the machine. Adds the undo of
/// each completed step to `steps`.
pub(crate) async fn launch(host: &Host, record: &Record, steps: &mut Steps) -> Result<Arc<dyn Machine>, ServiceError> {
    let inner = host;
    let endpoint = endpoint(record)?;
    let run_dir = host.run_dir(&record.id);
    let seed = run_dir.join("seed.img");

    let drive = seed_drive(host, record, &endpoint)?;
    {
        let (run_dir, console, seed) = (run_dir.clone(), host.console_dir(&record.id), seed.clone());
        blocking(move || {
            // The folder is kept when the machine ends, because the console log shows the cause.
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
    fault_point("start: tap and forward attached")?;

    let driver = inner.vmm.to_start(record.vmm.as_deref());
    let machine = driver
        .launch(&spec(host, record, &endpoint, run_dir, seed).await?)
        .await?;
    let undo_machine = Arc::clone(&machine);
    steps.taken("launch the machine", async move { undo_machine.kill().await.map(drop) });
    fault_point("start: machine launched")?;
    tracing::info!(
        vm = %record.id,
        pid = machine.pid(),
        tap = endpoint.tap(),
        ssh_port = record.ssh_port,
        "machine launched"
    );
    Ok(machine)
}

fn seed_drive(host: &Host, record: &Record, endpoint: &Endpoint) -> Result<SeedDrive, ServiceError> {
    Ok(SeedDrive {
        instance_id: record.id.to_string(),
        hostname: record.name.parse().map_err(|form| unusable(record, "name", form))?,
        ssh_public_key: ssh_public_key(record)?,
        mac: endpoint.mac(),
        address: ipnet::Ipv4Net::new(record.guest_ip, host.settings.net.subnet().prefix_len())
            .map_err(|error| ServiceError::Internal(error.to_string()))?,
        gateway: host.settings.net.gateway(),
        dns: host.resolvers.clone(),
        main: record.guest.as_deref().and_then(main_process::of),
    })
}

async fn spec(
    host: &Host,
    record: &Record,
    endpoint: &Endpoint,
    run_dir: PathBuf,
    seed: PathBuf,
) -> Result<MachineSpec, ServiceError> {
    let (on, recorded) = (host.clone(), record.kernel.clone());
    let (kernel, initramfs) = blocking(move || {
        let kernel = kernels::require(&on, recorded.as_ref())?;
        let initramfs = kernels::initramfs(&on, &kernel)?;
        Ok::<_, ServiceError>((kernel.files, initramfs))
    })
    .await?;
    Ok(MachineSpec {
        id: record.id.clone(),
        vcpus: record.vcpu_count,
        memory_mib: record.mem_size_mib,
        kernel: kernel.vmlinuz,
        initrd: Some(initramfs),
        cmdline: match kernel.modules {
            Some(_) => scalebox_guest::with_modules_drive(&host.cmdline),
            None => host.cmdline.clone(),
        },
        modules: kernel.modules,
        root: host.pool.disk_location(&record.id),
        root_limits: disk_limits(record.limits),
        seed,
        nic: Nic {
            tap: endpoint.tap().to_owned(),
            mac: endpoint.mac(),
        },
        console_log: host.console_log(&record.id),
        run_dir,
        run_as: Some(vmm_user(record)),
    })
}

pub(crate) async fn stop_now(host: &Host, reference: &str) -> Result<Vm, ServiceError> {
    let operation = host.vms.begin(reference, "being stopped")?;
    let record = &operation.record;
    let Some(machine) = &operation.machine else {
        return Err(ServiceError::WrongState(format!(
            "VM {} is already {}",
            record.name, record.status
        )));
    };
    shut_down(host, record, machine).await
}

/// Shuts a VM's machine down.
///
/// The intent is recorded first, so that the machine keeps running if that fails. Once the
/// machine has ended, the VM is stopped, whatever else fails; after a crash in between, the
/// next start completes the stop.
pub(crate) async fn shut_down(host: &Host, record: &Record, machine: &Arc<dyn Machine>) -> Result<Vm, ServiceError> {
    transition(host, record, Transition::Stopping).await?;
    let ended = async {
        fault_point("stop: intent recorded")?;
        let (ended, ()) = tokio::join!(machine.stop(STOP_TIMEOUT), ask_agent(host, record, machine));
        Ok::<_, ServiceError>(ended?)
    };
    let outcome = match ended.await {
        Ok(outcome) => outcome,
        Err(error) => {
            if let Err(undo) = transition(host, record, Transition::StopFailed).await {
                tracing::error!(vm = %record.id, error = %undo, "cannot withdraw the recorded intent to stop the VM; the next start stops it");
            }
            return Err(error);
        }
    };
    crash_point("stop: machine ended");
    clean_up_after_stop(host, record).await;
    let stopped = Transition::Stopped { by: "request" };
    if let Err(error) = transition(host, record, stopped.clone()).await {
        tracing::warn!(vm = %record.id, %error, "the VM has stopped, but cannot be recorded as stopped; retrying");
        record_later(host, record, stopped);
    }
    crash_point("stop: recorded");
    tracing::info!(vm = %record.id, name = record.name, ?outcome, "VM stopped");
    view::get(host, record.id.as_str())
}

/// Requests a shutdown of the guest from our own agent, if it responds. The machine's own request
/// may need a program that the guest does not have.
async fn ask_agent(host: &Host, record: &Record, machine: &Arc<dyn Machine>) {
    let Some(agent) = host.agents.find(machine).await else {
        return;
    };
    // Firecracker ends a machine that resets.
    let reboot = record.vmm.as_deref() == Some("firecracker");
    if let Err(error) = agent.shut_down(reboot).await {
        tracing::debug!(vm = %record.id, %error, "the guest's agent did not confirm the shutdown");
    }
}

/// Stops and starts a VM as one operation.
pub(crate) async fn restart_now(host: &Host, reference: &str) -> Result<Vm, ServiceError> {
    let operation = host.vms.begin(reference, "being restarted")?;
    if let Some(machine) = &operation.machine {
        shut_down(host, &operation.record, machine).await?;
    }
    boot(host, &operation.record).await
}

pub(crate) async fn delete_now(host: &Host, reference: &str) -> Result<(), ServiceError> {
    // Continues with the id once it is known: another VM may have the name by now.
    let created = match host.vms.cancel_creation(reference).await {
        Cancellation::Undone => return Ok(()),
        Cancellation::TooLate(id) => Some(id),
        Cancellation::NotBeingCreated => None,
    };
    let operation = match &created {
        None => host.vms.begin(reference, "being deleted")?,
        Some(id) => match host.vms.begin(id.as_str(), "being deleted") {
            // Another request has deleted the VM.
            Err(ServiceError::NotFound(_)) => return Ok(()),
            other => other?,
        },
    };
    let Operation { record, machine, .. } = &operation;
    let (state, id) = (Arc::clone(&host.state), record.id.clone());
    // The record is deleted first, because only this step can fail the request. The VM is gone from
    // here on, and cleanup retries the remaining steps until they succeed.
    blocking(move || state.delete(&id)).await?;
    crash_point("delete: record gone");
    let lease = host.vms.remove(&record.id);
    Cleanup::of_deleted(host, record, machine.clone(), lease)
        .begin(host)
        .await;
    tracing::info!(vm = %record.id, name = record.name, "VM deleted");
    host.events.publish(EventKind::Deleted, Some(record), Value::Null);
    kernels::remove_unused(host).await;
    Ok(())
}

/// Force-stops the machine of a VM that has no handle on it, and removes its folder. On
/// failure, retries in the background until the VM is started again.
pub(crate) async fn force_stop(host: &Host, record: &Record) -> Result<(), ServiceError> {
    let stopped = force_stop_once(host, &record.id).await.map(drop);
    stopped.inspect_err(|error| Cleanup::of_unadopted(host, record).begin_later(host, error))
}

/// Force-stops a machine like [`force_stop`], without retries. Returns whether there was a process.
pub(crate) async fn force_stop_once(host: &Host, id: &VmId) -> Result<bool, ServiceError> {
    let run_dir = host.run_dir(id);
    let ended = host.vmm.force_stop(id, &run_dir).await?;
    blocking(move || remove_dir(&run_dir)).await?;
    Ok(ended)
}

/// Waits in the background until a machine ends, and records the VM's new status.
pub(crate) fn watch(host: &Host, id: VmId, machine: Arc<dyn Machine>) {
    let host = host.clone();
    // The task is not tracked in `tasks`, because a shutdown of the daemon does not wait for
    // machines.
    tokio::spawn(async move {
        let (reason, failure) = tokio::select! {
            reason = machine.exited() => (reason, None),
            failure = reboot_loop::detect(&machine) => {
                if let Err(error) = machine.kill().await {
                    tracing::warn!(vm = %id, error = %advised(&error), "cannot kill a guest that fails to boot");
                }
                (machine.exited().await, Some(failure))
            }
            never = pause::follow(&host, &id, &machine) => match never {},
        };
        handle_exit(&host, &id, &machine, reason, failure).await;
    });
}

/// Records that a machine has ended: the VM is stopped, or failed if there is a failure to
/// report.
async fn handle_exit(host: &Host, id: &VmId, machine: &Arc<dyn Machine>, reason: ExitReason, failure: Option<String>) {
    let Ok(operation) = host.vms.begin_when_idle(id.as_str(), "ending").await else {
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
    let ended = match failure {
        None => Transition::Stopped { by: "guest" },
        Some(failure) => Transition::Failed {
            reason: failure + &last_console_output(host, id).await,
            machine: None,
        },
    };
    let record = &operation.record;
    let effect = ended.effect(record);
    tracing::info!(
        vm = %id,
        status = effect.status.as_str(),
        reason = effect.reason,
        "machine ended"
    );
    // The cleanup comes before the change is visible: a client that sees it may start the VM at
    // once.
    clean_up_after_stop(host, record).await;
    if let Err(error) = transition(host, record, ended.clone()).await {
        tracing::error!(vm = %id, %error, "cannot record the end of the VM's machine; retrying");
        record_later(host, record, ended);
    }
}

/// Removes the remains of a stopped VM's machine from the host, or queues them for retries.
async fn clean_up_after_stop(host: &Host, record: &Record) {
    match Cleanup::of_stopped(host, record) {
        Ok(cleanup) => cleanup.begin(host).await,
        Err(error) => {
            tracing::error!(vm = %record.id, %error, "cannot remove the VM's tap and forward; the next start removes them")
        }
    }
}

/// Returns the end of the console log, as a suffix for the reason of a failure. It is empty if
/// there was no output.
async fn last_console_output(host: &Host, id: &VmId) -> String {
    let log = host.console_log(id);
    let read = blocking(move || {
        console_tail(&log, MAX_CONSOLE_TAIL).map_err(|error| ServiceError::Internal(error.to_string()))
    });
    match read.await {
        Ok(tail) if !tail.trim().is_empty() => format!("; last console output: {}", tail.trim()),
        Ok(_) => String::new(),
        Err(error) => {
            tracing::warn!(vm = %id, %error, "cannot read the console log");
            String::new()
        }
    }
}

/// Returns the error for a record that no release writes: it was edited by hand, or damaged.
fn unusable(record: &Record, field: &str, form: InvalidFormat) -> ServiceError {
    ServiceError::WrongState(format!(
        "cannot start VM {}: its recorded {field} {form}; create a template from it (snapshot), and a new VM from that template",
        record.id
    ))
}
