//! A machine that runs in one Firecracker process: the handle, and the monitor task. The monitor
//! records how the machine ends, and cleans up.
//!
//! Firecracker emits no events: a pause is published by the call that caused it, and the guest
//! receives an error for a disk request that fails on the host. [`MachineState::Stalled`] does not
//! occur.

use crate::firecracker::api::{Api, ApiError, RESPONSE_TIMEOUT};
use crate::firecracker::jail::{self, Jail};
use crate::firecracker::vsock;
use crate::machine::{DiskLimits, ExitReason, Machine, MachineEvent, MachineState};
use crate::process::Process;
use crate::qemu::machine::{
    ClaimedProcess, DRAIN_TIMEOUT, MAX_BUFFERED_EVENTS, SHUTDOWN_INTERVAL, check_growth, crash_reason, wait_for_exit,
};
use crate::run_dir::{Lock, RunDir};
use crate::stderr::StderrPipe;
use crate::supervise::agent;
use crate::{Error, Result, console};
use async_trait::async_trait;
use qapi::qga::GuestShutdownMode;
use scalebox_units::{Bytes, VmId};
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{broadcast, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{sleep, timeout};

/// Firecracker logs this when the guest has rebooted: the only end that is not an error.
const CLEAN_EXIT: &str = "exit_code=0";

/// The vsock port of the guest's agent: the first one that an unprivileged program may use
/// (vsock(7)).
const AGENT_PORT: u32 = 1024;

/// The handle. Dropping it releases the machine for another process to adopt.
pub(crate) struct FirecrackerMachine {
    inner: Arc<Inner>,
    tasks: [AbortHandle; 2],
}

struct Inner {
    id: VmId,
    dir: RunDir,
    process: Process,
    stderr: StderrPipe,
    root: PathBuf,
    jail: Jail,
    api: Api,
    /// Released before the end is published, so that a caller that waited for the end can launch
    /// again.
    lock: Mutex<Option<Lock>>,
    /// Set before the kill signal is sent.
    killed: Mutex<bool>,
    /// The largest root disk size requested so far; locked during a request.
    max_requested: tokio::sync::Mutex<Bytes>,
    events: broadcast::Sender<MachineEvent>,
    ended: watch::Sender<Option<ExitReason>>,
}

impl FirecrackerMachine {
    pub(crate) fn new(
        claimed: ClaimedProcess,
        jail: Jail,
        api: Api,
        console: pipe::Receiver,
    ) -> Arc<FirecrackerMachine> {
        let drain = tokio::spawn(console::drain(console, claimed.console_log));
        let drain_handle = drain.abort_handle();
        let inner = Arc::new(Inner {
            id: claimed.id,
            dir: claimed.dir,
            process: claimed.process,
            stderr: claimed.stderr,
            root: claimed.root,
            jail,
            api,
            lock: Mutex::new(Some(claimed.lock)),
            killed: Mutex::default(),
            max_requested: tokio::sync::Mutex::new(Bytes::ZERO),
            events: broadcast::Sender::new(MAX_BUFFERED_EVENTS),
            ended: watch::Sender::new(None),
        });
        let monitor = tokio::spawn(monitor(inner.clone(), drain));
        Arc::new(FirecrackerMachine {
            inner,
            tasks: [monitor.abort_handle(), drain_handle],
        })
    }

    /// Converts the result of a request: if the machine has ended, the error is [`Error::Ended`].
    async fn convert<T>(&self, command: &'static str, result: Result<T, ApiError>) -> Result<T> {
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let id = self.inner.id.clone();
        if !self.inner.process.is_alive() {
            let reason = timeout(2 * DRAIN_TIMEOUT, self.exited()).await;
            let reason = reason.unwrap_or(ExitReason::Unknown);
            return Err(Error::Ended { id, reason });
        }
        Err(match error {
            ApiError::TimedOut => Error::Hung {
                id,
                command,
                after: RESPONSE_TIMEOUT,
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
        self.inner.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

#[async_trait]
impl Machine for FirecrackerMachine {
    fn id(&self) -> &VmId {
        &self.inner.id
    }

    fn pid(&self) -> i32 {
        self.inner.process.pid()
    }

    async fn state(&self) -> Result<MachineState> {
        let result = self.inner.api.state().await;
        match self.convert("GET /", result).await {
            Ok(state) if state == "Running" => Ok(MachineState::Running),
            Ok(_) => Ok(MachineState::Paused),
            Err(Error::Ended { reason, .. }) => Ok(MachineState::Ended(reason)),
            Err(error) => Err(error),
        }
    }

    async fn pause(&self) -> Result<()> {
        let result = self.inner.api.pause().await;
        self.convert("PATCH /vm Paused", result).await?;
        self.inner.publish(MachineEvent::Stopped);
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        let result = self.inner.api.resume().await;
        self.convert("PATCH /vm Resumed", result).await?;
        self.inner.publish(MachineEvent::Resumed);
        Ok(())
    }

    async fn resize_root(&self, size: Bytes) -> Result<()> {
        let mut max_requested = self.inner.max_requested.lock().await;
        check_growth(&self.inner.id, &self.inner.root, *max_requested, size)?;
        *max_requested = size;
        let file = File::options().write(true).open(&self.inner.root);
        file.and_then(|file| file.set_len(size.as_u64()))
            .map_err(Error::io("grow", &self.inner.root))?;
        let result = self.inner.api.rescan_root().await;
        self.convert("PATCH /drives/root", result).await
    }

    /// Firecracker's disks do not support discard, up to and including 1.17.
    fn supports_discard(&self) -> bool {
        false
    }

    async fn limit_disk(&self, limits: DiskLimits) -> Result<()> {
        let result = self.inner.api.limit_root(limits).await;
        self.convert("PATCH /drives/root", result).await
    }

    async fn stop(&self, grace: Duration) -> Result<ExitReason> {
        let requests = async {
            if let Err(error) = self.resume().await {
                tracing::warn!(machine = %self.inner.id, %error, "cannot resume the machine for its shutdown");
            }
            loop {
                // A guest reboot ends the machine.
                let agent = agent::request_shutdown(self.agent(), GuestShutdownMode::Reboot);
                let (sent, ()) = futures::join!(self.inner.api.ctrl_alt_del(), agent);
                if let Err(error) = sent {
                    tracing::debug!(machine = %self.inner.id, %error, "cannot send Ctrl+Alt+Del");
                }
                sleep(SHUTDOWN_INTERVAL).await;
            }
        };
        let ended = async {
            tokio::select! {
                biased;
                reason = self.exited() => reason,
                never = requests => never,
            }
        };
        if let Ok(reason) = timeout(grace, ended).await {
            return Ok(reason);
        }
        tracing::warn!(machine = %self.inner.id, ?grace, "the guest did not shut down in time; killing it");
        self.kill().await
    }

    async fn kill(&self) -> Result<ExitReason> {
        if self.inner.process.is_alive() {
            *self.inner.killed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        }
        self.inner
            .process
            .kill()
            .map_err(Error::io("kill", format!("/proc/{}", self.inner.process.pid())))?;
        Ok(self.exited().await)
    }

    async fn exited(&self) -> ExitReason {
        wait_for_exit(&self.inner.ended).await
    }

    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.inner.events.subscribe()
    }

    async fn agent(&self) -> Result<UnixStream> {
        let stream = vsock::connect(&self.inner.jail.path(jail::AGENT), AGENT_PORT).await;
        stream.map_err(|error| Error::Agent {
            id: self.inner.id.clone(),
            why: error.to_string(),
        })
    }
}

impl Inner {
    fn publish(&self, event: MachineEvent) {
        // Sending fails only if there are no receivers.
        let _ = self.events.send(event);
    }
}

/// The monitor task: waits until the process ends, then cleans up and publishes the end.
async fn monitor(inner: Arc<Inner>, drain: JoinHandle<()>) {
    tokio::select! {
        () = inner.process.exited() => {}
        () = inner.stderr.read_forever() => {}
    }
    // Ends when the pipe closes. A panic in the task has been logged already.
    if timeout(DRAIN_TIMEOUT, drain).await.is_err() {
        tracing::warn!(machine = %inner.id, "the end of the machine's console output may be lost");
    }
    let status = inner.process.reap();
    let stderr = inner.stderr.text();
    let killed = *inner.killed.lock().unwrap_or_else(PoisonError::into_inner);
    let reason = exit_reason(killed, status, &stderr, inner.dir.ran_out_of_memory());
    if reason == ExitReason::GuestShutdown {
        inner.publish(MachineEvent::GuestShutdown);
    }
    inner.jail.remove();
    inner.dir.clear();
    inner.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    inner.publish(MachineEvent::Ended(reason.clone()));
    inner.ended.send_replace(Some(reason));
}

/// Determines how the machine ended. Only the parent learns the exit status; after an adoption the
/// log decides.
fn exit_reason(killed: bool, status: Option<String>, stderr: &str, out_of_memory: bool) -> ExitReason {
    let clean = stderr.contains(CLEAN_EXIT) || status.as_deref() == Some("exit status 0");
    match (killed, clean) {
        (_, true) => ExitReason::GuestShutdown,
        (true, false) => ExitReason::Killed,
        (false, false) => crash_reason(status, stderr, out_of_memory),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_decides_the_exit_reason_without_an_exit_status() {
        let rebooted = "Firecracker exiting successfully. exit_code=0";
        assert_eq!(exit_reason(false, None, rebooted, false), ExitReason::GuestShutdown);
        assert_eq!(
            exit_reason(false, Some("exit status 0".into()), "", false),
            ExitReason::GuestShutdown
        );
        assert_eq!(
            exit_reason(true, Some("killed by signal 9".into()), "", false),
            ExitReason::Killed
        );
        let failed = exit_reason(false, Some("exit status 148".into()), "exit_code=148", false);
        let ExitReason::Crashed { detail } = failed else {
            panic!("{failed:?}")
        };
        assert!(detail.contains("148"), "{detail}");
    }
}
