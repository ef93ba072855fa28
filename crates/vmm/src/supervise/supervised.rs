//! The state of a held machine, which its handle and its monitor share.

use crate::error::{Error, Result};
use crate::process::Process;
use crate::run_dir::{Lock, RunDir};
use crate::state::{ExitReason, MachineEvent};
use crate::stderr::StderrPipe;
use crate::supervise::claim::ClaimedProcess;
use scalebox_units::{Bytes, VmId};
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, watch};
use tokio::time::timeout;

/// Timeout for reading the last events and console output of an ended machine.
pub(crate) const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Number of events that a slow receiver may lag behind.
const MAX_BUFFERED_EVENTS: usize = 64;

/// A machine that this process holds.
pub(crate) struct Supervised {
    pub(crate) id: VmId,
    pub(crate) dir: RunDir,
    pub(crate) process: Process,
    pub(crate) stderr: StderrPipe,
    pub(crate) root: PathBuf,
    /// The largest root disk size requested so far; locked during a request. QEMU would also
    /// execute a smaller, delayed request, and truncate the disk.
    pub(crate) max_requested: tokio::sync::Mutex<Bytes>,
    lock: Mutex<Option<Lock>>,
    /// The reason why the machine is about to end, once known.
    cause: Mutex<Option<ExitReason>>,
    events: broadcast::Sender<MachineEvent>,
    ended: watch::Sender<Option<ExitReason>>,
}

impl Supervised {
    /// Returns the machine, and the path of its console log.
    pub(crate) fn new(claimed: ClaimedProcess) -> (Supervised, PathBuf) {
        let machine = Supervised {
            id: claimed.id,
            dir: claimed.dir,
            process: claimed.process,
            stderr: claimed.stderr,
            root: claimed.root,
            max_requested: tokio::sync::Mutex::new(Bytes::ZERO),
            lock: Mutex::new(Some(claimed.lock)),
            cause: Mutex::default(),
            events: broadcast::Sender::new(MAX_BUFFERED_EVENTS),
            ended: watch::Sender::new(None),
        };
        (machine, claimed.console_log)
    }

    /// Publishes an event. Nothing happens if there are no receivers.
    pub(crate) fn publish(&self, event: MachineEvent) {
        let _ = self.events.send(event);
    }

    pub(crate) fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.events.subscribe()
    }

    /// Records the reason why the machine is about to end. Later calls change nothing.
    pub(crate) fn set_cause(&self, cause: ExitReason) {
        self.cause().get_or_insert(cause);
    }

    /// Returns the reason why the machine is about to end, if that is known.
    pub(crate) fn cause(&self) -> MutexGuard<'_, Option<ExitReason>> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the process. Does nothing if it has ended.
    pub(crate) fn kill(&self, cause: ExitReason) -> Result<()> {
        // The cause is set first: the monitor may see the end at once.
        if self.process.is_alive() {
            self.set_cause(cause);
        }
        self.process
            .kill()
            .map_err(Error::io("kill", format!("/proc/{}", self.process.pid())))
    }

    /// Implements [`Machine::kill`](crate::Machine::kill).
    pub(crate) async fn kill_and_wait(&self) -> Result<ExitReason> {
        self.kill(ExitReason::Killed)?;
        Ok(self.exited().await)
    }

    /// Waits until the monitor has published how the machine ended.
    pub(crate) async fn exited(&self) -> ExitReason {
        let mut ended = self.ended.subscribe();
        let reason = ended.wait_for(Option::is_some).await;
        // The sender lives as long as this value.
        reason
            .ok()
            .and_then(|reason| reason.clone())
            .unwrap_or(ExitReason::Unknown)
    }

    /// Publishes the end. The machine must be released by then, so that a caller that waited for
    /// the end can launch again.
    pub(crate) fn publish_end(&self, reason: ExitReason) {
        self.publish(MachineEvent::Ended(reason.clone()));
        self.ended.send_replace(Some(reason));
    }

    /// Returns [`Error::Ended`] if the process has ended. A failed command is often the first sign,
    /// and the monitor follows at once.
    pub(crate) async fn ended_error(&self) -> Option<Error> {
        if self.process.is_alive() {
            return None;
        }
        let reason = timeout(2 * DRAIN_TIMEOUT, self.exited()).await;
        Some(Error::Ended {
            id: self.id.clone(),
            reason: reason.unwrap_or(ExitReason::Unknown),
        })
    }

    /// Takes the lock out, to release it or to clean up under it. Returns `None` if the handle was
    /// dropped or the machine has ended.
    pub(crate) fn take_lock(&self) -> Option<Lock> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Converts an I/O error of a connection to an agent in the guest into [`Error::Agent`].
    pub(crate) fn channel(&self, connected: io::Result<UnixStream>) -> Result<UnixStream> {
        connected.map_err(|error| Error::Agent {
            id: self.id.clone(),
            why: error.to_string(),
        })
    }
}
