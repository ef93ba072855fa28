//! The Firecracker driver: launch and adopt.
//!
//! A machine is one Firecracker process, controlled through the API socket in its own folder of the [`RunDir`];
//! [`FirecrackerMachine`] is how it is held. What this driver cannot promise, and QEMU's can, is in `docs/firecracker.md`.

use crate::arguments::root_file;
use crate::confinement::Confinement;
use crate::firecracker_api::{ANSWER_DEADLINE, Api, ApiError};
use crate::firecracker_command::{Files, Firecracker, mark};
use crate::firecracker_machine::FirecrackerMachine;
use crate::machine::{Machine, MachineId, MachineSpec, Vmm};
use crate::messages::Messages;
use crate::process::Process;
use crate::qemu::{claim, end, failed, find, need_tap, running};
use crate::qemu_machine::Held;
use crate::run_dir::{Lock, RunDir};
use crate::sandbox::Needed;
use crate::{Error, Result};
use async_trait::async_trait;
use scalebox_storage::Bytes;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep};

/// The memory that Firecracker may take for itself; it needs a few MiB, and reads kernel and initramfs.
const BESIDE_GUEST: Bytes = Bytes::from_mib(128);
/// The longest from the process' start to its first answer.
const LAUNCH_DEADLINE: Duration = Duration::from_secs(10);
/// Between two attempts: a socket that is not there yet announces itself in no other way.
const CONNECT_INTERVAL: Duration = Duration::from_millis(5);
/// What a machine that was described and never started says of itself.
const NOT_STARTED: &str = "Not started";

/// Machines as Firecracker processes, under KVM.
///
/// A guest's reboot ends its machine ([`ExitReason::GuestShutdown`](crate::ExitReason::GuestShutdown)): Firecracker starts none anew.
#[derive(Debug, Clone)]
pub struct FirecrackerDriver {
    firecracker: Firecracker,
    confinement: Confinement,
}

impl FirecrackerDriver {
    /// Looks for Firecracker on this host. Runs it once, for its version; blocks for that long.
    ///
    /// # Errors
    /// [`Error::NoFirecracker`]; [`Error::Unusable`] when it is too old or does not run.
    pub fn find() -> Result<FirecrackerDriver> {
        Ok(FirecrackerDriver {
            firecracker: Firecracker::find()?,
            confinement: Confinement::find(),
        })
    }

    /// Firecracker's version, such as `1.16.1`.
    pub fn version(&self) -> &str {
        self.firecracker.version()
    }

    /// Launches; undoes what was done when a step fails.
    async fn start(self, spec: MachineSpec) -> Result<Fresh> {
        spec.check()?;
        need_tap(&spec)?;
        self.firecracker.check_kernel(&spec)?;
        let dir = RunDir::at(&spec.run_dir);
        let lock = claim(&dir, &spec.id, &mark(spec.id.as_str(), &dir))?;
        match self.bring_up(&spec, &dir, lock).await {
            Ok(fresh) => Ok(fresh),
            Err(error) => {
                // One that could not be ended keeps its files, by which it is found again.
                if !matches!(error, Error::Unkillable { .. }) {
                    dir.clear();
                }
                Err(error)
            }
        }
    }

    async fn bring_up(&self, spec: &MachineSpec, dir: &RunDir, lock: Lock) -> Result<Fresh> {
        let root = root_file(spec)?.to_owned();
        let theirs = Messages::create(&dir.messages())?;
        let messages = Messages::open(&dir.messages())?;
        let console_end = Messages::create(&dir.console_pipe())?;
        let console = open_console(dir)?;
        let (files, names) = Files::prepare(spec, &root, dir, &theirs)?;
        let argv = Firecracker::argv(spec.id.as_str(), dir);
        let needed = Needed {
            program: self.firecracker.program().to_owned(),
            read: [&spec.kernel, &spec.seed]
                .into_iter()
                .chain(&spec.initrd)
                .cloned()
                .collect(),
            // Its log is opened anew by name.
            write: vec![root.clone(), dir.messages()],
            sockets: dir.firecracker(),
        };
        let confined = self.confinement.prepare(spec, dir, &needed, BESIDE_GUEST)?;
        let mut child = self
            .firecracker
            .spawn(&argv, files, confined, console_end, theirs)
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
        let api = Api::at(&dir.api());
        let steps = async {
            held.record(argv).map_err(|error| error.to_string())?;
            answering(&held.process, &api).await?;
            api.configure(spec, &names).await.map_err(|error| error.to_string())?;
            api.start().await.map_err(|error| error.to_string())
        };
        let stepped: Result<(), String> = steps.await;
        if let Err(why) = stepped {
            let status = end(&held.id, &held.process).await?.unwrap_or_default();
            return Err(failed(&held.id, format!("{why} ({status})"), &held.messages.text()));
        }
        Ok(Fresh {
            machine: FirecrackerMachine::new(held, api, console),
            kept: false,
        })
    }
}

#[async_trait]
impl Vmm for FirecrackerDriver {
    fn name(&self) -> &'static str {
        "firecracker"
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
        let Some(held) = find(id, &dir, lock, &mark(id.as_str(), &dir)).await? else {
            dir.clear();
            return Ok(None);
        };
        let api = Api::at(&dir.api());
        match api.state().await {
            Ok(state) if state != NOT_STARTED => {}
            Ok(_) => {
                tracing::info!(machine = %id, "its launch was interrupted: killed");
                end(id, &held.process).await?;
                dir.clear();
                return Ok(None);
            }
            Err(error) if held.process.lives() => {
                tracing::warn!(machine = %id, %error, "Firecracker runs, but does not answer");
                return Err(Error::Hung {
                    id: id.clone(),
                    command: "a new connection",
                    after: ANSWER_DEADLINE,
                });
            }
            Err(_) => {
                dir.clear();
                return Ok(None);
            }
        }
        let console = open_console(&dir)?;
        Ok(Some(FirecrackerMachine::new(held, api, console)))
    }

    async fn put_down(&self, id: &MachineId, run_dir: &Path) -> Result<bool> {
        let dir = RunDir::at(run_dir);
        // Made where it is missing, for its process may live all the same: and nobody launches it meanwhile.
        let _lock = dir.create_locked(id)?;
        let process = running(id, &dir, &mark(id.as_str(), &dir))?;
        if let Some(process) = &process {
            end(id, process).await?;
            tracing::info!(machine = %id, pid = process.pid(), "put down");
        }
        dir.clear();
        Ok(process.is_some())
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
