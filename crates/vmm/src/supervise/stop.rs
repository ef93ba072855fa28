//! Stops a machine: requests a shutdown of the guest, and kills the machine after a grace period.

use crate::error::Result;
use crate::state::ExitReason;
use crate::supervise::supervised::Supervised;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Interval between shutdown requests: a request during the guest's boot is lost.
const SHUTDOWN_INTERVAL: Duration = Duration::from_secs(2);

impl Supervised {
    /// Implements [`Machine::stop`](crate::Machine::stop). `resume` resumes a paused guest, which
    /// could not react; each call of `request` requests the shutdown once.
    pub(crate) async fn stop<F>(
        &self,
        grace: Duration,
        resume: impl Future<Output = Result<()>> + Send,
        request: impl Fn() -> F + Send + Sync,
    ) -> Result<ExitReason>
    where
        F: Future<Output = ()> + Send,
    {
        let requests = async {
            if let Err(error) = resume.await {
                tracing::warn!(machine = %self.id, %error, "cannot resume the machine for its shutdown");
            }
            loop {
                request().await;
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
        if self.cause().is_some() {
            // The guest powered off in time, but its hypervisor still flushes the disk, for a
            // bounded time; or another caller killed the machine.
            return Ok(self.exited().await);
        }
        tracing::warn!(machine = %self.id, ?grace, "the guest did not shut down in time; killing the machine");
        self.kill_and_wait().await
    }
}
