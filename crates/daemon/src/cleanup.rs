//! Cleaning up after VMs whose machine has ended or which were deleted.
//!
//! A stop has succeeded when the machine has ended and a deletion when the record is gone; what
//! remains to be removed on the host cannot change that any more. A removal that fails, for an I/O
//! error or a program that cannot be started, is logged and tried again until it succeeds. The next
//! start removes what is left when the daemon ends before.

use crate::error::ServiceError;
use crate::lifecycle::{endpoint, remove_dir};
use crate::reclaim;
use crate::service::{Service, blocking, vm_id};
use crate::state::Record;
use crate::vms::Vacated;
use scalebox_fault_points::crash_point;
use scalebox_net::Endpoint;
use scalebox_units::Gib;
use scalebox_vmm::Machine;
use std::convert::Infallible;
use std::mem;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a removal that failed is tried again.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// The cleanups that failed and are tried again.
#[derive(Default)]
pub struct Cleanups {
    failed: Mutex<Vec<Cleanup>>,
    /// Whether half-made or deleted files may be left in the pool.
    sweep: AtomicBool,
}

impl Cleanups {
    /// How many VMs have something left on the host that could not be removed yet.
    pub fn pending(&self) -> usize {
        self.lock().len()
    }

    /// Has the pool swept soon: an operation failed, or removed files that nobody waits for.
    pub fn sweep_soon(&self) {
        self.sweep.store(true, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Cleanup>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a VM has left on the host. Each part is taken out when it is removed.
pub struct Cleanup {
    record: Record,
    /// A machine to be force-stopped; `None` where it has ended or has no handle.
    machine: Option<Arc<dyn Machine>>,
    /// Whether there may be a machine without a handle, such as one that does not answer.
    may_run: bool,
    /// Tap and forward.
    endpoint: Option<Endpoint>,
    /// Seed drive, sockets and pid file.
    run_dir: Option<PathBuf>,
    /// What goes with a deleted VM only.
    deleted: Option<Deleted>,
}

struct Deleted {
    /// Address and port, which nobody else may have while tap and forward are there.
    vacated: Option<Vacated>,
    /// Whether the disk has its name and its promise still.
    has_disk: bool,
    console_dir: PathBuf,
}

impl Cleanup {
    /// After a machine that has ended; the VM is kept.
    ///
    /// # Errors
    /// When the record has no valid address.
    pub fn of_stopped(service: &Service, record: &Record) -> Result<Cleanup, ServiceError> {
        Ok(Cleanup {
            record: record.clone(),
            machine: None,
            may_run: false,
            endpoint: Some(endpoint(record)?),
            run_dir: Some(service.run_dir(&record.id)),
            deleted: None,
        })
    }

    /// After a machine without a handle that could not be force-stopped, or whose folder could not
    /// be removed.
    pub fn of_stray(service: &Service, record: &Record) -> Cleanup {
        Cleanup {
            record: record.clone(),
            machine: None,
            may_run: true,
            endpoint: endpoint(record).ok(),
            run_dir: Some(service.run_dir(&record.id)),
            deleted: None,
        }
    }

    /// After a VM whose record is gone.
    pub fn of_deleted(
        service: &Service,
        record: &Record,
        machine: Option<Arc<dyn Machine>>,
        vacated: Option<Vacated>,
    ) -> Cleanup {
        Cleanup {
            may_run: machine.is_none(),
            machine,
            // A record without a valid address never had a tap.
            endpoint: endpoint(record).ok(),
            run_dir: Some(service.run_dir(&record.id)),
            deleted: Some(Deleted {
                vacated,
                has_disk: true,
                console_dir: service.console_dir(&record.id),
            }),
            record: record.clone(),
        }
    }

    /// Removes what can be removed, and leaves the rest to [`run`].
    pub async fn begin(mut self, service: &Service) {
        if let Err(error) = self.proceed(service).await {
            self.begin_later(service, &error);
        }
    }

    /// Leaves everything to [`run`].
    pub fn begin_later(self, service: &Service, error: &ServiceError) {
        tracing::warn!(vm = self.record.id, %error, "something is left on the host; trying again");
        service.inner().cleanups.lock().push(self);
    }

    /// Takes the next steps, each once. May be repeated after an error.
    async fn proceed(&mut self, service: &Service) -> Result<(), ServiceError> {
        if let Some(machine) = &self.machine {
            machine.kill().await?;
            self.machine = None;
        } else if self.may_run {
            service.force_stop_once(&self.record.id).await?;
            self.may_run = false;
        }
        crash_point("clean up: machine ended");
        if let Some(endpoint) = &self.endpoint {
            service.inner().network.detach(endpoint).await?;
            self.endpoint = None;
        }
        crash_point("clean up: tap and forward gone");
        if let Some(run_dir) = self.run_dir.clone() {
            blocking(move || remove_dir(&run_dir)).await?;
            self.run_dir = None;
        }
        match &mut self.deleted {
            Some(deleted) => deleted.proceed(service, &self.record).await,
            None => Ok(()),
        }
    }

    /// Tries again. Returns whether nothing is left.
    async fn try_again(&mut self, service: &Service) -> bool {
        // A VM that was kept may be started or deleted meanwhile, which cleans up by itself.
        let _operation = match (
            &self.deleted,
            service.inner().vms.begin(&self.record.id, "being cleaned up"),
        ) {
            (Some(_), _) => None,
            (None, Ok(operation)) if operation.machine.is_none() => Some(operation),
            (None, Ok(_) | Err(ServiceError::NotFound(_))) => return true,
            (None, Err(_)) => return false,
        };
        match self.proceed(service).await {
            Ok(()) => {
                tracing::info!(vm = self.record.id, "nothing of it is left on the host any more");
                true
            }
            Err(error) => {
                tracing::debug!(vm = self.record.id, %error, "something is left on the host; trying again");
                false
            }
        }
    }
}

impl Deleted {
    async fn proceed(&mut self, service: &Service, record: &Record) -> Result<(), ServiceError> {
        drop(self.vacated.take());
        if self.has_disk {
            let (pool, disk) = (Arc::clone(&service.inner().pool), vm_id(&record.id)?);
            let unlinked = blocking(move || pool.unlink_disk(&disk)).await?;
            self.has_disk = false;
            reclaim::give_back(service, record.id.clone(), unlinked, Gib::new(record.disk_size_gib));
        }
        let console = self.console_dir.clone();
        blocking(move || remove_dir(&console)).await
    }
}

/// Removes what failed operations could not remove of their files. Work that is under way is left
/// alone.
async fn sweep_when_due(service: &Service) {
    let cleanups = &service.inner().cleanups;
    if !cleanups.sweep.swap(false, Ordering::Relaxed) {
        return;
    }
    let pool = Arc::clone(&service.inner().pool);
    match blocking(move || pool.sweep_partials()).await {
        Ok(removed) => {
            for path in removed {
                tracing::info!(path = %path.display(), "removed a file that a failed operation left");
            }
        }
        Err(error) => {
            tracing::debug!(%error, "files of failed operations are left; trying again");
            cleanups.sweep_soon();
        }
    }
}

/// Tries failed cleanups again for as long as it is polled.
pub async fn run(service: Service) -> Infallible {
    loop {
        tokio::time::sleep(RETRY_INTERVAL).await;
        sweep_when_due(&service).await;
        let pending = mem::take(&mut *service.inner().cleanups.lock());
        for mut cleanup in pending {
            let one = service.clone();
            let tried = service.detached(async move {
                let is_done = cleanup.try_again(&one).await;
                if !is_done {
                    one.inner().cleanups.lock().push(cleanup);
                }
                Ok(())
            });
            if let Err(error) = tried.await {
                tracing::error!(%error, "a cleanup was given up; the next start does it");
            }
        }
    }
}
