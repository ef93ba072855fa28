//! Jobs: operations that continue after the response to the request that started them.
//!
//! Jobs are in memory: a restart of the daemon ends and forgets them. The leftovers of an
//! interrupted job in the pool are removed later, by the next pull or build.

use crate::host::error::ServiceError;
use crate::host::random::random_hex;
use crate::host::rfc3339;
use scalebox_api::Job;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// Maximum number of jobs that run at the same time. Each holds a few connections and threads.
const MAX_RUNNING: usize = 4;
/// Maximum number of jobs that are kept, running or ended.
const MAX_JOBS: usize = 100;
/// Minimum interval between two events about the progress of a job.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// The jobs of a running daemon, oldest first.
#[derive(Default)]
pub(crate) struct Jobs {
    table: Mutex<VecDeque<Arc<JobEntry>>>,
}

/// A job. The locks are held for a copy or a change, never across an await.
pub(crate) struct JobEntry {
    state: Mutex<State>,
    cancel: CancellationToken,
}

struct State {
    /// The job without its error, which is added when the job is shown.
    job: Job,
    failure: Option<Arc<ServiceError>>,
    reported: Option<Instant>,
}

impl Jobs {
    /// Begins a job that makes `template`.
    ///
    /// # Errors
    /// 409 if a job makes that template already; 503 if too many are running.
    pub(crate) fn begin(
        &self,
        kind: &str,
        template: &str,
        reference: Option<String>,
    ) -> Result<Arc<JobEntry>, ServiceError> {
        let id = random_hex(6).map_err(|error| ServiceError::Internal(error.to_string()))?;
        let job = Job {
            id: format!("job-{id}"),
            kind: kind.to_owned(),
            template: template.to_owned(),
            reference,
            status: "running".to_owned(),
            phase: "resolve".to_owned(),
            done_bytes: 0,
            total_bytes: 0,
            started_at: rfc3339(jiff::Timestamp::now()),
            ended_at: None,
            error: None,
        };
        let mut table = self.lock();
        let running: Vec<Job> = table
            .iter()
            .map(|entry| entry.describe())
            .filter(Job::is_running)
            .collect();
        if let Some(other) = running.iter().find(|job| job.template == template) {
            return Err(ServiceError::Busy(format!(
                "the template {template} is already being made by {}: wait for it, or cancel it",
                other.id
            )));
        }
        if running.len() >= MAX_RUNNING {
            return Err(ServiceError::NotReady(format!(
                "{MAX_RUNNING} jobs are already running: try again later"
            )));
        }
        if table.len() >= MAX_JOBS
            && let Some(oldest) = table.iter().position(|entry| !entry.describe().is_running())
        {
            table.remove(oldest);
        }
        let entry = Arc::new(JobEntry {
            state: Mutex::new(State {
                job,
                failure: None,
                reported: None,
            }),
            cancel: CancellationToken::new(),
        });
        table.push_back(Arc::clone(&entry));
        Ok(entry)
    }

    /// Lists all jobs, oldest first.
    pub(crate) fn list(&self) -> Vec<Arc<JobEntry>> {
        self.lock().iter().cloned().collect()
    }

    /// Finds a job.
    ///
    /// # Errors
    /// 404.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<JobEntry>, ServiceError> {
        let table = self.lock();
        let found = table.iter().find(|entry| entry.describe().id == id);
        found.cloned().ok_or_else(|| {
            let id = crate::host::error::quoted(id);
            ServiceError::NotFound(format!("there is no job {id}: ended jobs are kept for a while only"))
        })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<JobEntry>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl JobEntry {
    /// Describes the job as it is now, without its error.
    pub(crate) fn describe(&self) -> Job {
        self.lock().job.clone()
    }

    /// Returns why the job failed.
    pub(crate) fn failure(&self) -> Option<Arc<ServiceError>> {
        self.lock().failure.clone()
    }

    /// Records progress. Returns the job if the progress should be reported as an event.
    pub(crate) fn progress(&self, phase: &str, done: u64, total: u64) -> Option<Job> {
        let mut state = self.lock();
        let is_new = state.job.phase != phase;
        if is_new {
            state.job.phase = phase.to_owned();
        }
        (state.job.done_bytes, state.job.total_bytes) = (done, total);
        let due = state.reported.is_none_or(|at| at.elapsed() >= REPORT_INTERVAL);
        (is_new || due).then(|| {
            state.reported = Some(Instant::now());
            state.job.clone()
        })
    }

    /// Ends the job: with an error, or cancelled, or done.
    pub(crate) fn end(&self, status: &str, failure: Option<Arc<ServiceError>>) -> Job {
        let mut state = self.lock();
        state.job.status = status.to_owned();
        state.failure = failure;
        state.job.ended_at = Some(rfc3339(jiff::Timestamp::now()));
        state.job.clone()
    }

    /// Cancels the job, which ends soon afterwards.
    ///
    /// # Errors
    /// 409 if it has ended.
    pub(crate) fn cancel(&self) -> Result<(), ServiceError> {
        let job = self.describe();
        if !job.is_running() {
            return Err(ServiceError::WrongState(format!(
                "{} has ended already: it is {}",
                job.id, job.status
            )));
        }
        self.cancel.cancel();
        Ok(())
    }

    /// Waits until the job is cancelled.
    pub(crate) fn cancelled(&self) -> WaitForCancellationFuture<'_> {
        self.cancel.cancelled()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_jobs_are_limited_and_ended_ones_forgotten_oldest_first() {
        let jobs = Jobs::default();
        let begin = |template: &str| jobs.begin("pull", template, None);
        let first = begin("first").ok().unwrap();
        assert!(matches!(begin("first"), Err(ServiceError::Busy(_))));
        for name in ["b", "c", "d"] {
            begin(name).ok().unwrap();
        }
        assert!(matches!(begin("e"), Err(ServiceError::NotReady(_))));
        first.end("done", None);
        assert!(matches!(first.cancel(), Err(ServiceError::WrongState(_))));
        for number in 0..MAX_JOBS {
            begin(&format!("t{number}")).ok().unwrap().end("failed", None);
        }
        assert_eq!(jobs.list().len(), MAX_JOBS);
        assert!(jobs.get(&first.describe().id).is_err());
        assert_eq!(jobs.list().iter().filter(|job| job.describe().is_running()).count(), 3);
    }

    #[test]
    fn progress_is_reported_at_each_phase_and_once_in_a_while() {
        let jobs = Jobs::default();
        let job = jobs.begin("pull", "box", None).ok().unwrap();
        assert!(job.progress("download", 1, 10).is_some());
        assert!(job.progress("download", 2, 10).is_none());
        assert!(job.progress("unpack", 0, 10).is_some());
        let now = job.describe();
        assert_eq!((now.phase.as_str(), now.done_bytes, now.total_bytes), ("unpack", 0, 10));
        assert!(job.cancel().is_ok());
        assert!(job.cancel.is_cancelled());
    }
}
