//! The Firecracker driver: launch and adopt.
//!
//! A machine is one Firecracker process, confined by its jailer to a folder (`jail`) and controlled
//! through the API socket there. [`FirecrackerMachine`] is the handle. `docs/firecracker.md` lists
//! the differences from QEMU.

use crate::blocking::blocking;
use crate::confine::Confinement;
use crate::error::{Error, Result};
use crate::firecracker::api::{Api, ApiError, RESPONSE_TIMEOUT};
use crate::firecracker::binary::{Firecracker, PROGRAM, identifying_arguments};
use crate::firecracker::jail::{self, Jail, Jails, change_owner};
use crate::firecracker::machine::FirecrackerMachine;
use crate::machine::{Machine, Vmm};
use crate::process::Process;
use crate::run_dir::RunDir;
use crate::spec::{MachineSpec, RunAs};
use crate::stderr::StderrPipe;
use crate::supervise::{
    self, CONNECT_INTERVAL, ClaimedProcess, Driver, LaunchGuard, kill_and_wait, require_tap, start_claimed, undo_launch,
};
use async_trait::async_trait;
use scalebox_units::{Bytes, VmId};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep};

/// Memory that Firecracker may use on top of the guest's. It needs a few MiB, and reads the kernel
/// and the initramfs.
const VMM_OVERHEAD: Bytes = Bytes::from_mib(128);
/// Timeout from the process' start to its first response.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(10);
/// The state that Firecracker reports for a machine that is configured but not started.
const NOT_STARTED: &str = "Not started";

/// Runs machines as Firecracker processes, with KVM.
///
/// A guest reboot ends the machine
/// ([`ExitReason::GuestShutdown`](crate::ExitReason::GuestShutdown)): Firecracker cannot restart a
/// guest.
#[derive(Debug, Clone)]
pub struct FirecrackerDriver {
    /// The installed Firecracker; `None` if it is not installed.
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
    async fn start(self, spec: MachineSpec) -> Result<LaunchGuard<FirecrackerMachine>> {
        let (driver, of) = (self.clone(), spec.clone());
        let (claimed, (jail, console)) = blocking(move || driver.start_process(&of)).await?;
        let api = Api::at(&jail.path(jail::API));
        let (claimed, started) = start_guest(&spec, claimed, &api).await;
        match started {
            Ok(()) => {
                let machine = FirecrackerMachine::new(claimed, jail, api, console);
                Ok(LaunchGuard::new(machine))
            }
            Err(why) => Err(undo_launch(&self, claimed, &why).await),
        }
    }

    /// Creates the jail and starts the process in it. Returns process, jail and console. Blocks.
    fn start_process(&self, spec: &MachineSpec) -> Result<(ClaimedProcess, (Jail, pipe::Receiver))> {
        let firecracker = self.firecracker.as_ref().ok_or(Error::NoFirecracker(PROGRAM))?;
        spec.check()?;
        require_tap(spec)?;
        firecracker.check_kernel(spec)?;
        start_claimed(self, spec, |dir| {
            let account = spec.run_as.unwrap_or_else(own_account);
            let jail = self.jails.make(spec, spec.root_file()?, account)?;
            let (process, stderr, console) = self.spawn(firecracker, spec, dir, &jail, account)?;
            Ok((process, stderr, (jail, console)))
        })
    }

    fn spawn(
        &self,
        firecracker: &Firecracker,
        spec: &MachineSpec,
        dir: &RunDir,
        jail: &Jail,
        account: RunAs,
    ) -> Result<(Process, StderrPipe, pipe::Receiver)> {
        let child_stderr = StderrPipe::create(&jail.path(jail::STDERR_PIPE))?;
        change_owner(&jail.path(jail::STDERR_PIPE), account)?;
        let stderr = StderrPipe::open(&jail.path(jail::STDERR_PIPE))?;
        let console_end = StderrPipe::create(&dir.console_pipe())?;
        let console = open_console(dir)?;
        // No Landlock rules, unlike for QEMU: they would forbid the mounts that create a jail. And
        // inside the jail there are no other files.
        let confined = self.confinement.prepare(spec, dir, None, VMM_OVERHEAD)?;
        let command = firecracker.command(spec.id.as_str(), &self.jails, account);
        let process = supervise::spawn(&spec.id, command, confined, console_end, child_stderr)?;
        Ok((process, stderr, console))
    }
}

impl FirecrackerDriver {
    /// Returns the jail of a machine whose process is running. Blocks.
    ///
    /// # Errors
    /// [`Error::Hung`] if the jail was removed: the process can no longer be reached.
    fn jail_of_running(&self, id: &VmId) -> Result<Jail> {
        self.jails
            .of(id)?
            .ok_or_else(|| Error::unreachable(id, RESPONSE_TIMEOUT))
    }
}

impl Driver for FirecrackerDriver {
    fn identifying_arguments(&self, id: &VmId, _dir: &RunDir) -> Result<Vec<String>> {
        Ok(identifying_arguments(id.as_str()).to_vec())
    }

    fn stderr_pipe(&self, id: &VmId, _dir: &RunDir) -> Result<PathBuf> {
        Ok(self.jail_of_running(id)?.path(jail::STDERR_PIPE))
    }

    fn remove_other_files(&self, id: &VmId) {
        self.jails.remove(id);
    }
}

#[async_trait]
impl Vmm for FirecrackerDriver {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    /// Returns `MAX_SUPPORTED_VCPUS`, the limit of Firecracker's `PUT /machine-config`.
    fn max_vcpus(&self) -> u32 {
        32
    }

    fn can_launch(&self) -> bool {
        self.firecracker.is_some()
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        supervise::launch(&spec.id, self.clone().start(spec.clone())).await
    }

    async fn adopt(&self, id: &VmId, run_dir: &Path) -> Result<Option<Arc<dyn Machine>>> {
        let Some(claimed) = supervise::claim(self, id, run_dir).await? else {
            return Ok(None);
        };
        let (driver, machine) = (self.clone(), id.clone());
        let jail = blocking(move || driver.jail_of_running(&machine)).await?;
        let api = Api::at(&jail.path(jail::API));
        match api.state().await {
            Ok(state) if state != NOT_STARTED => {}
            Ok(_) => {
                tracing::info!(machine = %id, "killing a machine whose launch was interrupted");
                kill_and_wait(id, &claimed.process).await?;
                claimed.remove_files(self).await;
                return Ok(None);
            }
            Err(error) if claimed.process.is_alive() => {
                tracing::warn!(machine = %id, %error, "Firecracker is running but does not respond");
                return Err(Error::unreachable(id, RESPONSE_TIMEOUT));
            }
            Err(_) => {
                claimed.remove_files(self).await;
                return Ok(None);
            }
        }
        let dir = claimed.dir.clone();
        let console = blocking(move || open_console(&dir)).await?;
        Ok(Some(FirecrackerMachine::new(claimed, jail, api, console)))
    }

    async fn force_stop(&self, id: &VmId, run_dir: &Path) -> Result<bool> {
        supervise::force_stop(self, id, run_dir).await
    }
}

/// Waits for a newly started process, writes its record, configures the machine and starts the
/// guest. Returns the process, and the error because of which it must be killed.
async fn start_guest(spec: &MachineSpec, claimed: ClaimedProcess, api: &Api) -> (ClaimedProcess, Result<(), String>) {
    if let Err(why) = wait_until_responsive(&claimed.process, api).await {
        return (claimed, Err(why));
    }
    let record = move || {
        // From the first response on, the process' arguments are Firecracker's.
        let argv = claimed.process.arguments();
        let recorded = argv.and_then(|argv| claimed.write_record(argv));
        (claimed, recorded)
    };
    let (claimed, recorded) = blocking(record).await;
    let steps = async {
        recorded.map_err(|error| error.to_string())?;
        api.configure(spec).await.map_err(|error| error.to_string())?;
        api.start().await.map_err(|error| error.to_string())
    };
    let started = steps.await;
    (claimed, started)
}

/// Returns the account of this process, for machines that have none of their own.
fn own_account() -> RunAs {
    RunAs {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    }
}

/// Waits until Firecracker sends its first response or its process ends.
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

/// Opens the console for reading only, so that it reads end-of-file when the process ends.
fn open_console(dir: &RunDir) -> Result<pipe::Receiver> {
    let path = dir.console_pipe();
    pipe::OpenOptions::new()
        .open_receiver(&path)
        .map_err(Error::io("open", path))
}
