//! The execs of a guest: those that run, and the last ones that ended.

use crate::exec::buffer::{Budget, Output};
use crate::server::Failure;
use rustix::process::Pid;
use scalebox_agent_api::exec::{MAX_ENDED, MAX_RUNNING};
use scalebox_agent_api::{ExecEnd, ExecStatus, FailureCode, Restarts};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, watch};

/// The agent's end of a pipe or terminal.
pub(crate) type Fd = Arc<AsyncFd<OwnedFd>>;

/// Maximum number of programs that are started at the same time, each on a thread of its own.
const MAX_STARTS: usize = 4;
/// Maximum number of ended execs whose pipes the agent still reads, for processes that they left
/// behind.
const MAX_DRAINED: usize = 256;

/// The execs of a guest.
pub(crate) struct Execs {
    table: Arc<Mutex<Table>>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) starts: Arc<Semaphore>,
    pub(crate) drained: Arc<Semaphore>,
}

#[derive(Default)]
struct Table {
    execs: HashMap<String, Entry>,
    running: usize,
    /// Ids of ended execs, in the order of their ends.
    ended: VecDeque<String>,
}

enum Entry {
    Starting,
    Started(Arc<Exec>),
}

impl Default for Execs {
    fn default() -> Execs {
        Execs {
            table: Arc::default(),
            budget: Arc::default(),
            starts: Arc::new(Semaphore::new(MAX_STARTS)),
            drained: Arc::new(Semaphore::new(MAX_DRAINED)),
        }
    }
}

impl Execs {
    /// Reserves an id for a new exec.
    ///
    /// # Errors
    /// [`FailureCode::Exists`] for an id in use; [`FailureCode::Busy`] if [`MAX_RUNNING`] execs
    /// run.
    pub(crate) fn reserve(&self, id: &str) -> Result<Reservation, Failure> {
        let mut table = lock(&self.table);
        if table.execs.contains_key(id) {
            return Err(Failure::new(FailureCode::Exists, format!("exec {id} exists")));
        }
        if table.running >= MAX_RUNNING {
            let error = format!("{MAX_RUNNING} execs are running, which is the maximum");
            return Err(Failure::new(FailureCode::Busy, error));
        }
        table.execs.insert(id.to_owned(), Entry::Starting);
        table.running += 1;
        Ok(Reservation {
            table: Arc::clone(&self.table),
            id: Some(id.to_owned()),
        })
    }

    /// Returns an exec.
    ///
    /// # Errors
    /// [`FailureCode::NotFound`].
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Exec>, Failure> {
        match lock(&self.table).execs.get(id) {
            Some(Entry::Started(exec)) => Ok(Arc::clone(exec)),
            Some(Entry::Starting) | None => {
                let error = format!("exec {id} does not exist, or ended before the last {MAX_ENDED}");
                Err(Failure::new(FailureCode::NotFound, error))
            }
        }
    }

    /// Returns the states of all execs, in the order of their starts.
    pub(crate) fn list(&self) -> Vec<ExecStatus> {
        let table = lock(&self.table);
        let started = table.execs.values().filter_map(|entry| match entry {
            Entry::Started(exec) => Some(exec),
            Entry::Starting => None,
        });
        let mut execs: Vec<_> = started.collect();
        execs.sort_by_key(|exec| exec.started);
        execs.into_iter().map(|exec| exec.status()).collect()
    }

    /// Returns the number of execs that run.
    pub(crate) fn running(&self) -> usize {
        lock(&self.table).running
    }

    /// Replaces the exec of the guest's main process by the one of its next run.
    pub(crate) fn replace(&self, exec: &Arc<Exec>) {
        lock(&self.table)
            .execs
            .insert(exec.id.clone(), Entry::Started(Arc::clone(exec)));
    }

    /// Records that the guest's main process is not started again. It is not forgotten.
    pub(crate) fn main_ended(&self) {
        lock(&self.table).running -= 1;
    }

    /// Records that a running exec has ended, and forgets the oldest ended one beyond
    /// [`MAX_ENDED`].
    pub(crate) fn ended(&self, id: &str) {
        let mut table = lock(&self.table);
        table.running -= 1;
        table.ended.push_back(id.to_owned());
        if table.ended.len() > MAX_ENDED
            && let Some(oldest) = table.ended.pop_front()
        {
            table.execs.remove(&oldest);
        }
    }
}

/// The id of an exec that is being started; released on drop unless it has started.
pub(crate) struct Reservation {
    table: Arc<Mutex<Table>>,
    id: Option<String>,
}

impl Reservation {
    /// Enters the started exec.
    pub(crate) fn fill(mut self, exec: &Arc<Exec>) {
        if let Some(id) = self.id.take() {
            lock(&self.table).execs.insert(id, Entry::Started(Arc::clone(exec)));
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            let mut table = lock(&self.table);
            table.execs.remove(&id);
            table.running -= 1;
        }
    }
}

/// The phase of an exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its main process runs.
    Running,
    /// Its main process has ended and its pid may belong to another process.
    Exited,
}

/// One exec.
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) argv: Vec<String>,
    /// The main process, and its process group; none if it could not be started.
    pub(crate) pid: Option<Pid>,
    pub(crate) started: Instant,
    pub(crate) started_at_ms: u64,
    pub(crate) tty: bool,
    pub(crate) output: Arc<Output>,
    /// The pipe to stdin, or the terminal; none after the end, and for a pipe after its close.
    pub(crate) input: Mutex<Option<Fd>>,
    /// Held while a request writes to stdin: requests follow one another.
    pub(crate) input_order: tokio::sync::Mutex<()>,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) end: OnceLock<(ExecEnd, Duration)>,
    /// For the main process of the guest: its restarts.
    pub(crate) restarts: Option<Mutex<Restarts>>,
}

impl Exec {
    /// Returns the state for the host.
    pub(crate) fn status(&self) -> ExecStatus {
        let (output_start, output_end) = self.output.range();
        let end = self.end.get();
        let duration = end.map_or_else(|| self.started.elapsed(), |(_, duration)| *duration);
        ExecStatus {
            id: self.id.clone(),
            argv: self.argv.clone(),
            pid: self.pid.map_or(0, |pid| pid.as_raw_pid().unsigned_abs()),
            started_at_ms: self.started_at_ms,
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            tty: self.tty,
            output_start,
            output_end,
            end: end.map(|(end, _)| *end),
            restarts: self.restarts.as_ref().map(|restarts| *lock(restarts)),
        }
    }

    /// Records the end, and closes stdin or releases the terminal.
    pub(crate) fn record_end(&self, end: ExecEnd, duration: Duration) {
        self.close_input();
        // There is one end.
        let _ = self.end.set((end, duration));
    }

    /// Records whether the guest's main process is about to be started again.
    pub(crate) fn set_pending_restart(&self, pending: bool) {
        if let Some(restarts) = &self.restarts {
            lock(restarts).pending = pending;
        }
    }

    /// Returns stdin as far as it can be written to.
    pub(crate) fn input(&self) -> Option<Fd> {
        lock(&self.input).clone()
    }

    /// Closes stdin, or releases the terminal.
    pub(crate) fn close_input(&self) {
        drop(lock(&self.input).take());
    }

    /// Waits until the main process has ended.
    pub(crate) async fn exited(&self) {
        // The sender lives as long as this exec.
        let _ = self.phase.subscribe().wait_for(|phase| *phase == Phase::Exited).await;
    }

    /// Returns `true` while the main process exists, so that its pid is valid.
    pub(crate) fn is_running(&self) -> bool {
        *self.phase.borrow() == Phase::Running
    }

    /// Returns the error for an operation that needs a running process.
    pub(crate) fn has_ended(&self) -> Failure {
        Failure::new(FailureCode::Ended, format!("exec {} has ended", self.id))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
