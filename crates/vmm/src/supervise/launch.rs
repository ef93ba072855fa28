//! Launches a machine's process, each step with its undo.

use crate::confine::Confined;
use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::process::Process;
use crate::run_dir::{Lock, RunDir};
use crate::spec::MachineSpec;
use crate::stderr::StderrPipe;
use crate::supervise::claim::{ClaimedProcess, find_process};
use crate::supervise::driver::Driver;
use crate::supervise::kill::kill_and_wait;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use scalebox_units::VmId;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// Interval between attempts to connect to a new process: no event announces a new socket.
pub(crate) const CONNECT_INTERVAL: Duration = Duration::from_millis(5);

/// Runs a launch in a task of its own, so that a dropped future leaves no half-launched machine.
pub(crate) async fn launch<M: Machine + 'static>(
    id: &VmId,
    steps: impl Future<Output = Result<LaunchGuard<M>>> + Send + 'static,
) -> Result<Arc<dyn Machine>> {
    match tokio::spawn(steps).await {
        Ok(launched) => Ok(launched?.keep()),
        Err(error) => Err(Error::launch(id, error, "")),
    }
}

/// A launched machine that is killed on drop, unless it is kept.
pub(crate) struct LaunchGuard<M: Machine + 'static> {
    machine: Arc<M>,
    kept: bool,
}

impl<M: Machine + 'static> LaunchGuard<M> {
    pub(crate) fn new(machine: Arc<M>) -> LaunchGuard<M> {
        LaunchGuard { machine, kept: false }
    }

    fn keep(mut self) -> Arc<M> {
        self.kept = true;
        self.machine.clone()
    }
}

impl<M: Machine + 'static> Drop for LaunchGuard<M> {
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

/// Locks the machine's folder, then starts its process with `start`. Removes all files if that
/// fails. Blocks.
///
/// `start` returns the process, this process' end of its stderr, and anything else.
///
/// # Errors
/// [`Error::Running`] if the machine is running or has a holder; [`Error::Spec`]; the errors of
/// `start`.
pub(crate) fn start_claimed<T>(
    driver: &impl Driver,
    spec: &MachineSpec,
    start: impl FnOnce(&RunDir) -> Result<(Process, StderrPipe, T)>,
) -> Result<(ClaimedProcess, T)> {
    let root = spec.root_file()?.to_owned();
    let dir = RunDir::at(&spec.run_dir);
    let lock = lock_for_launch(&dir, &spec.id, &driver.identifying_arguments(&spec.id, &dir)?)?;
    match start(&dir) {
        Ok((process, stderr, other)) => {
            let claimed = ClaimedProcess {
                id: spec.id.clone(),
                dir,
                lock,
                process,
                stderr,
                root,
                console_log: spec.console_log.clone(),
            };
            Ok((claimed, other))
        }
        Err(error) => {
            driver.remove_other_files(&spec.id);
            dir.clear();
            Err(error)
        }
    }
}

/// Locks the folder for a launch and removes leftover files. Fails if the machine is running.
fn lock_for_launch(dir: &RunDir, id: &VmId, arguments: &[String]) -> Result<Lock> {
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

/// Starts a machine's process, detached from this process' terminal. Blocks.
///
/// It has no environment and no open file except `stdout` and `stderr`. It is not waited for, and
/// survives the end of this process.
pub(crate) fn spawn(
    id: &VmId,
    mut command: Command,
    mut confined: Confined,
    stdout: File,
    stderr: File,
) -> Result<Process> {
    command
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr);
    // SAFETY: between fork and exec the closure makes system calls only: it allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(move || confined.enter()) };
    let mut child = command.spawn().map_err(|error| Error::launch(id, error, ""))?;
    Process::of_child(&child).map_err(|error| {
        // Killing by pid is safe without a pidfd: a child's pid is not reused before the child is
        // waited for.
        if let Err(error) = child.kill().and_then(|()| child.wait()) {
            tracing::warn!(machine = %id, %error, "cannot kill the hypervisor after a failed launch");
        }
        Error::launch(id, error, "")
    })
}

/// Undoes a launch: kills the process and removes its files. Returns the launch error, with the
/// hypervisor's output.
///
/// A process that cannot be killed keeps its files, by which it is found again.
pub(crate) async fn undo_launch(driver: &impl Driver, claimed: ClaimedProcess, why: &str) -> Error {
    match kill_and_wait(&claimed.id, &claimed.process).await {
        Ok(status) => {
            let why = format!("{why} ({})", status.unwrap_or_default());
            let error = Error::launch(&claimed.id, why, &claimed.stderr.text());
            claimed.remove_files(driver).await;
            error
        }
        Err(error) => {
            let why = format!("{why}; in addition, {error}");
            Error::launch(&claimed.id, why, &claimed.stderr.text())
        }
    }
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
