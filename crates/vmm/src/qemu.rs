//! The QEMU `microvm` driver: launch and adopt.
//!
//! A machine is one QEMU process, controlled through the sockets in its [`RunDir`]; [`QemuMachine`]
//! is how it is held.

use crate::accel::Accel;
use crate::arguments::{DiskIo, TRANSLATION_CACHE_MIB, arguments, identity, root_file};
use crate::command::{PROGRAM, Qemu};
use crate::confinement::Confinement;
use crate::machine::{DiskLimits, Machine, MachineId, MachineSpec, Vmm};
use crate::messages::Messages;
use crate::process::Process;
use crate::qemu_machine::{Held, QemuMachine, Unreached};
use crate::run_dir::{Lock, Record, RunDir};
use crate::sandbox::Needed;
use crate::{Error, Result};
use async_trait::async_trait;
use qapi::qmp::{self, RunState};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use scalebox_units::Bytes;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// The memory that QEMU may take for itself: program, libraries, buffers of requests under way. It
/// needs about 60 MiB.
const BESIDE_GUEST: Bytes = Bytes::from_mib(256);
/// The longest from QEMU's start to its control socket: it reads the kernel and initramfs before.
const LAUNCH_DEADLINE: Duration = Duration::from_secs(30);
/// The longest that a running QEMU may keep its adopter waiting.
const ADOPT_DEADLINE: Duration = Duration::from_secs(10);
/// The longest from SIGKILL to a process' end: it gives back its memory, and the kernel finishes
/// its disk requests.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// Machines as QEMU `microvm` processes.
///
/// A guest's reboot restarts the machine in place: same process, same disk, same network
/// ([`MachineEvent::GuestReboot`](crate::MachineEvent::GuestReboot)). So does a kernel panic with
/// `panic=N` on the command line; without, a panicked guest stands still, and is there to be looked
/// at.
#[derive(Debug, Clone)]
pub struct QemuDriver {
    /// `None`: it is not installed.
    qemu: Option<Qemu>,
    accel: Accel,
    confinement: Confinement,
}

impl QemuDriver {
    /// Looks for QEMU on this host. Runs it once, for its version; blocks for that long.
    ///
    /// # Errors
    /// [`Error::NotInstalled`] with the package to install; [`Error::Unusable`] when it is too old
    /// or does not run.
    pub fn find(accel: Accel) -> Result<QemuDriver> {
        Ok(QemuDriver {
            qemu: Some(Qemu::find()?),
            accel,
            confinement: Confinement::find(),
        })
    }

    /// The driver of machines that were launched before QEMU was removed from this host: it
    /// launches none.
    pub fn without_program() -> QemuDriver {
        QemuDriver {
            qemu: None,
            accel: Accel::Tcg,
            confinement: Confinement::find(),
        }
    }

    /// QEMU's version, such as `7.2.22`; `None` where it is not installed.
    pub fn version(&self) -> Option<&str> {
        self.qemu.as_ref().map(Qemu::version)
    }

    /// Launches; undoes what was done when a step fails.
    async fn start(self, spec: MachineSpec) -> Result<Fresh> {
        let qemu = self.qemu.as_ref().ok_or(Error::NotInstalled { program: PROGRAM })?;
        spec.check()?;
        need_tap(&spec)?;
        let dir = RunDir::at(&spec.run_dir);
        let argv = arguments(&spec, &dir, self.accel, disk_io(root_file(&spec)?))?;
        let lock = claim(&dir, &spec.id, &identity(&spec.id, &dir)?)?;
        match self.spawn(qemu, &spec, &dir, lock, &argv) {
            Ok(held) => bring_up(held, qemu.argv(&argv), spec.root_limits).await,
            Err(error) => {
                dir.clear();
                Err(error)
            }
        }
    }

    /// The process, on record; stopped before the guest's first instruction.
    fn spawn(&self, qemu: &Qemu, spec: &MachineSpec, dir: &RunDir, lock: Lock, argv: &[String]) -> Result<Held> {
        let root = root_file(spec)?.to_owned();
        let theirs = Messages::create(&dir.messages())?;
        let messages = Messages::open(&dir.messages())?;
        let needed = Needed {
            program: qemu.program().to_owned(),
            read: [&spec.kernel, &spec.seed]
                .into_iter()
                .chain(&spec.initrd)
                .cloned()
                .collect(),
            write: vec![root.clone()],
            sockets: spec.run_dir.clone(),
        };
        let beside_guest = match self.accel {
            Accel::Kvm => BESIDE_GUEST,
            Accel::Tcg => BESIDE_GUEST + Bytes::from_mib(TRANSLATION_CACHE_MIB),
        };
        let confined = self.confinement.prepare(spec, dir, Some(&needed), beside_guest)?;
        let mut child = qemu
            .spawn(argv, confined, theirs)
            .map_err(|error| failed(&spec.id, error, ""))?;
        let process = match Process::of_child(&child) {
            Ok(process) => process,
            Err(error) => {
                // Without a pidfd the pid will do: until it is waited for, it is nobody else's.
                if let Err(error) = child.kill().and_then(|()| child.wait()) {
                    tracing::warn!(machine = %spec.id, %error, "QEMU not killed after a failed launch");
                }
                return Err(failed(&spec.id, error, ""));
            }
        };
        let console_log = spec.console_log.clone();
        Ok(Held {
            id: spec.id.clone(),
            dir: dir.clone(),
            lock,
            process,
            messages,
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

    /// Of its machine type `microvm`, since QEMU 4.2.
    fn max_vcpus(&self) -> u32 {
        288
    }

    fn can_launch(&self) -> bool {
        self.qemu.is_some()
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        // In a task of its own, so that a caller who goes away leaves no half-launched machine.
        match tokio::spawn(self.clone().start(spec.clone())).await {
            Ok(fresh) => Ok(fresh?.keep()),
            Err(error) => Err(failed(&spec.id, error, "")),
        }
    }

    async fn adopt(&self, id: &MachineId, run_dir: &Path) -> Result<Option<Arc<dyn Machine>>> {
        let dir = RunDir::at(run_dir);
        let Some(lock) = dir.lock(id)? else { return Ok(None) };
        let Some((process, record)) = find(id, &dir, &identity(id, &dir)?).await? else {
            dir.clear();
            return Ok(None);
        };
        let held = Held::again(process, record, &dir, lock, Messages::open(&dir.messages())?);
        let machine = match held.connect(ADOPT_DEADLINE).await {
            Ok(machine) => machine,
            Err((held, Unreached::Ended)) => {
                held.process.reap();
                dir.clear();
                return Ok(None);
            }
            Err((_, Unreached::Late(why))) => {
                tracing::warn!(machine = %id, why, "QEMU runs, but does not answer");
                return Err(Error::Hung {
                    id: id.clone(),
                    command: "a new connection",
                    after: ADOPT_DEADLINE,
                });
            }
        };
        match machine.execute("query-status", qmp::query_status {}).await?.status {
            RunState::prelaunch => {
                tracing::info!(machine = %id, "its launch was interrupted: killed");
                let (pid, after) = (machine.pid(), END_DEADLINE);
                let unkillable = |_| Error::Unkillable {
                    id: id.clone(),
                    pid,
                    after,
                };
                timeout(END_DEADLINE, machine.kill()).await.map_err(unkillable)??;
                return Ok(None);
            }
            RunState::shutdown => machine.guest_has_shut_down(),
            _ => {}
        }
        Ok(Some(machine))
    }

    async fn put_down(&self, id: &MachineId, run_dir: &Path) -> Result<bool> {
        let dir = RunDir::at(run_dir);
        // Made where it is missing, for its process may live all the same: and nobody launches it
        // meanwhile.
        let _lock = dir.create_locked(id)?;
        let process = running(id, &dir, &identity(id, &dir)?)?;
        if let Some(process) = &process {
            end(id, process).await?;
            tracing::info!(machine = %id, pid = process.pid(), "put down");
        }
        dir.clear();
        Ok(process.is_some())
    }
}

/// Connects to a process just spawned, and lets the guest go; or kills the process and says why.
async fn bring_up(held: Held, argv: Vec<String>, limits: DiskLimits) -> Result<Fresh> {
    if let Err(error) = held.record(argv) {
        return Err(undo(held, &error.to_string()).await);
    }
    let machine = match held.connect(LAUNCH_DEADLINE).await {
        Ok(machine) => machine,
        Err((held, Unreached::Ended)) => return Err(undo(held, "QEMU ended at once").await),
        Err((held, Unreached::Late(why))) => return Err(undo(held, &why).await),
    };
    // The guest's first instruction comes after this.
    let limited = match limits == DiskLimits::default() {
        true => Ok(()),
        false => machine.limit_disk(limits).await,
    };
    let started = match limited {
        Ok(()) => machine.execute("cont", qmp::cont {}).await.map(drop),
        Err(error) => Err(error),
    };
    if let Err(error) = started {
        let output = machine.messages();
        machine.kill().await?;
        return Err(failed(machine.id(), error, &output));
    }
    let warnings = machine.messages();
    if !warnings.is_empty() {
        tracing::warn!(machine = %machine.id(), warnings, "QEMU started with warnings");
    }
    Ok(Fresh::new(machine))
}

/// Undoes a launch: no process, no files. Returns what went wrong, with QEMU's words.
async fn undo(held: Held, why: &str) -> Error {
    let status = match end(&held.id, &held.process).await {
        Ok(status) => status.unwrap_or_default(),
        Err(error) => return failed(&held.id, format!("{why}; and {error}"), &held.messages.text()),
    };
    let output = held.messages.text();
    held.dir.clear();
    failed(&held.id, format!("{why} ({status})"), &output)
}

/// Kills a process that is known to be the machine's and waits for its end. Returns its exit
/// status, where that is ours to know.
pub(crate) async fn end(id: &MachineId, process: &Process) -> Result<Option<String>> {
    let (pid, after) = (process.pid(), END_DEADLINE);
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

pub(crate) fn failed(id: &MachineId, why: impl ToString, output: &str) -> Error {
    Error::Launch {
        id: id.clone(),
        why: why.to_string(),
        output: output.to_owned(),
    }
}

/// A launched machine that nobody has taken yet: killed when dropped.
struct Fresh {
    machine: Arc<QemuMachine>,
    kept: bool,
}

impl Fresh {
    fn new(machine: Arc<QemuMachine>) -> Fresh {
        Fresh { machine, kept: false }
    }

    fn keep(mut self) -> Arc<QemuMachine> {
        self.kept = true;
        self.machine.clone()
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let machine = self.machine.clone();
        tracing::info!(machine = %machine.id(), "launch cancelled: killed");
        tokio::spawn(async move {
            if let Err(error) = machine.kill().await {
                tracing::warn!(machine = %machine.id(), %error, "not killed after a cancelled launch");
            }
        });
    }
}

/// Takes the folder for a launch, unless the machine runs. What a dead one left is removed.
pub(crate) fn claim(dir: &RunDir, id: &MachineId, marks: &[String]) -> Result<Lock> {
    let lock = dir.create_locked(id)?;
    if let Some(process) = running(id, dir, marks)? {
        return Err(Error::Running {
            id: id.clone(),
            pid: Some(process.pid()),
        });
    }
    dir.clear_files();
    Ok(lock)
}

/// The machine's process, recorded or not, that an earlier holder left.
pub(crate) fn running(id: &MachineId, dir: &RunDir, marks: &[String]) -> Result<Option<Process>> {
    let recorded = match dir.read(id)? {
        Some(record) => Process::find(&record.process),
        None => Process::search(marks),
    };
    recorded.map_err(Error::io("read", "/proc"))
}

/// The machine's process that an earlier holder left, with its record. One that it did not get to
/// put on record is killed.
pub(crate) async fn find(id: &MachineId, dir: &RunDir, marks: &[String]) -> Result<Option<(Process, Record)>> {
    let Some(process) = running(id, dir, marks)? else {
        return Ok(None);
    };
    let Some(record) = dir.read(id)? else {
        tracing::info!(machine = %id, pid = process.pid(), "its launch was interrupted: killed");
        end(id, &process).await?;
        return Ok(None);
    };
    // Another driver's machine is neither adopted nor ended by mistake: `VMM` was changed while it
    // ran.
    if !marks.iter().all(|mark| record.process.argv.contains(mark)) {
        return Err(Error::Foreign {
            id: id.clone(),
            program: record.process.argv.into_iter().next().unwrap_or_default(),
        });
    }
    Ok(Some((process, record)))
}

/// QEMU would make a tap that is missing, connected to nothing.
pub(crate) fn need_tap(spec: &MachineSpec) -> Result<()> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).map_err(std::io::Error::from);
    let found = any.and_then(|any| Ok(name_to_index(any, &spec.nic.tap)?));
    found.map(drop).map_err(|error| Error::Spec {
        id: spec.id.clone(),
        what: "nic.tap",
        why: format!("there is no interface {}: {error}", spec.nic.tap),
    })
}

/// Direct, unless the file system cannot (some network and memory file systems). Any other fault is
/// for QEMU to report.
fn disk_io(file: &Path) -> DiskIo {
    match open(file, OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::INVAL) => {
            tracing::info!(file = %file.display(), "no direct I/O on this file system: the host's page cache is used");
            DiskIo::Buffered
        }
        _ => DiskIo::Direct,
    }
}
