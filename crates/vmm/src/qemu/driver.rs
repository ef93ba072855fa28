//! The QEMU `microvm` driver: launch and adopt.
//!
//! A machine is one QEMU process, controlled through the sockets in its [`RunDir`]. [`QemuMachine`]
//! is the handle.

use crate::accel::Accel;
use crate::blocking::blocking;
use crate::confine::{AllowedFiles, Confinement};
use crate::error::{Error, Result};
use crate::machine::{Machine, Vmm};
use crate::process::Process;
use crate::qemu::arguments::{DiskIo, TRANSLATION_CACHE_MIB, arguments, identifying_arguments};
use crate::qemu::binary::{NOT_INSTALLED, Qemu};
use crate::qemu::machine::{ConnectError, QemuMachine, connect};
use crate::run_dir::RunDir;
use crate::spec::{DiskLimits, MachineSpec};
use crate::stderr::StderrPipe;
use crate::supervise::{
    self, ClaimedProcess, Driver, LaunchGuard, require_tap, start_claimed, undo_launch, within_exit_timeout,
};
use async_trait::async_trait;
use qapi::qmp::{self, RunState};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use scalebox_units::{Bytes, VmId};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Memory that QEMU may use on top of the guest's, for program, libraries and I/O buffers. It needs
/// about 60 MiB.
const VMM_OVERHEAD: Bytes = Bytes::from_mib(256);
/// Timeout from QEMU's start to its control socket. QEMU reads the kernel and the initramfs first.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout for connecting to a running QEMU.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs machines as QEMU `microvm` processes.
///
/// A guest reboot restarts the machine in place, with the same process, disk and network
/// ([`MachineEvent::GuestReboot`](crate::MachineEvent::GuestReboot)). So does a kernel panic with
/// `panic=N` on the command line; without that parameter, a panicked guest stays as it is, for
/// inspection.
#[derive(Debug, Clone)]
pub struct QemuDriver {
    /// The installed QEMU; `None` if it is not installed.
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
    async fn start(self, spec: MachineSpec) -> Result<LaunchGuard<QemuMachine>> {
        let (driver, limits) = (self.clone(), spec.root_limits);
        let (claimed, recorded) = blocking(move || driver.start_process(&spec)).await?;
        match recorded {
            Ok(()) => self.finish_launch(claimed, limits).await,
            Err(error) => Err(undo_launch(&self, claimed, &error.to_string()).await),
        }
    }

    /// Starts the process, stopped before the guest's first instruction, and writes its record.
    /// Returns the result of the latter separately, because the process must be killed if it
    /// failed. Blocks.
    fn start_process(&self, spec: &MachineSpec) -> Result<(ClaimedProcess, io::Result<()>)> {
        let qemu = self.qemu.as_ref().ok_or(NOT_INSTALLED)?;
        spec.check()?;
        require_tap(spec)?;
        let io = disk_io(spec.root_file()?);
        let argv = arguments(spec, &RunDir::at(&spec.run_dir), self.accel, io)?;
        let (claimed, ()) = start_claimed(self, spec, |dir| {
            let (process, stderr) = self.spawn(qemu, spec, dir, &argv)?;
            Ok((process, stderr, ()))
        })?;
        let recorded = claimed.write_record(qemu.argv(&argv));
        Ok((claimed, recorded))
    }

    fn spawn(&self, qemu: &Qemu, spec: &MachineSpec, dir: &RunDir, argv: &[String]) -> Result<(Process, StderrPipe)> {
        let child_stderr = StderrPipe::create(&dir.stderr_pipe())?;
        let child_stdout = child_stderr.try_clone().map_err(Error::io("open", dir.stderr_pipe()))?;
        let stderr = StderrPipe::open(&dir.stderr_pipe())?;
        let allowed = AllowedFiles {
            program: qemu.program().to_owned(),
            read: [&spec.kernel, &spec.seed]
                .into_iter()
                .chain(&spec.initrd)
                .chain(&spec.modules)
                .cloned()
                .collect(),
            write: vec![spec.root_file()?.to_owned()],
            sockets: spec.run_dir.clone(),
        };
        let overhead = match self.accel {
            Accel::Kvm => VMM_OVERHEAD,
            Accel::Tcg => VMM_OVERHEAD + Bytes::from_mib(TRANSLATION_CACHE_MIB),
        };
        let confined = self.confinement.prepare(spec, dir, Some(&allowed), overhead)?;
        let process = supervise::spawn(&spec.id, qemu.command(argv), confined, child_stdout, child_stderr)?;
        Ok((process, stderr))
    }

    /// Connects to a newly started process and starts the guest. On an error, kills the process and
    /// returns the cause.
    async fn finish_launch(&self, claimed: ClaimedProcess, limits: DiskLimits) -> Result<LaunchGuard<QemuMachine>> {
        let machine = match connect(claimed, LAUNCH_TIMEOUT).await {
            Ok(machine) => machine,
            Err((claimed, why)) => {
                let why = match why {
                    ConnectError::Ended => "QEMU exited immediately".to_owned(),
                    ConnectError::TimedOut(why) => why,
                };
                return Err(undo_launch(self, claimed, &why).await);
            }
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
            return Err(Error::launch(machine.id(), error, &output));
        }
        let warnings = machine.stderr_text();
        if !warnings.is_empty() {
            tracing::warn!(machine = %machine.id(), warnings, "QEMU started with warnings");
        }
        Ok(LaunchGuard::new(machine))
    }
}

impl Driver for QemuDriver {
    fn identifying_arguments(&self, id: &VmId, dir: &RunDir) -> Result<Vec<String>> {
        Ok(identifying_arguments(id, dir)?.to_vec())
    }

    fn stderr_pipe(&self, _id: &VmId, dir: &RunDir) -> Result<PathBuf> {
        Ok(dir.stderr_pipe())
    }
}

#[async_trait]
impl Vmm for QemuDriver {
    fn name(&self) -> &'static str {
        "qemu"
    }

    /// Returns the limit of the machine type `microvm`, since QEMU 4.2.
    fn max_vcpus(&self) -> u32 {
        288
    }

    fn can_launch(&self) -> bool {
        self.qemu.is_some()
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        supervise::launch(&spec.id, self.clone().start(spec.clone())).await
    }

    async fn adopt(&self, id: &VmId, run_dir: &Path) -> Result<Option<Arc<dyn Machine>>> {
        let Some(claimed) = supervise::claim(self, id, run_dir).await? else {
            return Ok(None);
        };
        let machine = match connect(claimed, ADOPT_TIMEOUT).await {
            Ok(machine) => machine,
            Err((claimed, ConnectError::Ended)) => {
                claimed.process.reap();
                claimed.remove_files(self).await;
                return Ok(None);
            }
            Err((_, ConnectError::TimedOut(why))) => {
                tracing::warn!(machine = %id, why, "QEMU is running but does not respond");
                return Err(Error::unreachable(id, ADOPT_TIMEOUT));
            }
        };
        match machine.execute("query-status", qmp::query_status {}).await?.status {
            RunState::prelaunch => {
                tracing::info!(machine = %id, "killing a machine whose launch was interrupted");
                within_exit_timeout(id, machine.pid(), machine.kill()).await??;
                return Ok(None);
            }
            RunState::shutdown => machine.on_guest_shutdown(),
            _ => {}
        }
        Ok(Some(machine))
    }

    async fn force_stop(&self, id: &VmId, run_dir: &Path) -> Result<bool> {
        supervise::force_stop(self, id, run_dir).await
    }
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
