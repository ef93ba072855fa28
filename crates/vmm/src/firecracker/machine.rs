//! A machine that runs in one Firecracker process: its commands, and the detection of its end.
//!
//! Firecracker emits no events: a pause is published by the call that caused it, and the guest
//! receives an error for a disk request that fails on the host. [`MachineState::Stalled`] does not
//! occur.

use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::firecracker::api::{Api, ApiError, RESPONSE_TIMEOUT};
use crate::firecracker::jail::{self, Jail};
use crate::firecracker::vsock;
use crate::machine::{Channel, Machine};
use crate::spec::DiskLimits;
use crate::state::{ExitReason, MachineEvent, MachineState};
use crate::supervise::{ClaimedProcess, Handle, Observer, Supervised, qga};
use async_trait::async_trait;
use qapi::qga::GuestShutdownMode;
use scalebox_units::{Bytes, VmId};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::broadcast;

/// Firecracker logs this when the guest has rebooted: the only end that is not an error.
const CLEAN_EXIT: &str = "exit_code=0";

/// The vsock port of `qemu-guest-agent`: the first one that an unprivileged program may use
/// (vsock(7)).
const QGA_PORT: u32 = 1024;

/// A handle to the machine. Dropping it releases the machine for another process to adopt.
pub(crate) struct FirecrackerMachine {
    handle: Handle,
    jail: Jail,
    api: Api,
}

impl FirecrackerMachine {
    pub(crate) fn new(
        claimed: ClaimedProcess,
        jail: Jail,
        api: Api,
        console: pipe::Receiver,
    ) -> Arc<FirecrackerMachine> {
        let (machine, console_log) = Supervised::new(claimed);
        let handle = Handle::new(Arc::new(machine), JailObserver(jail.clone()), console, console_log);
        Arc::new(FirecrackerMachine { handle, jail, api })
    }

    /// Converts the result of a request: if the machine has ended, the error is [`Error::Ended`].
    async fn convert<T>(&self, command: &'static str, result: Result<T, ApiError>) -> Result<T> {
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if let Some(ended) = self.handle.ended_error().await {
            return Err(ended);
        }
        let id = self.handle.id.clone();
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

impl FirecrackerMachine {
    /// Presses Ctrl+Alt+Del and requests a reboot from the agent, which ends the machine.
    async fn request_shutdown(&self) {
        let agent = qga::request_shutdown(self.channel(Channel::Qga), GuestShutdownMode::Reboot);
        let (sent, ()) = futures::join!(self.api.ctrl_alt_del(), agent);
        if let Err(error) = sent {
            tracing::debug!(machine = %self.handle.id, %error, "cannot send Ctrl+Alt+Del");
        }
    }
}

#[async_trait]
impl Machine for FirecrackerMachine {
    fn id(&self) -> &VmId {
        &self.handle.id
    }

    fn pid(&self) -> i32 {
        self.handle.process.pid()
    }

    async fn state(&self) -> Result<MachineState> {
        let result = self.api.state().await;
        match self.convert("GET /", result).await {
            Ok(state) if state == "Running" => Ok(MachineState::Running),
            Ok(_) => Ok(MachineState::Paused),
            Err(Error::Ended { reason, .. }) => Ok(MachineState::Ended(reason)),
            Err(error) => Err(error),
        }
    }

    async fn pause(&self) -> Result<()> {
        let result = self.api.pause().await;
        self.convert("PATCH /vm Paused", result).await?;
        self.handle.publish(MachineEvent::Stopped);
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        let result = self.api.resume().await;
        self.convert("PATCH /vm Resumed", result).await?;
        self.handle.publish(MachineEvent::Resumed);
        Ok(())
    }

    async fn resize_root(&self, size: Bytes) -> Result<()> {
        let root = self.handle.root.clone();
        let grow = |_| async move {
            let file = root.clone();
            let lengthened = blocking(move || File::options().write(true).open(file)?.set_len(size.as_u64())).await;
            lengthened.map_err(Error::io("grow", root))?;
            let result = self.api.rescan_root().await;
            self.convert("PATCH /drives/root", result).await
        };
        self.handle.grow_root(size, grow).await
    }

    /// Returns false: Firecracker's disks do not support discard, up to and including 1.17.
    fn supports_discard(&self) -> bool {
        false
    }

    async fn limit_disk(&self, limits: DiskLimits) -> Result<()> {
        let result = self.api.limit_root(limits).await;
        self.convert("PATCH /drives/root", result).await
    }

    async fn stop(&self, grace: Duration) -> Result<ExitReason> {
        self.handle.stop(grace, self.resume(), || self.request_shutdown()).await
    }

    async fn kill(&self) -> Result<ExitReason> {
        self.handle.kill_and_wait().await
    }

    async fn exited(&self) -> ExitReason {
        self.handle.exited().await
    }

    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.handle.events()
    }

    async fn channel(&self, channel: Channel) -> Result<UnixStream> {
        let port = match channel {
            Channel::Qga => QGA_PORT,
            Channel::Agent => scalebox_agent_api::VSOCK_PORT,
        };
        let stream = vsock::connect(&self.jail.path(jail::VSOCK), port).await;
        self.handle.channel(stream)
    }
}

/// The Firecracker part of the monitor.
struct JailObserver(Jail);

impl Observer for JailObserver {
    /// Returns the reason from the exit status, which only the parent receives. After an adoption
    /// the log decides.
    fn exit_reason(&self, status: Option<&str>, output: &str) -> Option<ExitReason> {
        let clean = output.contains(CLEAN_EXIT) || status == Some("exit status 0");
        clean.then_some(ExitReason::GuestShutdown)
    }

    fn remove_other_files(&self) {
        self.0.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_shows_a_shutdown_without_an_exit_status() {
        let observer = JailObserver(Jail::default());
        let rebooted = "Firecracker exiting successfully. exit_code=0";
        let shutdown = Some(ExitReason::GuestShutdown);
        assert_eq!(observer.exit_reason(None, rebooted), shutdown);
        assert_eq!(observer.exit_reason(Some("exit status 0"), ""), shutdown);
        assert_eq!(observer.exit_reason(Some("killed by signal 9"), ""), None);
        assert_eq!(observer.exit_reason(Some("exit status 148"), "exit_code=148"), None);
    }
}
