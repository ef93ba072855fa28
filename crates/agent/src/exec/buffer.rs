//! The output buffers of all execs, and the memory that they share.

use crate::exec::ring::{Ring, Room, Stream};
use scalebox_agent_api::ExecEnd;
use scalebox_agent_api::exec::{MIN_BUFFER, TOTAL_BUFFER};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;
use tokio::sync::Notify;
use tokio::time::timeout_at;

const TOTAL: usize = TOTAL_BUFFER as usize;
const MIN: usize = MIN_BUFFER as usize;

/// The memory of all buffers together.
///
/// When it exceeds [`TOTAL_BUFFER`], the largest buffers are cut to the same size, so that all of
/// them take three quarters of it. This size is then the limit of each, until half is free.
#[derive(Default)]
pub(crate) struct Budget {
    used: AtomicUsize,
    /// The limit of each buffer; 0 while buffers are not limited.
    share: AtomicUsize,
    outputs: Mutex<Vec<Weak<Output>>>,
}

impl Budget {
    fn adjust(&self, before: usize, after: usize) {
        if after >= before {
            self.used.fetch_add(after - before, Relaxed);
        } else {
            self.used.fetch_sub(before - after, Relaxed);
        }
    }

    /// Returns the present limit of a buffer of the size `wanted`.
    fn limit(&self, wanted: usize) -> usize {
        if self.used.load(Relaxed) < TOTAL / 2 {
            self.share.store(0, Relaxed);
        }
        match self.share.load(Relaxed) {
            0 => wanted,
            share => wanted.min(share),
        }
    }

    /// Cuts the largest buffers if all together are too large.
    fn rebalance(&self) {
        // Buffers of the minimal size are cut no further.
        if self.used.load(Relaxed) <= TOTAL || self.share.load(Relaxed) == MIN {
            return;
        }
        let outputs: Vec<Arc<Output>> = lock(&self.outputs).iter().filter_map(Weak::upgrade).collect();
        let costs = outputs.iter().map(|output| lock(&output.ring).cost()).collect();
        let share = fair_share(costs, TOTAL / 4 * 3).max(MIN);
        self.share.store(share, Relaxed);
        let now = Instant::now();
        for output in outputs {
            output.change(|ring| ring.trim(share, now));
        }
    }
}

/// Returns the limit with which buffers of these sizes take `total` together.
fn fair_share(mut costs: Vec<usize>, total: usize) -> usize {
    costs.sort_unstable();
    let (mut left, mut count) = (total, costs.len());
    for cost in costs {
        let share = left / count;
        if cost > share {
            return share;
        }
        left -= cost;
        count -= 1;
    }
    total
}

/// The output of one exec.
pub(crate) struct Output {
    ring: Mutex<Ring>,
    limit: usize,
    budget: Arc<Budget>,
    /// Wakes readers: there is more output, or the exec has ended.
    grown: Notify,
    /// Wakes the command's side: a follower has read.
    freed: Notify,
}

impl Output {
    /// Creates an empty buffer of at most `limit` bytes; see [`Ring::new`].
    pub(crate) fn new(budget: &Arc<Budget>, limit: usize, reserved_until: Option<Instant>) -> Arc<Output> {
        let output = Arc::new(Output {
            ring: Mutex::new(Ring::new(reserved_until)),
            limit: limit.max(MIN),
            budget: Arc::clone(budget),
            grown: Notify::new(),
            freed: Notify::new(),
        });
        let mut outputs = lock(&budget.outputs);
        outputs.retain(|other| other.strong_count() > 0);
        outputs.push(Arc::downgrade(&output));
        output
    }

    fn change<T>(&self, change: impl FnOnce(&mut Ring) -> T) -> T {
        let mut ring = lock(&self.ring);
        let before = ring.cost();
        let result = change(&mut ring);
        self.budget.adjust(before, ring.cost());
        result
    }

    /// Waits until a piece can be added.
    pub(crate) async fn room(&self) {
        loop {
            let freed = self.freed.notified();
            let limit = self.budget.limit(self.limit);
            match self.change(|ring| ring.make_room(limit, Instant::now())) {
                Room::Free => return,
                // A follower has read, or the time has expired; the next attempt checks which.
                Room::Until(time) => drop(timeout_at(time.into(), freed).await),
            }
        }
    }

    /// Adds a piece.
    pub(crate) fn push(&self, stream: Stream, bytes: &[u8]) {
        self.change(|ring| ring.push(stream, bytes));
        self.budget.rebalance();
        self.grown.notify_waiters();
    }

    /// Records the end.
    pub(crate) fn finish(&self, end: ExecEnd) {
        self.change(|ring| ring.finish(end));
        self.grown.notify_waiters();
    }

    /// Returns the offsets of the oldest byte and after the newest one.
    pub(crate) fn range(&self) -> (u64, u64) {
        let ring = lock(&self.ring);
        (ring.start(), ring.end())
    }

    /// Registers a follower at `position`.
    pub(crate) fn follow(self: &Arc<Output>, position: u64) -> Following {
        let id = lock(&self.ring).add_follower(position);
        self.freed.notify_waiters();
        Following {
            output: Arc::clone(self),
            id,
        }
    }

    /// Appends frames from `position` up to `until` to `to`. Returns the offset after them, and the
    /// end of an exec that has no more output.
    pub(crate) fn read(&self, position: u64, until: u64, to: &mut Vec<u8>) -> (u64, Option<ExecEnd>) {
        let ring = lock(&self.ring);
        let position = ring.read(position, until, to);
        (position, ring.finished().filter(|_| position >= ring.end()))
    }

    /// Returns a future that completes when the output has grown after this call, or has ended.
    pub(crate) fn grown(&self) -> impl Future<Output = ()> + Send + Sync + '_ {
        self.grown.notified()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let ring = self.ring.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.budget.adjust(ring.cost(), 0);
    }
}

/// A follower of an exec's output; unregistered on drop.
pub(crate) struct Following {
    output: Arc<Output>,
    id: u64,
}

impl Following {
    /// Records that everything before `position` was read.
    pub(crate) fn has_read(&self, position: u64) {
        lock(&self.output.ring).follower_read(self.id, position);
        self.output.freed.notify_waiters();
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        lock(&self.output.ring).remove_follower(self.id);
        self.output.freed.notify_waiters();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::ring::PIECE;

    #[test]
    fn the_largest_buffers_are_cut_first() {
        assert_eq!(fair_share(vec![1, 10, 10], 100), 100);
        assert_eq!(fair_share(vec![50, 10, 90], 100), 45);
        assert_eq!(fair_share(vec![], 100), 100);
    }

    #[test]
    fn buffers_share_their_memory_and_return_it() {
        let budget = Arc::new(Budget::default());
        let limit = TOTAL / 2;
        let outputs: Vec<_> = (0..8).map(|_| Output::new(&budget, limit, None)).collect();
        let small = Output::new(&budget, limit, None);
        small.push(Stream::Stdout, b"kept");
        for output in outputs.iter().cycle().take(8 * limit / PIECE) {
            let limit = budget.limit(output.limit);
            let room = output.change(|ring| ring.make_room(limit, Instant::now()));
            assert_eq!(room, Room::Free);
            output.push(Stream::Stdout, &[0; PIECE]);
            assert!(budget.used.load(Relaxed) <= TOTAL + PIECE);
        }
        assert_eq!(small.range(), (0, 4));
        assert!(outputs.iter().all(|output| output.range().0 > 0));
        drop(outputs);
        assert_eq!(budget.limit(limit), limit);
        drop(small);
        assert_eq!(budget.used.load(Relaxed), 0);
    }
}
