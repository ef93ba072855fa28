//! Counts the deleted disks whose blocks are being freed, so that requests can wait for them.

use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

/// Timeout of a request that does not fit and waits for deleted disks. Freeing the largest disk
/// takes a fraction of this on an idle host.
const FREE_TIMEOUT: Duration = Duration::from_secs(20);
/// The deleted disks whose blocks are being freed.
pub(crate) struct Reclaim {
    /// Counts the disks that have no name any more and are still committed.
    freeing: Arc<watch::Sender<usize>>,
    /// Wakes the trim when the pool has freed blocks that are not yet returned to the host disk.
    freed: Notify,
}

impl Default for Reclaim {
    fn default() -> Self {
        Reclaim {
            freeing: Arc::new(watch::Sender::new(0)),
            freed: Notify::new(),
        }
    }
}

/// Counts one disk being freed; decrements on drop.
pub(crate) struct DiskBeingFreed(Arc<watch::Sender<usize>>);

impl Drop for DiskBeingFreed {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Reclaim {
    /// Counts one disk whose blocks are being freed, until the guard is dropped.
    pub(crate) fn begin(&self) -> DiskBeingFreed {
        self.freeing.send_modify(|count| *count += 1);
        DiskBeingFreed(Arc::clone(&self.freeing))
    }

    /// Waits for a request of [`Reclaim::freed`].
    pub(crate) async fn trim_requested(&self) {
        self.freed.notified().await;
    }

    /// Requests a trim: the pool has freed blocks.
    pub(crate) fn freed(&self) {
        self.freed.notify_one();
    }

    /// Waits until no deleted disk is being freed, for at most [`FREE_TIMEOUT`].
    pub(crate) async fn wait_until_freed(&self) {
        let mut count = self.freeing.subscribe();
        let none = count.wait_for(|freeing| *freeing == 0);
        // On a timeout, the caller sees the remaining commitments.
        let _freed = tokio::time::timeout(FREE_TIMEOUT, none).await;
    }

    /// Retries a rejected `attempt` while deleted disks are being freed, for at most
    /// [`FREE_TIMEOUT`].
    pub(crate) async fn retry_while_freeing<T, E, F>(
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
            // The counter is read before the attempt, so that a disk freed during it causes a
            // retry.
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
