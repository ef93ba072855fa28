//! Jobs: operations that continue after the response to the request that started them.
//!
//! Jobs are in memory: a restart of the daemon ends and forgets them. The leftovers of an
//! interrupted job in the pool are removed later, by the next pull or build.

use crate::host::error::ServiceError;
use crate::host::random::random_hex;
use crate::host::rfc3339;
use scalebox_api::Job;
use std::collections::VecDeque;
use std::ops::Deref;
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
    ended: CancellationToken,
}

/// The running job, for the task that does its work. Dropping it ends the job as failed, if it has
/// not ended: the task panicked.
pub(crate) struct RunningJob(Arc<JobEntry>);

/// The job that makes a template.
pub(crate) enum Begun {
    /// This call has begun it.
    New(RunningJob),
    /// It was running already.
    Running(Arc<JobEntry>),
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
    ) -> Result<RunningJob, ServiceError> {
        let mut table = self.lock();
        match making(&table, template) {
            Some(other) => Err(already_made(&other.describe())),
            None => start(&mut table, kind, template, reference),
        }
    }

    /// Begins a job like [`Jobs::begin`], or finds the running job that makes `template` from
    /// the same image.
    ///
    /// # Errors
    /// 409 if a running job makes the template from another image; 503 if too many jobs are
    /// running.
    pub(crate) fn begin_or_join(&self, kind: &str, template: &str, reference: &str) -> Result<Begun, ServiceError> {
        let mut table = self.lock();
        let Some(other) = making(&table, template) else {
            return start(&mut table, kind, template, Some(reference.to_owned())).map(Begun::New);
        };
        let job = other.describe();
        match job.reference.as_deref() == Some(reference) {
            true => Ok(Begun::Running(other)),
            false => Err(already_made(&job)),
        }
    }

    /// Removes a job that was not started after all. A task that waits for it gets `failure`.
    pub(crate) fn withdraw(&self, job: &RunningJob, failure: ServiceError) {
        self.lock().retain(|entry| !Arc::ptr_eq(entry, &job.0));
        job.end("failed", Some(Arc::new(failure)));
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

/// Returns the running job that makes a template.
fn making(table: &VecDeque<Arc<JobEntry>>, template: &str) -> Option<Arc<JobEntry>> {
    let makes = |entry: &&Arc<JobEntry>| {
        let state = entry.lock();
        state.job.template == template && state.job.is_running()
    };
    table.iter().find(makes).cloned()
}

fn already_made(job: &Job) -> ServiceError {
    ServiceError::Busy(format!(
        "the template {} is already being made by {}: wait for that job, or cancel it",
        job.template, job.id
    ))
}

/// Adds a running job to the table, which drops the oldest one that has ended.
fn start(
    table: &mut VecDeque<Arc<JobEntry>>,
    kind: &str,
    template: &str,
    reference: Option<String>,
) -> Result<RunningJob, ServiceError> {
    let is_running = |entry: &Arc<JobEntry>| entry.lock().job.is_running();
    if table.iter().filter(|entry| is_running(entry)).count() >= MAX_RUNNING {
        return Err(ServiceError::NotReady(format!(
            "{MAX_RUNNING} jobs are already running: try again later"
        )));
    }
    let id = random_hex(6).map_err(|error| ServiceError::Internal(error.to_string()))?;
    if table.len() >= MAX_JOBS
        && let Some(oldest) = table.iter().position(|entry| !is_running(entry))
    {
        table.remove(oldest);
    }
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
    let state = State {
        job,
        failure: None,
        reported: None,
    };
    let entry = Arc::new(JobEntry {
        state: Mutex::new(state),
        cancel: CancellationToken::new(),
        ended: CancellationToken::new(),
    });
    table.push_back(Arc::clone(&entry));
    Ok(RunningJob(entry))
}

impl RunningJob {
    /// Returns the job for others than its task.
    pub(crate) fn entry(&self) -> Arc<JobEntry> {
        Arc::clone(&self.0)
    }
}

impl Deref for RunningJob {
    type Target = JobEntry;

    fn deref(&self) -> &JobEntry {
        &self.0
    }
}

impl Drop for RunningJob {
    fn drop(&mut self) {
        if self.describe().is_running() {
            let why = "internal error; see the scaleboxd log".to_owned();
            self.end("failed", Some(Arc::new(ServiceError::Internal(why))));
        }
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
        self.ended.cancel();
        state.job.clone()
    }

    /// Waits until the job has ended.
    pub(crate) fn ended(&self) -> WaitForCancellationFuture<'_> {
        self.ended.cancelled()
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
        let _others = ["b", "c", "d"].map(|name| begin(name).ok().unwrap());
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
    fn a_job_is_joined_by_requests_for_the_same_image() {
        let jobs = Jobs::default();
        let join = |reference: &str| jobs.begin_or_join("pull", "box", reference);
        let Ok(Begun::New(first)) = join("a/box:1") else {
            panic!("it is the first")
        };
        let Ok(Begun::Running(same)) = join("a/box:1") else {
            panic!("it is running")
        };
        assert_eq!(same.describe().id, first.describe().id);
        assert!(matches!(join("b/box:1"), Err(ServiceError::Busy(_))));
        first.end("done", None);
        let Ok(Begun::New(next)) = join("b/box:1") else {
            panic!("the first has ended")
        };
        jobs.withdraw(&next, ServiceError::NameTaken("taken".to_owned()));
        assert_eq!(jobs.list().len(), 1);
        assert!(matches!(*next.failure().unwrap(), ServiceError::NameTaken(_)));
    }

    #[tokio::test]
    async fn a_job_whose_task_panics_has_failed() {
        let jobs = Jobs::default();
        let job = jobs.begin("pull", "box", None).ok().unwrap();
        let entry = job.entry();
        drop(job);
        entry.ended().await;
        assert_eq!(entry.describe().status, "failed");
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
