//! The Firecracker driver: launch and adopt.
//!
//! A machine is one Firecracker process in the folder that its jailer locks it into (`jail`),
//! controlled through the API socket there; [`FirecrackerMachine`] is how it is held. What this
//! driver cannot promise, and QEMU's can, is in `docs/firecracker.md`.

use crate::arguments::root_file;
use crate::confinement::Confinement;
use crate::firecracker_api::{ANSWER_DEADLINE, Api, ApiError};
use crate::firecracker_command::{Firecracker, PROGRAM, marks};
use crate::firecracker_machine::FirecrackerMachine;
use crate::jail::{self, Jails, give};
use crate::machine::{Machine, MachineId, MachineSpec, RunAs, Vmm};
use crate::messages::Messages;
use crate::process::Process;
use crate::qemu::{claim, end, failed, find, need_tap, running};
use crate::qemu_machine::Held;
use crate::run_dir::{Lock, RunDir};
use crate::{Error, Result};
use async_trait::async_trait;
use scalebox_units::Bytes;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep};

/// The memory that Firecracker may take for itself; it needs a few MiB, and reads kernel and
/// initramfs.
const BESIDE_GUEST: Bytes = Bytes::from_mib(128);
/// The longest from the process' start to its first answer.
const LAUNCH_DEADLINE: Duration = Duration::from_secs(10);
/// Between two attempts: a socket that is not there yet announces itself in no other way.
const CONNECT_INTERVAL: Duration = Duration::from_millis(5);
/// What a machine that was described and never started says of itself.
const NOT_STARTED: &str = "Not started";

/// Machines as Firecracker processes, under KVM.
///
/// A guest's reboot ends its machine
/// ([`ExitReason::GuestShutdown`](crate::ExitReason::GuestShutdown)): Firecracker starts none anew.
#[derive(Debug, Clone)]
pub struct FirecrackerDriver {
    /// `None`: it is not installed.
    firecracker: Option<Firecracker>,
    jails: Jails,
    confinement: Confinement,
}

impl FirecrackerDriver {
    /// Looks for Firecracker and its jailer on this host. Runs it once, for its version; blocks for
    /// that long. The folder `jails`, made when the first machine is launched, is on the file
    /// system of the machines' disks.
    ///
    /// # Errors
    /// [`Error::NoFirecracker`]; [`Error::Unusable`] when it is too old, cannot be jailed or does
    /// not run.
    pub fn find(jails: &Path) -> Result<FirecrackerDriver> {
        let firecracker = Firecracker::find()?;
        Ok(FirecrackerDriver {
            jails: firecracker.jails(jails),
            firecracker: Some(firecracker),
            confinement: Confinement::find(),
        })
    }

    /// The driver of machines that were launched before Firecracker was removed from this host: it
    /// launches none.
    pub fn without_program(jails: &Path) -> FirecrackerDriver {
        FirecrackerDriver {
            jails: Jails::new(jails, PROGRAM.into()),
            firecracker: None,
            confinement: Confinement::find(),
        }
    }

    /// Firecracker's version, such as `1.16.1`; `None` where it is not installed.
    pub fn version(&self) -> Option<&str> {
        self.firecracker.as_ref().map(Firecracker::version)
    }

    /// Launches; undoes what was done when a step fails.
    async fn start(self, spec: MachineSpec) -> Result<Fresh> {
        let firecracker = self.firecracker.as_ref().ok_or(Error::NoFirecracker(PROGRAM))?;
        spec.check()?;
        need_tap(&spec)?;
        firecracker.check_kernel(&spec)?;
        let dir = RunDir::at(&spec.run_dir);
        let lock = claim(&dir, &spec.id, &marks(spec.id.as_str()))?;
        match self.bring_up(firecracker, &spec, &dir, lock).await {
            Ok(fresh) => Ok(fresh),
            Err(error) => {
                // One that could not be ended keeps its files, by which it is found again.
                if !matches!(error, Error::Unkillable { .. }) {
                    self.jails.remove(&spec.id);
                    dir.clear();
                }
                Err(error)
            }
        }
    }

    async fn bring_up(&self, firecracker: &Firecracker, spec: &MachineSpec, dir: &RunDir, lock: Lock) -> Result<Fresh> {
        let root = root_file(spec)?.to_owned();
        let account = spec.run_as.unwrap_or_else(own_account);
        let jail = self.jails.make(spec, &root, account)?;
        let theirs = Messages::create(&jail.path(jail::MESSAGES))?;
        give(&jail.path(jail::MESSAGES), account)?;
        let messages = Messages::open(&jail.path(jail::MESSAGES))?;
        let console_end = Messages::create(&dir.console_pipe())?;
        let console = open_console(dir)?;
        // It is not fenced in as QEMU is: who is may not make the mounts that are a jail, and in a
        // jail there is nothing else.
        let confined = self.confinement.prepare(spec, dir, None, BESIDE_GUEST)?;
        let mut child = firecracker
            .spawn(spec.id.as_str(), &self.jails, account, confined, console_end, theirs)
            .map_err(|error| failed(&spec.id, error, ""))?;
        let process = match Process::of_child(&child) {
            Ok(process) => process,
            Err(error) => {
                // Without a pidfd the pid will do: until it is waited for, it is nobody else's.
                if let Err(error) = child.kill().and_then(|()| child.wait()) {
                    tracing::warn!(machine = %spec.id, %error, "Firecracker not killed after a failed launch");
                }
                return Err(failed(&spec.id, error, ""));
            }
        };
        let held = Held {
            id: spec.id.clone(),
            dir: dir.clone(),
            lock,
            process,
            messages,
            root,
            console_log: spec.console_log.clone(),
        };
        let api = Api::at(&jail.path(jail::API));
        let steps = async {
            answering(&held.process, &api).await?;
            // Only now are its arguments Firecracker's.
            let recorded = held.process.arguments().and_then(|argv| held.record(argv));
            recorded.map_err(|error| error.to_string())?;
            api.configure(spec).await.map_err(|error| error.to_string())?;
            api.start().await.map_err(|error| error.to_string())
        };
        let stepped: Result<(), String> = steps.await;
        if let Err(why) = stepped {
            let status = end(&held.id, &held.process).await?.unwrap_or_default();
            return Err(failed(&held.id, format!("{why} ({status})"), &held.messages.text()));
        }
        Ok(Fresh {
            machine: FirecrackerMachine::new(held, jail, api, console),
            kept: false,
        })
    }

    /// Removes everything of a machine whose process is gone.
    fn clear(&self, id: &MachineId, dir: &RunDir) {
        self.jails.remove(id);
        dir.clear();
    }
}

#[async_trait]
impl Vmm for FirecrackerDriver {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    /// `MAX_SUPPORTED_VCPUS`, which its `PUT /machine-config` is held to.
    fn max_vcpus(&self) -> u32 {
        32
    }

    fn can_launch(&self) -> bool {
        self.firecracker.is_some()
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
        let Some((process, record)) = find(id, &dir, &marks(id.as_str())).await? else {
            self.clear(id, &dir);
            return Ok(None);
        };
        // Somebody has removed the jail of a process that runs in it: it cannot be reached any
        // more.
        let jail = self.jails.of(id)?.ok_or_else(|| hung(id))?;
        let messages = Messages::open(&jail.path(jail::MESSAGES))?;
        let held = Held::again(process, record, &dir, lock, messages);
        let api = Api::at(&jail.path(jail::API));
        match api.state().await {
            Ok(state) if state != NOT_STARTED => {}
            Ok(_) => {
                tracing::info!(machine = %id, "its launch was interrupted: killed");
                end(id, &held.process).await?;
                self.clear(id, &dir);
                return Ok(None);
            }
            Err(error) if held.process.lives() => {
                tracing::warn!(machine = %id, %error, "Firecracker runs, but does not answer");
                return Err(hung(id));
            }
            Err(_) => {
                self.clear(id, &dir);
                return Ok(None);
            }
        }
        let console = open_console(&dir)?;
        Ok(Some(FirecrackerMachine::new(held, jail, api, console)))
    }

    async fn put_down(&self, id: &MachineId, run_dir: &Path) -> Result<bool> {
        let dir = RunDir::at(run_dir);
        // Made where it is missing, for its process may live all the same: and nobody launches it
        // meanwhile.
        let _lock = dir.create_locked(id)?;
        let process = running(id, &dir, &marks(id.as_str()))?;
        if let Some(process) = &process {
            end(id, process).await?;
            tracing::info!(machine = %id, pid = process.pid(), "put down");
        }
        self.clear(id, &dir);
        Ok(process.is_some())
    }
}

fn hung(id: &MachineId) -> Error {
    Error::Hung {
        id: id.clone(),
        command: "a new connection",
        after: ANSWER_DEADLINE,
    }
}

/// That of this process, for a machine that has none of its own.
fn own_account() -> RunAs {
    RunAs {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    }
}

/// Waits for the first answer, or the end of the process.
async fn answering(process: &Process, api: &Api) -> Result<(), String> {
    let deadline = Instant::now() + LAUNCH_DEADLINE;
    loop {
        let why = tokio::select! {
            () = process.exited() => return Err("Firecracker ended at once".to_owned()),
            answer = api.state() => match answer {
                Ok(_) => return Ok(()),
                Err(why) => why,
            }
        };
        if matches!(why, ApiError::Hung) || Instant::now() >= deadline {
            return Err(format!("API socket: {why}"));
        }
        sleep(CONNECT_INTERVAL).await;
    }
}

/// For reading only: its end is seen when the process has ended.
fn open_console(dir: &RunDir) -> Result<pipe::Receiver> {
    let path = dir.console_pipe();
    pipe::OpenOptions::new()
        .open_receiver(&path)
        .map_err(Error::io("open", path))
}

/// A launched machine that nobody has taken yet: killed when dropped.
struct Fresh {
    machine: Arc<FirecrackerMachine>,
    kept: bool,
}

impl Fresh {
    fn keep(mut self) -> Arc<FirecrackerMachine> {
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
