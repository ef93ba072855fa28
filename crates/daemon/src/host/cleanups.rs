//! The queue of cleanups that failed and are retried.

use crate::host::vms::LeaseGuard;
use crate::state::Record;
use scalebox_net::Endpoint;
use scalebox_vmm::Machine;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The cleanups that failed and are retried.
#[derive(Default)]
pub(crate) struct Cleanups {
    pub failed: Mutex<Vec<Cleanup>>,
    /// `true` if partial or deleted files may be left in the pool.
    pub sweep: AtomicBool,
}

impl Cleanups {
    /// Counts the VMs that still have something to remove on the host.
    pub(crate) fn pending(&self) -> usize {
        self.lock().len()
    }

    /// Requests a sweep of the pool, after an operation that failed or left files to remove.
    pub(crate) fn sweep_soon(&self) {
        self.sweep.store(true, Ordering::Relaxed);
    }

    /// Locks the queue. Held for a push or a copy, never across an await.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Cleanup>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The remains of a VM on the host. Each part is cleared once it is removed.
pub(crate) struct Cleanup {
    pub record: Record,
    /// A machine to kill; `None` if it has ended or was not adopted.
    pub machine: Option<Arc<dyn Machine>>,
    /// `true` if a process may exist that was not adopted, for example because it does not respond.
    pub may_run: bool,
    /// Tap and forward.
    pub endpoint: Option<Endpoint>,
    /// Seed drive, sockets and pid file.
    pub run_dir: Option<PathBuf>,
    /// The parts that only a deleted VM leaves.
    pub deleted: Option<Deleted>,
}

pub(crate) struct Deleted {
    /// The address and port, reserved while tap and forward exist.
    pub lease: Option<LeaseGuard>,
    /// `true` if the disk still has its name and is still committed.
    pub has_disk: bool,
    pub console_dir: PathBuf,
}
