//! A machine that is one Firecracker process: the handle, and the attendant that notes how it ends
//! and cleans up after it.
//!
//! Firecracker says nothing unasked: pauses are announced by who asked for them, and a disk request
//! that the host refuses is an error that the guest gets. There is no [`MachineState::Stalled`]
//! here.

use crate::firecracker_api::{ANSWER_DEADLINE, Api, ApiError};
use crate::jail::{self, Jail};
use crate::machine::{DiskLimits, ExitReason, Machine, MachineEvent, MachineId, MachineState};
use crate::messages::Messages;
use crate::process::Process;
use crate::qemu_machine::{
    EVENTS_KEPT, Held, LAST_WORDS_DEADLINE, SHUTDOWN_INTERVAL, check_growth, crash, wait_for_end,
};
use crate::run_dir::{Lock, RunDir};
use crate::{Error, Result, agent, console, vsock};
use async_trait::async_trait;
use qapi::qga::GuestShutdownMode;
use scalebox_units::Bytes;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{broadcast, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{sleep, timeout};

/// What Firecracker logs when its guest has restarted: the one end that is not a fault.
const GONE_WELL: &str = "exit_code=0";

/// The port on which a guest's agent listens: the first that an ordinary program may take
/// (vsock(7)).
const AGENT_PORT: u32 = 1024;

/// The handle. Dropping it lets go of the machine: another may adopt it.
pub(crate) struct FirecrackerMachine {
    shared: Arc<Shared>,
    tasks: [AbortHandle; 2],
}

struct Shared {
    id: MachineId,
    dir: RunDir,
    process: Process,
    messages: Messages,
    root: PathBuf,
    jail: Jail,
    api: Api,
    /// Given back before the end is announced, so that who waited for the end can launch again.
    lock: Mutex<Option<Lock>>,
    /// Set by a kill, before it is sent.
    killed: Mutex<bool>,
    /// The largest size that the root disk was asked to have; held while a request is under way.
    asked: tokio::sync::Mutex<Bytes>,
    events: broadcast::Sender<MachineEvent>,
    ended: watch::Sender<Option<ExitReason>>,
}

impl FirecrackerMachine {
    pub(crate) fn new(held: Held, jail: Jail, api: Api, console: pipe::Receiver) -> Arc<FirecrackerMachine> {
        let drain = tokio::spawn(console::drain(console, held.console_log));
        let drain_handle = drain.abort_handle();
        let shared = Arc::new(Shared {
            id: held.id,
            dir: held.dir,
            process: held.process,
            messages: held.messages,
            root: held.root,
            jail,
            api,
            lock: Mutex::new(Some(held.lock)),
            killed: Mutex::default(),
            asked: tokio::sync::Mutex::new(Bytes::ZERO),
            events: broadcast::Sender::new(EVENTS_KEPT),
            ended: watch::Sender::new(None),
        });
        let attendant = tokio::spawn(attend(shared.clone(), drain));
        Arc::new(FirecrackerMachine {
            shared,
            tasks: [attendant.abort_handle(), drain_handle],
        })
    }

    /// The word for a failed command: that the machine has ended, where it has.
    async fn answered<T>(&self, command: &'static str, answer: Result<T, ApiError>) -> Result<T> {
        let failure = match answer {
            Ok(value) => return Ok(value),
            Err(failure) => failure,
        };
        let id = self.shared.id.clone();
        if !self.shared.process.lives() {
            let reason = timeout(2 * LAST_WORDS_DEADLINE, self.exited()).await;
            let reason = reason.unwrap_or(ExitReason::Unknown);
            return Err(Error::Ended { id, reason });
        }
        Err(match failure {
            ApiError::Hung => Error::Hung {
                id,
                command,
                after: ANSWER_DEADLINE,
            },
            ApiError::Refused(why) => Error::Control { id, command, why },
        })
    }
}

impl Drop for FirecrackerMachine {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

#[async_trait]
impl Machine for FirecrackerMachine {
    fn id(&self) -> &MachineId {
        &self.shared.id
    }

    fn pid(&self) -> i32 {
        self.shared.process.pid()
    }

    async fn state(&self) -> Result<MachineState> {
        let answer = self.shared.api.state().await;
        match self.answered("GET /", answer).await {
            Ok(state) if state == "Running" => Ok(MachineState::Running),
            Ok(_) => Ok(MachineState::Paused),
            Err(Error::Ended { reason, .. }) => Ok(MachineState::Ended(reason)),
            Err(error) => Err(error),
        }
    }

    async fn pause(&self) -> Result<()> {
        let answer = self.shared.api.pause().await;
        self.answered("PATCH /vm Paused", answer).await?;
        self.shared.announce(MachineEvent::Stopped);
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        let answer = self.shared.api.resume().await;
        self.answered("PATCH /vm Resumed", answer).await?;
        self.shared.announce(MachineEvent::Resumed);
        Ok(())
    }

    async fn resize_root(&self, size: Bytes) -> Result<()> {
        let mut asked = self.shared.asked.lock().await;
        check_growth(&self.shared.id, &self.shared.root, *asked, size)?;
        *asked = size;
        let file = File::options().write(true).open(&self.shared.root);
        file.and_then(|file| file.set_len(size.as_u64()))
            .map_err(Error::io("grow", &self.shared.root))?;
        let answer = self.shared.api.root_has_grown().await;
        self.answered("PATCH /drives/root", answer).await
    }

    /// Its disks offer no discard, up to and including 1.17.
    fn takes_discards(&self) -> bool {
        false
    }

    async fn limit_disk(&self, limits: DiskLimits) -> Result<()> {
        let answer = self.shared.api.limit_root(limits).await;
        self.answered("PATCH /drives/root", answer).await
    }

    async fn stop(&self, grace: Duration) -> Result<ExitReason> {
        let asking = async {
            if let Err(error) = self.resume().await {
                tracing::warn!(machine = %self.shared.id, %error, "not resumed for its shutdown");
            }
            loop {
                // The restart of the guest is the machine's end.
                let asked = agent::ask_to_shut_down(self.agent(), GuestShutdownMode::Reboot);
                let (pressed, ()) = futures::join!(self.shared.api.ctrl_alt_del(), asked);
                if let Err(error) = pressed {
                    tracing::debug!(machine = %self.shared.id, %error, "Ctrl+Alt+Del not pressed");
                }
                sleep(SHUTDOWN_INTERVAL).await;
            }
        };
        let obeyed = async {
            tokio::select! {
                biased;
                reason = self.exited() => reason,
                never = asking => never,
            }
        };
        if let Ok(reason) = timeout(grace, obeyed).await {
            return Ok(reason);
        }
        tracing::warn!(machine = %self.shared.id, ?grace, "did not shut down in time: killed");
        self.kill().await
    }

    async fn kill(&self) -> Result<ExitReason> {
        if self.shared.process.lives() {
            *self.shared.killed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        }
        self.shared
            .process
            .kill()
            .map_err(Error::io("kill", format!("/proc/{}", self.shared.process.pid())))?;
        Ok(self.exited().await)
    }

    async fn exited(&self) -> ExitReason {
        wait_for_end(&self.shared.ended).await
    }

    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.shared.events.subscribe()
    }

    async fn agent(&self) -> Result<UnixStream> {
        let stream = vsock::connect(&self.shared.jail.path(jail::AGENT), AGENT_PORT).await;
        stream.map_err(|error| Error::Agent {
            id: self.shared.id.clone(),
            why: error.to_string(),
        })
    }
}

impl Shared {
    fn announce(&self, event: MachineEvent) {
        // Nobody listening is no fault.
        let _ = self.events.send(event);
    }
}

/// The attendant: waits for the end of the process, then cleans up and announces it.
async fn attend(shared: Arc<Shared>, drain: JoinHandle<()>) {
    tokio::select! {
        () = shared.process.exited() => {}
        () = shared.messages.listen() => {}
    }
    // Ends with the pipe. A drain that fell over has said so.
    if timeout(LAST_WORDS_DEADLINE, drain).await.is_err() {
        tracing::warn!(machine = %shared.id, "its last words may be lost");
    }
    let status = shared.process.reap();
    let said = shared.messages.text();
    let killed = *shared.killed.lock().unwrap_or_else(PoisonError::into_inner);
    let reason = how_it_ended(killed, status, &said, shared.dir.ran_out_of_memory());
    if reason == ExitReason::GuestShutdown {
        shared.announce(MachineEvent::GuestShutdown);
    }
    shared.jail.remove();
    shared.dir.clear();
    shared.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    shared.announce(MachineEvent::Ended(reason.clone()));
    shared.ended.send_replace(Some(reason));
}

/// The exit status tells only its parent; the log tells whoever adopted the machine.
fn how_it_ended(killed: bool, status: Option<String>, said: &str, out_of_memory: bool) -> ExitReason {
    let well = said.contains(GONE_WELL) || status.as_deref() == Some("exit status 0");
    match (killed, well) {
        (_, true) => ExitReason::GuestShutdown,
        (true, false) => ExitReason::Killed,
        (false, false) => crash(status, said, out_of_memory),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_by_the_log_where_the_status_is_anothers_to_know() {
        let restarted = "Firecracker exiting successfully. exit_code=0";
        assert_eq!(how_it_ended(false, None, restarted, false), ExitReason::GuestShutdown);
        assert_eq!(
            how_it_ended(false, Some("exit status 0".into()), "", false),
            ExitReason::GuestShutdown
        );
        assert_eq!(
            how_it_ended(true, Some("killed by signal 9".into()), "", false),
            ExitReason::Killed
        );
        let fault = how_it_ended(false, Some("exit status 148".into()), "exit_code=148", false);
        let ExitReason::Crashed { detail } = fault else {
            panic!("{fault:?}")
        };
        assert!(detail.contains("148"), "{detail}");
    }
}
