//! The caller's side of a task: admission of space, progress, and cancellation.

use crate::oci::error::OciError;
use crate::oci::limits::Limits;
use scalebox_units::Bytes;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Space is requested in steps of this size while the total is unknown.
const STEP: u64 = 64 << 20;

/// A phase of a pull or an import, in the order of their work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Downloading layers; bytes as the registry stores them.
    Download,
    /// Unpacking layers, or converting a disk image; bytes as the source stores them.
    Unpack,
    /// Writing the file system; bytes of file contents.
    Write,
}

/// Space that is admitted until this value is dropped. By then its bytes are written, or no longer
/// needed.
pub type Room = Box<dyn Send>;

/// The caller's side of a pull or an import.
pub trait Supervisor: Send + Sync {
    /// Admits or refuses `bytes` that will be written next.
    ///
    /// # Errors
    /// The reason, which ends the task as [`OciError::Refused`].
    fn reserve(&self, bytes: Bytes) -> Result<Room, Box<dyn Error + Send + Sync>>;

    /// Receives the progress of a phase: `done` never decreases within a phase, and `total` may be
    /// an estimate. Called often; must not block.
    fn progress(&self, phase: Phase, done: Bytes, total: Bytes);
}

/// Admits everything and ignores all progress.
impl Supervisor for () {
    fn reserve(&self, _bytes: Bytes) -> Result<Room, Box<dyn Error + Send + Sync>> {
        Ok(Box::new(()))
    }

    fn progress(&self, _phase: Phase, _done: Bytes, _total: Bytes) {}
}

/// One pull or import: its supervisor, its limits, and whether it is cancelled.
#[derive(Clone)]
pub struct Task {
    supervisor: Arc<dyn Supervisor>,
    cancelled: Arc<AtomicBool>,
    pub(crate) limits: Limits,
}

impl fmt::Debug for Task {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Task")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl Task {
    /// Creates a task with `supervisor`.
    pub fn new(supervisor: Arc<dyn Supervisor>, limits: Limits) -> Task {
        Task {
            supervisor,
            cancelled: Arc::default(),
            limits,
        }
    }

    /// Ends the task with [`OciError::Cancelled`] at its next step.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub(crate) fn check(&self) -> Result<(), OciError> {
        match self.cancelled.load(Ordering::Relaxed) {
            true => Err(OciError::Cancelled),
            false => Ok(()),
        }
    }

    pub(crate) fn reserve(&self, bytes: u64) -> Result<Room, OciError> {
        self.supervisor.reserve(Bytes::new(bytes)).map_err(OciError::Refused)
    }

    pub(crate) fn progress(&self, phase: Phase, done: u64, total: u64) {
        self.supervisor.progress(phase, Bytes::new(done), Bytes::new(total));
    }
}

/// Space that is admitted step by step, while data of unknown size is written.
pub(crate) struct GrowingRoom<'t> {
    task: &'t Task,
    rooms: Vec<Room>,
    left: u64,
}

impl<'t> GrowingRoom<'t> {
    pub(crate) fn new(task: &'t Task) -> GrowingRoom<'t> {
        GrowingRoom {
            task,
            rooms: Vec::new(),
            left: 0,
        }
    }

    /// Takes `bytes` out of the admitted space. Requests more if necessary.
    pub(crate) fn take(&mut self, bytes: u64) -> Result<(), OciError> {
        if self.left < bytes {
            let step = (bytes - self.left).max(STEP);
            self.rooms.push(self.task.reserve(step)?);
            self.left += step;
        }
        self.left -= bytes;
        Ok(())
    }
}
