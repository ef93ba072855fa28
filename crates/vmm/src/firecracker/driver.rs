//! The Firecracker driver: launch and adopt.
//!
//! A machine is one Firecracker process, confined by its jailer to a folder (`jail`) and controlled
//! through the API socket there. [`FirecrackerMachine`] is the handle. `docs/firecracker.md` lists
//! what this driver cannot guarantee, compared to QEMU.

use crate::confine::Confinement;
use crate::firecracker::api::{Api, ApiError, RESPONSE_TIMEOUT};
use crate::firecracker::binary::{Firecracker, PROGRAM, identifying_arguments};
use crate::firecracker::jail::{self, Jail, Jails, change_owner};
use crate::firecracker::machine::FirecrackerMachine;
use crate::machine::{Machine, MachineSpec, RunAs, Vmm};
use crate::process::Process;
use crate::qemu::arguments::root_file;
use crate::qemu::driver::{find_process, find_recorded, kill_and_wait, launch_error, lock_for_launch, require_tap};
use crate::qemu::machine::ClaimedProcess;
use crate::run_dir::{Lock, RunDir};
use crate::stderr::StderrPipe;
use crate::{Error, Result};
use async_trait::async_trait;
use scalebox_units::{Bytes, VmId};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep};

/// Memory that Firecracker may use on top of the guest's. It needs a few MiB, and reads the kernel
/// and the initramfs.
const VMM_OVERHEAD: Bytes = Bytes::from_mib(128);
/// Timeout from the process' start to its first response.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between connection attempts: no event announces a new socket.
const CONNECT_INTERVAL: Duration = Duration::from_millis(5);
/// The state that Firecracker reports for a machine that is configured but not started.
const NOT_STARTED: &str = "Not started";

/// Runs machines as Firecracker processes, with KVM.
///
/// A guest reboot ends the machine
/// ([`ExitReason::GuestShutdown`](crate::ExitReason::GuestShutdown)): Firecracker cannot restart a
/// guest.
#[derive(Debug, Clone)]
pub struct FirecrackerDriver {
    /// `None`: Firecracker is not installed.
    firecracker: Option<Firecracker>,
    jails: Jails,
    confinement: Confinement,
}

impl FirecrackerDriver {
    /// Finds Firecracker and its jailer on this host. Blocks while it runs Firecracker once, for
    /// its version.
    ///
    /// The folder `jails` is created at the first launch. It must be on the file system of the
    /// machines' disks.
    ///
    /// # Errors
    /// [`Error::NoFirecracker`]; [`Error::Unusable`] if it is too old, cannot be jailed or does not
    /// run.
    pub fn find(jails: &Path) -> Result<FirecrackerDriver> {
        let firecracker = Firecracker::find()?;
        Ok(FirecrackerDriver {
            jails: firecracker.jails(jails),
            firecracker: Some(firecracker),
            confinement: Confinement::find(),
        })
    }

    /// Returns a driver for machines that were launched before Firecracker was removed from this
    /// host. It cannot launch machines.
    pub fn without_program(jails: &Path) -> FirecrackerDriver {
        FirecrackerDriver {
            jails: Jails::new(jails, PROGRAM.into()),
            firecracker: None,
            confinement: Confinement::find(),
        }
    }

    /// Returns Firecracker's version, such as `1.16.1`; `None` if it is not installed.
    pub fn version(&self) -> Option<&str> {
        self.firecracker.as_ref().map(Firecracker::version)
    }

    /// Launches a machine; undoes the previous steps if one fails.
    async fn start(self, spec: MachineSpec) -> Result<LaunchGuard> {
        let firecracker = self.firecracker.as_ref().ok_or(Error::NoFirecracker(PROGRAM))?;
        spec.check()?;
        require_tap(&spec)?;
        firecracker.check_kernel(&spec)?;
        let dir = RunDir::at(&spec.run_dir);
        let lock = lock_for_launch(&dir, &spec.id, &identifying_arguments(spec.id.as_str()))?;
        let launched = match self.spawn(firecracker, &spec, &dir, lock) {
            Ok((claimed, jail, console)) => finish_launch(&spec, claimed, jail, console).await,
            Err(error) => Err(error),
        };
        match launched {
            Ok(guard) => Ok(guard),
            Err(error) => {
                // A process that could not be killed keeps its files, by which it is found again.
                if !matches!(error, Error::Unkillable { .. }) {
                    self.jails.remove(&spec.id);
                    dir.clear();
                }
                Err(error)
            }
        }
    }

    /// Creates the jail and spawns the process in it. Returns process, jail and console.
    fn spawn(
        &self,
        firecracker: &Firecracker,
        spec: &MachineSpec,
        dir: &RunDir,
        lock: Lock,
    ) -> Result<(ClaimedProcess, Jail, pipe::Receiver)> {
        let root = root_file(spec)?.to_owned();
        let account = spec.run_as.unwrap_or_else(own_account);
        let jail = self.jails.make(spec, &root, account)?;
        let child_stderr = StderrPipe::create(&jail.path(jail::STDERR_PIPE))?;
        change_owner(&jail.path(jail::STDERR_PIPE), account)?;
        let stderr = StderrPipe::open(&jail.path(jail::STDERR_PIPE))?;
        let console_end = StderrPipe::create(&dir.console_pipe())?;
        let console = open_console(dir)?;
        // No Landlock rules, unlike for QEMU: they would forbid the mounts that create a jail. And
        // inside the jail there are no other files.
        let confined = self.confinement.prepare(spec, dir, None, VMM_OVERHEAD)?;
        let mut child = firecracker
            .spawn(
                spec.id.as_str(),
                &self.jails,
                account,
                confined,
                console_end,
                child_stderr,
            )
            .map_err(|error| launch_error(&spec.id, error, ""))?;
        let process = match Process::of_child(&child) {
            Ok(process) => process,
            Err(error) => {
                // Killing by pid is safe without a pidfd: a child's pid is not reused before the
                // child is waited for.
                if let Err(error) = child.kill().and_then(|()| child.wait()) {
                    tracing::warn!(machine = %spec.id, %error, "cannot kill Firecracker after a failed launch");
                }
                return Err(launch_error(&spec.id, error, ""));
            }
        };
        let claimed = ClaimedProcess {
            id: spec.id.clone(),
            dir: dir.clone(),
            lock,
            process,
            stderr,
            root,
            console_log: spec.console_log.clone(),
        };
        Ok((claimed, jail, console))
    }

    /// Removes all files of a machine whose process is gone.
    fn remove_files(&self, id: &VmId, dir: &RunDir) {
        self.jails.remove(id);
        dir.clear();
    }
}

#[async_trait]
impl Vmm for FirecrackerDriver {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    /// `MAX_SUPPORTED_VCPUS`, the limit of Firecracker's `PUT /machine-config`.
    fn max_vcpus(&self) -> u32 {
        32
    }

    fn can_launch(&self) -> bool {
        self.firecracker.is_some()
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
        let Some((process, record)) = find_recorded(id, &dir, &identifying_arguments(id.as_str())).await? else {
            self.remove_files(id, &dir);
            return Ok(None);
        };
        // The jail of a running process was removed: the process can no longer be reached.
        let jail = self.jails.of(id)?.ok_or_else(|| hung(id))?;
        let stderr = StderrPipe::open(&jail.path(jail::STDERR_PIPE))?;
        let claimed = ClaimedProcess::from_record(process, record, &dir, lock, stderr);
        let api = Api::at(&jail.path(jail::API));
        match api.state().await {
            Ok(state) if state != NOT_STARTED => {}
            Ok(_) => {
                tracing::info!(machine = %id, "killing a machine whose launch was interrupted");
                kill_and_wait(id, &claimed.process).await?;
                self.remove_files(id, &dir);
                return Ok(None);
            }
            Err(error) if claimed.process.is_alive() => {
                tracing::warn!(machine = %id, %error, "Firecracker is running but does not respond");
                return Err(hung(id));
            }
            Err(_) => {
                self.remove_files(id, &dir);
                return Ok(None);
            }
        }
        let console = open_console(&dir)?;
        Ok(Some(FirecrackerMachine::new(claimed, jail, api, console)))
    }

    async fn force_stop(&self, id: &VmId, run_dir: &Path) -> Result<bool> {
        let dir = RunDir::at(run_dir);
        // The folder is created if it is missing: a process may still exist, and the lock prevents
        // a launch meanwhile.
        let _lock = dir.create_locked(id)?;
        let process = find_process(id, &dir, &identifying_arguments(id.as_str()))?;
        if let Some(process) = &process {
            kill_and_wait(id, process).await?;
            tracing::info!(machine = %id, pid = process.pid(), "killed the process of a machine without a holder");
        }
        self.remove_files(id, &dir);
        Ok(process.is_some())
    }
}

/// Configures the machine through the API and starts the guest. On an error, kills the process and
/// returns the cause.
async fn finish_launch(
    spec: &MachineSpec,
    claimed: ClaimedProcess,
    jail: Jail,
    console: pipe::Receiver,
) -> Result<LaunchGuard> {
    let api = Api::at(&jail.path(jail::API));
    let steps = async {
        wait_until_responsive(&claimed.process, &api).await?;
        // From the first response on, the process' arguments are Firecracker's.
        let recorded = claimed.process.arguments().and_then(|argv| claimed.write_record(argv));
        recorded.map_err(|error| error.to_string())?;
        api.configure(spec).await.map_err(|error| error.to_string())?;
        api.start().await.map_err(|error| error.to_string())
    };
    let result: Result<(), String> = steps.await;
    if let Err(why) = result {
        let status = kill_and_wait(&claimed.id, &claimed.process).await?.unwrap_or_default();
        return Err(launch_error(
            &claimed.id,
            format!("{why} ({status})"),
            &claimed.stderr.text(),
        ));
    }
    Ok(LaunchGuard {
        machine: FirecrackerMachine::new(claimed, jail, api, console),
        kept: false,
    })
}

fn hung(id: &VmId) -> Error {
    Error::Hung {
        id: id.clone(),
        command: "a new connection",
        after: RESPONSE_TIMEOUT,
    }
}

/// Returns the account of this process, for machines that have none of their own.
fn own_account() -> RunAs {
    RunAs {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    }
}

/// Waits for Firecracker's first response, or for the end of its process.
async fn wait_until_responsive(process: &Process, api: &Api) -> Result<(), String> {
    let deadline = Instant::now() + LAUNCH_TIMEOUT;
    loop {
        let why = tokio::select! {
            () = process.exited() => return Err("Firecracker exited immediately".to_owned()),
            response = api.state() => match response {
                Ok(_) => return Ok(()),
                Err(why) => why,
            }
        };
        if matches!(why, ApiError::TimedOut) || Instant::now() >= deadline {
            return Err(format!("API socket: {why}"));
        }
        sleep(CONNECT_INTERVAL).await;
    }
}

/// Opened for reading only, so that the end of the process is seen as end-of-file.
fn open_console(dir: &RunDir) -> Result<pipe::Receiver> {
    let path = dir.console_pipe();
    pipe::OpenOptions::new()
        .open_receiver(&path)
        .map_err(Error::io("open", path))
}

/// A launched machine that is killed on drop, unless it is kept.
struct LaunchGuard {
    machine: Arc<FirecrackerMachine>,
    kept: bool,
}

impl LaunchGuard {
    fn keep(mut self) -> Arc<FirecrackerMachine> {
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
