//! Cleans up on the host after stopped and deleted VMs.
//!
//! A stop has succeeded once the machine has ended, and a deletion once the record is gone; the
//! remaining removals cannot change that. If one of them fails, because of an I/O error or a
//! program that does not start, it is logged and retried until it succeeds. If the daemon ends
//! before that, the next start removes the rest.

use crate::host::cleanups::{Cleanup, Deleted};
use crate::host::error::ServiceError;
use crate::host::files::remove_dir;
use crate::host::vms::LeaseGuard;
use crate::host::{Host, blocking};
use crate::pool::reclaim;
use crate::state::Record;
use crate::vm::lifecycle;
use crate::vm::spec::endpoint;
use scalebox_fault_points::crash_point;
use scalebox_vmm::Machine;
use std::convert::Infallible;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Retry interval for failed removals.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

impl Cleanup {
    /// Cleans up after a machine that has ended; the VM is kept.
    ///
    /// # Errors
    /// If the record has no valid address.
    pub(crate) fn of_stopped(host: &Host, record: &Record) -> Result<Cleanup, ServiceError> {
        Ok(Cleanup {
            record: record.clone(),
            machine: None,
            may_run: false,
            endpoint: Some(endpoint(record)?),
            run_dir: Some(host.run_dir(&record.id)),
            deleted: None,
        })
    }

    /// Cleans up after a machine that was not adopted and could not be killed. Its folder may be
    /// the part that could not be removed.
    pub(crate) fn of_unadopted(host: &Host, record: &Record) -> Cleanup {
        Cleanup {
            record: record.clone(),
            machine: None,
            may_run: true,
            endpoint: endpoint(record).ok(),
            run_dir: Some(host.run_dir(&record.id)),
            deleted: None,
        }
    }

    /// Cleans up after a VM whose record is gone.
    pub(crate) fn of_deleted(
        host: &Host,
        record: &Record,
        machine: Option<Arc<dyn Machine>>,
        lease: Option<LeaseGuard>,
    ) -> Cleanup {
        Cleanup {
            may_run: machine.is_none(),
            machine,
            // A record without a valid address never had a tap.
            endpoint: endpoint(record).ok(),
            run_dir: Some(host.run_dir(&record.id)),
            deleted: Some(Deleted {
                lease,
                has_disk: true,
                console_dir: host.console_dir(&record.id),
            }),
            record: record.clone(),
        }
    }

    /// Tries once now, and queues the rest for [`run`].
    pub(crate) async fn begin(mut self, host: &Host) {
        if let Err(error) = self.proceed(host).await {
            self.begin_later(host, &error);
        }
    }

    /// Queues the whole cleanup for [`run`].
    pub(crate) fn begin_later(self, host: &Host, error: &ServiceError) {
        tracing::warn!(vm = %self.record.id, %error, "cannot clean up after the VM; retrying");
        host.cleanups.lock().push(self);
    }

    /// Removes each remaining part, once. Can be called again after an error.
    async fn proceed(&mut self, host: &Host) -> Result<(), ServiceError> {
        if let Some(machine) = &self.machine {
            machine.kill().await?;
            self.machine = None;
        } else if self.may_run {
            lifecycle::force_stop_once(host, &self.record.id).await?;
            self.may_run = false;
        }
        crash_point("clean up: machine ended");
        if let Some(endpoint) = &self.endpoint {
            host.network.detach(endpoint).await?;
            self.endpoint = None;
        }
        crash_point("clean up: tap and forward gone");
        if let Some(run_dir) = self.run_dir.clone() {
            blocking(move || remove_dir(&run_dir)).await?;
            self.run_dir = None;
        }
        match &mut self.deleted {
            Some(deleted) => deleted.proceed(host, &self.record).await,
            None => Ok(()),
        }
    }

    /// Retries the remaining removals. Returns whether nothing is left.
    async fn retry(&mut self, host: &Host) -> bool {
        // A start or a deletion in the meantime cleans up by itself.
        let _operation = match (
            &self.deleted,
            host.vms.begin(self.record.id.as_str(), "being cleaned up"),
        ) {
            (Some(_), _) => None,
            (None, Ok(operation)) if operation.machine.is_none() => Some(operation),
            (None, Ok(_) | Err(ServiceError::NotFound(_))) => return true,
            (None, Err(_)) => return false,
        };
        match self.proceed(host).await {
            Ok(()) => {
                tracing::info!(vm = %self.record.id, "cleaned up after the VM");
                true
            }
            Err(error) => {
                tracing::debug!(vm = %self.record.id, %error, "cannot clean up after the VM; retrying");
                false
            }
        }
    }
}

impl Deleted {
    async fn proceed(&mut self, host: &Host, record: &Record) -> Result<(), ServiceError> {
        drop(self.lease.take());
        if self.has_disk {
            let (pool, disk) = (Arc::clone(&host.pool), record.id.clone());
            let unlinked = blocking(move || pool.unlink_disk(&disk)).await?;
            self.has_disk = false;
            reclaim::free_blocks(host, record.id.clone(), unlinked, record.disk_size);
        }
        let console = self.console_dir.clone();
        blocking(move || remove_dir(&console)).await
    }
}

/// Removes the files that failed operations left in the pool, if a sweep was requested. Files of
/// operations in progress are not touched.
async fn sweep_when_due(host: &Host) {
    let cleanups = &host.cleanups;
    if !cleanups.sweep.swap(false, Ordering::Relaxed) {
        return;
    }
    let pool = Arc::clone(&host.pool);
    match blocking(move || pool.sweep_partials()).await {
        Ok(removed) => {
            for path in removed {
                tracing::info!(path = %path.display(), "removed a file left by a failed operation");
            }
        }
        Err(error) => {
            tracing::debug!(%error, "cannot remove the files of failed operations; retrying");
            cleanups.sweep_soon();
        }
    }
}

/// Retries failed cleanups for as long as it is polled.
pub(crate) async fn run(host: Host) -> Infallible {
    loop {
        tokio::time::sleep(RETRY_INTERVAL).await;
        sweep_when_due(&host).await;
        let pending = mem::take(&mut *host.cleanups.lock());
        for mut cleanup in pending {
            let tried = host.detached(|host| async move {
                let is_done = cleanup.retry(&host).await;
                if !is_done {
                    host.cleanups.lock().push(cleanup);
                }
                Ok(())
            });
            if let Err(error) = tried.await {
                tracing::error!(%error, "a cleanup panicked; the next start completes it");
            }
        }
    }
}
