//! Space that comes back: from deleted disks to the pool, and from the pool to the host disk.
//!
//! `DELETE` answers when the VM's record and its disk's name are gone; the blocks follow here.
//! Until they can be given to others the deleted disk stays promised, so that no block is ever
//! promised twice; a request that would be refused meanwhile waits for them instead.

use crate::service::{Service, blocking};
use scalebox_fault_points::crash_point;
use scalebox_storage::UnlinkedDisk;
use scalebox_units::{Bytes, Gib};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

/// How long a request that does not fit waits for deleted disks: many times what the largest takes
/// on a disk that is not busy.
const PATIENCE: Duration = Duration::from_secs(20);
/// The pool is not trimmed more often than this: many small deletions are handed on together.
const BETWEEN_TRIMS: Duration = Duration::from_secs(10);

/// The disks that are being given back.
pub struct Reclaim {
    /// How many have no name any more and are still promised.
    under_way: watch::Sender<usize>,
    /// Told when the pool has freed blocks that the host disk does not know of.
    freed: Notify,
}

impl Default for Reclaim {
    fn default() -> Self {
        Reclaim {
            under_way: watch::Sender::new(0),
            freed: Notify::new(),
        }
    }
}

/// A disk that is being given back; dropped, it is no more.
struct UnderWay(Service);

impl UnderWay {
    fn begin(service: &Service) -> UnderWay {
        service.inner().reclaim.under_way.send_modify(|count| *count += 1);
        UnderWay(service.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.inner().reclaim.under_way.send_modify(|count| *count -= 1);
    }
}

/// Gives the blocks of a deleted VM's disk back, and then its promise, in a task that the daemon's
/// end waits for.
pub fn give_back(service: &Service, id: String, disk: Option<UnlinkedDisk>, promised: Gib) {
    let under_way = UnderWay::begin(service);
    service.inner().tasks.spawn(async move {
        let service = &under_way.0;
        if let Some(disk) = disk {
            let pool = Arc::clone(&service.inner().pool);
            if let Err(error) = blocking(move || pool.reclaim(disk)).await {
                tracing::warn!(vm = id, %error, "its blocks come back to the pool only later");
            }
        }
        crash_point("delete: blocks free");
        service.inner().pool.release(promised.bytes());
        service.inner().reclaim.freed();
        tracing::debug!(vm = id, "its blocks are back");
    });
}

impl Reclaim {
    /// The pool has freed blocks: the host disk is to get them soon.
    pub fn freed(&self) {
        self.freed.notify_one();
    }

    /// Waits until no deleted disk is on its way back, for at most [`PATIENCE`].
    pub async fn settled(&self) {
        let mut count = self.under_way.subscribe();
        let none = count.wait_for(|under_way| *under_way == 0);
        // Who asked finds out by itself what is still promised.
        let _settled = tokio::time::timeout(PATIENCE, none).await;
    }

    /// Asks again while `ask` is refused and deleted disks are on their way back, for at most
    /// [`PATIENCE`].
    pub async fn ask_again<T, E, F>(&self, is_refusal: fn(&E) -> bool, mut ask: impl FnMut() -> F) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let deadline = Instant::now() + PATIENCE;
        let mut count = self.under_way.subscribe();
        loop {
            // Read before asking: what comes back in between is a reason to ask again.
            let under_way = *count.borrow_and_update();
            match ask().await {
                Err(error) if under_way > 0 && is_refusal(&error) => {
                    if timeout_at(deadline, count.changed()).await.is_err() {
                        return Err(error);
                    }
                }
                answer => return answer,
            }
        }
    }
}

/// Hands freed blocks on to the host disk for as long as it is polled. btrfs does so by itself, but
/// two minutes later (`discard=async`). A pool on a device of its own is left to that: nobody else
/// waits for its blocks.
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
                "freed blocks were given back to the host disk"
            ),
            Err(error) => tracing::warn!(%error, "freed blocks stay with the pool until btrfs discards them"),
        }
        tokio::time::sleep(BETWEEN_TRIMS).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_final_when_nothing_is_on_its_way_back() {
        let asked = Cell::new(0);
        let ask = || async {
            asked.set(asked.get() + 1);
            Err::<(), _>("full")
        };
        let answer = Reclaim::default().ask_again(|_| true, ask).await;
        assert_eq!((answer, asked.get()), (Err("full"), 1));
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_fit_is_asked_again_when_a_disk_is_back_and_gives_up_after_a_while() {
        let reclaim = Reclaim::default();
        reclaim.under_way.send_modify(|count| *count = 2);
        let asked = Cell::new(0);
        let ask = || async {
            asked.set(asked.get() + 1);
            if asked.get() < 2 { Err("full") } else { Ok(()) }
        };
        let back = async { reclaim.under_way.send_modify(|count| *count -= 1) };
        let (answer, ()) = tokio::join!(reclaim.ask_again(|_| true, ask), back);
        assert_eq!((answer, asked.get()), (Ok(()), 2));
        // The second never comes back.
        let stuck = reclaim.ask_again(|_| true, || async { Err::<(), _>("full") }).await;
        assert_eq!(stuck, Err("full"));
    }
}
