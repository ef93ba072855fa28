//! The QEMU `microvm` driver: launch and adopt.
//!
//! A machine is one QEMU process, controlled through the sockets in its [`RunDir`]. [`QemuMachine`]
//! is the handle.

use crate::accel::Accel;
use crate::confine::AllowedFiles;
use crate::confine::Confinement;
use crate::machine::{DiskLimits, Machine, MachineSpec, Vmm};
use crate::process::Process;
use crate::qemu::arguments::{DiskIo, TRANSLATION_CACHE_MIB, arguments, identifying_arguments, root_file};
use crate::qemu::binary::{PROGRAM, Qemu};
use crate::qemu::machine::{ClaimedProcess, ConnectError, QemuMachine};
use crate::run_dir::{Lock, Record, RunDir};
use crate::stderr::StderrPipe;
use crate::{Error, Result};
use async_trait::async_trait;
use qapi::qmp::{self, RunState};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use scalebox_units::{Bytes, VmId};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Memory that QEMU may use on top of the guest's, for program, libraries and I/O buffers. It needs
/// about 60 MiB.
const VMM_OVERHEAD: Bytes = Bytes::from_mib(256);
/// Timeout from QEMU's start to its control socket. QEMU reads the kernel and the initramfs first.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout for connecting to a running QEMU.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout from SIGKILL to the exit of a process. In between the kernel frees its memory and
/// completes its disk requests.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs machines as QEMU `microvm` processes.
///
/// A guest reboot restarts the machine in place, with the same process, disk and network
/// ([`MachineEvent::GuestReboot`](crate::MachineEvent::GuestReboot)). So does a kernel panic with
/// `panic=N` on the command line; without that parameter, a panicked guest stays as it is, for
/// inspection.
#[derive(Debug, Clone)]
pub struct QemuDriver {
    /// `None`: QEMU is not installed.
    qemu: Option<Qemu>,
    accel: Accel,
    confinement: Confinement,
}

impl QemuDriver {
    /// Finds QEMU on this host. Blocks while it runs QEMU once, for its version.
    ///
    /// # Errors
    /// [`Error::NotInstalled`], which names the package; [`Error::Unusable`] if QEMU is too old or
    /// does not run.
    pub fn find(accel: Accel) -> Result<QemuDriver> {
        Ok(QemuDriver {
            qemu: Some(Qemu::find()?),
            accel,
            confinement: Confinement::find(),
        })
    }

    /// Returns a driver for machines that were launched before QEMU was removed from this host. It
    /// cannot launch machines.
    pub fn without_program() -> QemuDriver {
        QemuDriver {
            qemu: None,
            accel: Accel::Tcg,
            confinement: Confinement::find(),
        }
    }

    /// Returns QEMU's version, such as `7.2.22`; `None` if it is not installed.
    pub fn version(&self) -> Option<&str> {
        self.qemu.as_ref().map(Qemu::version)
    }

    /// Launches a machine; undoes the previous steps if one fails.
    async fn start(self, spec: MachineSpec) -> Result<LaunchGuard> {
        let qemu = self.qemu.as_ref().ok_or(Error::NotInstalled { program: PROGRAM })?;
        spec.check()?;
        require_tap(&spec)?;
        let dir = RunDir::at(&spec.run_dir);
        let argv = arguments(&spec, &dir, self.accel, disk_io(root_file(&spec)?))?;
        let lock = lock_for_launch(&dir, &spec.id, &identifying_arguments(&spec.id, &dir)?)?;
        match self.spawn(qemu, &spec, &dir, lock, &argv) {
            Ok(claimed) => finish_launch(claimed, qemu.argv(&argv), spec.root_limits).await,
            Err(error) => {
                dir.clear();
                Err(error)
            }
        }
    }

    /// Spawns the process, stopped before the guest's first instruction.
    fn spawn(
        &self,
        qemu: &Qemu,
        spec: &MachineSpec,
        dir: &RunDir,
        lock: Lock,
        argv: &[String],
    ) -> Result<ClaimedProcess> {
        let root = root_file(spec)?.to_owned();
        let child_stderr = StderrPipe::create(&dir.stderr_pipe())?;
        let stderr = StderrPipe::open(&dir.stderr_pipe())?;
        let allowed = AllowedFiles {
            program: qemu.program().to_owned(),
            read: [&spec.kernel, &spec.seed]
                .into_iter()
                .chain(&spec.initrd)
                .cloned()
                .collect(),
            write: vec![root.clone()],
            sockets: spec.run_dir.clone(),
        };
        let overhead = match self.accel {
            Accel::Kvm => VMM_OVERHEAD,
            Accel::Tcg => VMM_OVERHEAD + Bytes::from_mib(TRANSLATION_CACHE_MIB),
        };
        let confined = self.confinement.prepare(spec, dir, Some(&allowed), overhead)?;
        let mut child = qemu
            .spawn(argv, confined, child_stderr)
            .map_err(|error| launch_error(&spec.id, error, ""))?;
        let process = match Process::of_child(&child) {
            Ok(process) => process,
            Err(error) => {
                // Killing by pid is safe without a pidfd: a child's pid is not reused before the
                // child is waited for.
                if let Err(error) = child.kill().and_then(|()| child.wait()) {
                    tracing::warn!(machine = %spec.id, %error, "cannot kill QEMU after a failed launch");
                }
                return Err(launch_error(&spec.id, error, ""));
            }
        };
        let console_log = spec.console_log.clone();
        Ok(ClaimedProcess {
            id: spec.id.clone(),
            dir: dir.clone(),
            lock,
            process,
            stderr,
            root,
            console_log,
        })
    }
}

#[async_trait]
impl Vmm for QemuDriver {
    fn name(&self) -> &'static str {
        "qemu"
    }

    /// The limit of the machine type `microvm`, since QEMU 4.2.
    fn max_vcpus(&self) -> u32 {
        288
    }

    fn can_launch(&self) -> bool {
        self.qemu.is_some()
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        // In a task of its own, so that a dropped future leaves no half-launched machine.
        match tokio::spawn(self.clone().start(spec.clone())).await {
            Ok(fresh) => Ok(fresh?.keep()),
            Err(error) => Err(launch_error(&spec.id, error, "")),
        }
    }

    async fn adopt(&self, id: &VmId, run_dir: &Path) -> Result<Option<Arc<dyn Machine>>> {
        let dir = RunDir::at(run_dir);
        let Some(lock) = dir.lock(id)? else { return Ok(None) };
        let Some((process, record)) = find_recorded(id, &dir, &identifying_arguments(id, &dir)?).await? else {
            dir.clear();
            return Ok(None);
        };
        let claimed = ClaimedProcess::from_record(process, record, &dir, lock, StderrPipe::open(&dir.stderr_pipe())?);
        let machine = match claimed.connect(ADOPT_TIMEOUT).await {
            Ok(machine) => machine,
            Err((claimed, ConnectError::Ended)) => {
                claimed.process.reap();
                dir.clear();
                return Ok(None);
            }
            Err((_, ConnectError::TimedOut(why))) => {
                tracing::warn!(machine = %id, why, "QEMU is running but does not respond");
                return Err(Error::Hung {
                    id: id.clone(),
                    command: "a new connection",
                    after: ADOPT_TIMEOUT,
                });
            }
        };
        match machine.execute("query-status", qmp::query_status {}).await?.status {
            RunState::prelaunch => {
                tracing::info!(machine = %id, "killing a machine whose launch was interrupted");
                let (pid, after) = (machine.pid(), EXIT_TIMEOUT);
                let timed_out = |_| Error::Unkillable {
                    id: id.clone(),
                    pid,
                    after,
                };
                timeout(EXIT_TIMEOUT, machine.kill()).await.map_err(timed_out)??;
                return Ok(None);
            }
            RunState::shutdown => machine.on_guest_shutdown(),
            _ => {}
        }
        Ok(Some(machine))
    }

    async fn force_stop(&self, id: &VmId, run_dir: &Path) -> Result<bool> {
        let dir = RunDir::at(run_dir);
        // The folder is created if it is missing: a process may still exist, and the lock prevents
        // a launch meanwhile.
        let _lock = dir.create_locked(id)?;
        let process = find_process(id, &dir, &identifying_arguments(id, &dir)?)?;
        if let Some(process) = &process {
            kill_and_wait(id, process).await?;
            tracing::info!(machine = %id, pid = process.pid(), "killed the process of a machine without a holder");
        }
        dir.clear();
        Ok(process.is_some())
    }
}

/// Connects to a newly spawned process and starts the guest. On an error, kills the process and
/// returns the cause.
async fn finish_launch(claimed: ClaimedProcess, argv: Vec<String>, limits: DiskLimits) -> Result<LaunchGuard> {
    if let Err(error) = claimed.write_record(argv) {
        return Err(abort_launch(claimed, &error.to_string()).await);
    }
    let machine = match claimed.connect(LAUNCH_TIMEOUT).await {
        Ok(machine) => machine,
        Err((claimed, ConnectError::Ended)) => return Err(abort_launch(claimed, "QEMU exited immediately").await),
        Err((claimed, ConnectError::TimedOut(why))) => return Err(abort_launch(claimed, &why).await),
    };
    // The limits are set before the guest's first instruction.
    let throttled = match limits == DiskLimits::default() {
        true => Ok(()),
        false => machine.limit_disk(limits).await,
    };
    let started = match throttled {
        Ok(()) => machine.execute("cont", qmp::cont {}).await.map(drop),
        Err(error) => Err(error),
    };
    if let Err(error) = started {
        let output = machine.stderr_text();
        machine.kill().await?;
        return Err(launch_error(machine.id(), error, &output));
    }
    let warnings = machine.stderr_text();
    if !warnings.is_empty() {
        tracing::warn!(machine = %machine.id(), warnings, "QEMU started with warnings");
    }
    Ok(LaunchGuard::new(machine))
}

/// Undoes a launch: kills the process and removes its files. Returns the launch error, with QEMU's
/// output.
async fn abort_launch(claimed: ClaimedProcess, why: &str) -> Error {
    let status = match kill_and_wait(&claimed.id, &claimed.process).await {
        Ok(status) => status.unwrap_or_default(),
        Err(error) => {
            return launch_error(
                &claimed.id,
                format!("{why}; in addition, {error}"),
                &claimed.stderr.text(),
            );
        }
    };
    let output = claimed.stderr.text();
    claimed.dir.clear();
    launch_error(&claimed.id, format!("{why} ({status})"), &output)
}

/// Kills a process that is known to be the machine's, and waits until it exits. Returns its exit
/// status, if available.
pub(crate) async fn kill_and_wait(id: &VmId, process: &Process) -> Result<Option<String>> {
    let (pid, after) = (process.pid(), EXIT_TIMEOUT);
    process.kill().map_err(Error::io("kill", format!("/proc/{pid}")))?;
    match timeout(after, process.exited()).await {
        Ok(()) => Ok(process.reap()),
        Err(_) => Err(Error::Unkillable {
            id: id.clone(),
            pid,
            after,
        }),
    }
}

pub(crate) fn launch_error(id: &VmId, why: impl ToString, output: &str) -> Error {
    Error::Launch {
        id: id.clone(),
        why: why.to_string(),
        output: output.to_owned(),
    }
}

/// A launched machine that is killed on drop, unless it is kept.
struct LaunchGuard {
    machine: Arc<QemuMachine>,
    kept: bool,
}

impl LaunchGuard {
    fn new(machine: Arc<QemuMachine>) -> LaunchGuard {
        LaunchGuard { machine, kept: false }
    }

    fn keep(mut self) -> Arc<QemuMachine> {
        self.kept = true;
        self.machine.clone()
    }
}

impl Drop for LaunchGuard {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let machine = self.machine.clone();
        tracing::info!(machine = %machine.id(), "launch cancelled; killing the machine");
        tokio::spawn(async move {
            if let Err(error) = machine.kill().await {
                tracing::warn!(machine = %machine.id(), %error, "cannot kill a machine after a cancelled launch");
            }
        });
    }
}

/// Locks the folder for a launch and removes leftover files. Fails if the machine is running.
pub(crate) fn lock_for_launch(dir: &RunDir, id: &VmId, arguments: &[String]) -> Result<Lock> {
    let lock = dir.create_locked(id)?;
    if let Some(process) = find_process(id, dir, arguments)? {
        return Err(Error::Running {
            id: id.clone(),
            pid: Some(process.pid()),
        });
    }
    dir.clear_files();
    Ok(lock)
}

/// Returns the machine's process, recorded or not, if it is alive.
pub(crate) fn find_process(id: &VmId, dir: &RunDir, arguments: &[String]) -> Result<Option<Process>> {
    let recorded = match dir.read(id)? {
        Some(record) => Process::find(&record.process),
        None => Process::search(arguments),
    };
    recorded.map_err(Error::io("read", "/proc"))
}

/// Returns the machine's process and its record. Kills a process that was not recorded yet.
pub(crate) async fn find_recorded(id: &VmId, dir: &RunDir, arguments: &[String]) -> Result<Option<(Process, Record)>> {
    let Some(process) = find_process(id, dir, arguments)? else {
        return Ok(None);
    };
    let Some(record) = dir.read(id)? else {
        tracing::info!(machine = %id, pid = process.pid(), "killing a machine whose launch was interrupted");
        kill_and_wait(id, &process).await?;
        return Ok(None);
    };
    // `VMM` was changed while the machine ran: a machine of another driver must neither be adopted
    // nor count as dead.
    if !arguments.iter().all(|argument| record.process.argv.contains(argument)) {
        return Err(Error::Foreign {
            id: id.clone(),
            program: record.process.argv.into_iter().next().unwrap_or_default(),
        });
    }
    Ok(Some((process, record)))
}

/// Checks that the tap exists: QEMU would create a missing tap, connected to nothing.
pub(crate) fn require_tap(spec: &MachineSpec) -> Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).map_err(std::io::Error::from);
    let found = socket.and_then(|socket| Ok(name_to_index(socket, &spec.nic.tap)?));
    found.map(drop).map_err(|error| Error::Spec {
        id: spec.id.clone(),
        what: "nic.tap",
        why: format!("no interface {}: {error}", spec.nic.tap),
    })
}

/// Returns direct I/O, unless the file system does not support it (some network and memory file
/// systems). QEMU reports any other error.
fn disk_io(file: &Path) -> DiskIo {
    match open(file, OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::INVAL) => {
            tracing::info!(file = %file.display(), "this file system does not support direct I/O; using the host's page cache");
            DiskIo::Buffered
        }
        _ => DiskIo::Direct,
    }
}
