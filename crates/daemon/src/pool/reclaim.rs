//! Frees space: deleted disks return their blocks to the pool, and the pool returns them to the
//! host.
//!
//! `DELETE` responds once the VM's record and its disk's name are gone; the blocks are freed
//! afterwards. Until then the deleted disk stays committed, so that no block is committed twice; a
//! request that would be rejected in the meantime waits instead.

use crate::host::{Service, blocking};
use scalebox_fault_points::crash_point;
use scalebox_storage::UnlinkedDisk;
use scalebox_units::{Bytes, Gib};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

/// How long a request that does not fit waits for deleted disks. The largest disk takes a fraction
/// of this on an idle host.
const FREE_TIMEOUT: Duration = Duration::from_secs(20);
/// Minimum interval between two trims of the pool, so that many small deletions share one.
const MIN_TRIM_INTERVAL: Duration = Duration::from_secs(10);

/// The deleted disks whose blocks are being freed.
pub struct Reclaim {
    /// Counts the disks that have no name any more and are still committed.
    freeing: watch::Sender<usize>,
    /// Notified when the pool has freed blocks that are not yet returned to the host disk.
    freed: Notify,
}

impl Default for Reclaim {
    fn default() -> Self {
        Reclaim {
            freeing: watch::Sender::new(0),
            freed: Notify::new(),
        }
    }
}

/// Counts one disk being freed; decrements on drop.
struct DiskBeingFreed(Service);

impl DiskBeingFreed {
    fn begin(service: &Service) -> DiskBeingFreed {
        service.inner().reclaim.freeing.send_modify(|count| *count += 1);
        DiskBeingFreed(service.clone())
    }
}

impl Drop for DiskBeingFreed {
    fn drop(&mut self) {
        self.0.inner().reclaim.freeing.send_modify(|count| *count -= 1);
    }
}

/// Frees the blocks of a deleted VM's disk, then its commitment. Runs in a task that a shutdown
/// waits for.
pub fn free_blocks(service: &Service, id: String, disk: Option<UnlinkedDisk>, committed: Gib) {
    let freeing = DiskBeingFreed::begin(service);
    service.inner().tasks.spawn(async move {
        let service = &freeing.0;
        if let Some(disk) = disk {
            let pool = Arc::clone(&service.inner().pool);
            if let Err(error) = blocking(move || pool.reclaim(disk)).await {
                tracing::warn!(vm = id, %error, "cannot free the blocks of the deleted VM's disk yet; they are freed later");
            }
        }
        crash_point("delete: blocks free");
        service.inner().pool.release(committed.bytes());
        service.inner().reclaim.freed();
        tracing::debug!(vm = id, "the blocks of the deleted VM's disk are freed");
    });
}

impl Reclaim {
    /// Requests a trim: the pool has freed blocks.
    pub fn freed(&self) {
        self.freed.notify_one();
    }

    /// Waits until no deleted disk is being freed, for at most [`FREE_TIMEOUT`].
    pub async fn wait_until_freed(&self) {
        let mut count = self.freeing.subscribe();
        let none = count.wait_for(|freeing| *freeing == 0);
        // On a timeout, the caller sees the remaining commitments.
        let _freed = tokio::time::timeout(FREE_TIMEOUT, none).await;
    }

    /// Retries a rejected `attempt` while deleted disks are being freed, for at most
    /// [`FREE_TIMEOUT`].
    pub async fn retry_while_freeing<T, E, F>(
        &self,
        is_insufficient: fn(&E) -> bool,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let deadline = Instant::now() + FREE_TIMEOUT;
        let mut count = self.freeing.subscribe();
        loop {
            // Read before the attempt, so that a disk freed during it causes a retry.
            let freeing = *count.borrow_and_update();
            match attempt().await {
                Err(error) if freeing > 0 && is_insufficient(&error) => {
                    if timeout_at(deadline, count.changed()).await.is_err() {
                        return Err(error);
                    }
                }
                result => return result,
            }
        }
    }
}

/// Returns freed blocks to the host disk, for as long as it is polled.
///
/// btrfs does this by itself, but two minutes later (`discard=async`). A pool on its own device
/// relies on that: nothing else needs its blocks.
pub async fn run(service: Service) -> Infallible {
    loop {
        service.inner().reclaim.freed.notified().await;
        let pool = Arc::clone(&service.inner().pool);
        if pool.image().is_none() {
            continue;
        }
        let begun = Instant::now();
        match blocking(move || pool.discard_free_blocks()).await {
            Ok(Bytes::ZERO) => {}
            Ok(freed) => tracing::info!(
                host_bytes = freed.as_u64(),
                took_ms = begun.elapsed().as_millis() as u64,
                "returned freed blocks to the host disk"
            ),
            Err(error) => {
                tracing::warn!(%error, "cannot return freed blocks to the host disk; btrfs discards them later")
            }
        }
        tokio::time::sleep(MIN_TRIM_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test(start_paused = true)]
    async fn refused_admissions_do_not_retry_when_no_disk_is_being_freed() {
        let attempts = Cell::new(0);
        let attempt = || async {
            attempts.set(attempts.get() + 1);
            Err::<(), _>("full")
        };
        let result = Reclaim::default().retry_while_freeing(|_| true, attempt).await;
        assert_eq!((result, attempts.get()), (Err("full"), 1));
    }

    #[tokio::test(start_paused = true)]
    async fn refused_admissions_retry_until_disks_are_freed() {
        let reclaim = Reclaim::default();
        reclaim.freeing.send_modify(|count| *count = 2);
        let attempts = Cell::new(0);
        let attempt = || async {
            attempts.set(attempts.get() + 1);
            if attempts.get() < 2 { Err("full") } else { Ok(()) }
        };
        let free_one = async { reclaim.freeing.send_modify(|count| *count -= 1) };
        let (result, ()) = tokio::join!(reclaim.retry_while_freeing(|_| true, attempt), free_one);
        assert_eq!((result, attempts.get()), (Ok(()), 2));
        // The second disk is never freed.
        let stuck = reclaim
            .retry_while_freeing(|_| true, || async { Err::<(), _>("full") })
            .await;
        assert_eq!(stuck, Err("full"));
    }
}
