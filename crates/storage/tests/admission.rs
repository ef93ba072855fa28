//! Admission, compared with models of guests' effects on a pool.

#![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

use proptest::prelude::*;
use scalebox_storage::{Admission, Bounds, Commitments, Reservation, Space};
use scalebox_units::{Bytes, Gib};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

fn gib(n: u64) -> Bytes {
    Gib::new(n).bytes()
}

fn admission(buffer: u64, overcommit_ratio: f64) -> Admission {
    Admission::new(Bounds {
        buffer: Gib::new(buffer),
        overcommit_ratio,
    })
}

/// Returns the space of a pool of `capacity` with `used` written, of which no commitment covers
/// `unreclaimable`.
fn space(capacity: u64, used: u64, unreclaimable: u64) -> Space {
    let free = gib(capacity) - gib(used);
    Space {
        capacity: gib(capacity),
        used: gib(used),
        free,
        pool_free: free,
        host_free: None,
        unallocated: free,
        metadata_total: Bytes::ZERO,
        metadata_used: Bytes::ZERO,
        worst_case_capacity: gib(capacity),
        unreclaimable: gib(unreclaimable),
    }
}

/// Events of requests and disks; indices select an existing one.
#[derive(Debug, Clone, Copy)]
enum Request {
    Create(u64),
    Grow(usize, u64),
    Commit(usize),
    Fail(usize),
    Delete(usize),
    /// Other data is written or deleted; holds the usage afterwards.
    Used(u64),
    /// The pool is resized.
    Capacity(u64),
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let request = prop_oneof![
        4 => (1u64..40).prop_map(Request::Create),
        2 => (any::<usize>(), 1u64..20).prop_map(|(at, size)| Request::Grow(at, size)),
        4 => any::<usize>().prop_map(Request::Commit),
        2 => any::<usize>().prop_map(Request::Fail),
        2 => any::<usize>().prop_map(Request::Delete),
        1 => (0u64..100).prop_map(Request::Used),
        1 => (50u64..150).prop_map(Request::Capacity),
    ];
    prop::collection::vec(request, 1..150)
}

/// Actions of guests and operators.
#[derive(Debug, Clone, Copy)]
enum Action {
    Create(u64),
    Grow(usize, u64),
    Write(usize, u64),
    Trim(usize, u64),
    Delete(usize),
    Import(u64),
    /// A disk becomes a template: its blocks are then shared.
    Snapshot(usize),
    DeleteTemplate(usize),
    Measure,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        4 => (1u64..40).prop_map(Action::Create),
        2 => (any::<usize>(), 1u64..20).prop_map(|(at, size)| Action::Grow(at, size)),
        6 => (any::<usize>(), 1u64..60).prop_map(|(at, size)| Action::Write(at, size)),
        2 => (any::<usize>(), 1u64..60).prop_map(|(at, size)| Action::Trim(at, size)),
        1 => any::<usize>().prop_map(Action::Delete),
        1 => (1u64..10).prop_map(Action::Import),
        2 => any::<usize>().prop_map(Action::Snapshot),
        1 => any::<usize>().prop_map(Action::DeleteTemplate),
        3 => Just(Action::Measure),
    ];
    prop::collection::vec(action, 1..200)
}

#[derive(Debug)]
struct Disk {
    size: u64,
    /// Blocks that the disk maps in extents of its own.
    own: u64,
}

/// A pool in whole GiB, changed by actions.
struct Model {
    capacity: u64,
    disks: Vec<Disk>,
    templates: Vec<u64>,
    /// Blocks of deleted templates that clones may still map in part.
    orphaned: u64,
    measured: Option<u64>,
}

impl Model {
    fn unreclaimable(&self) -> u64 {
        self.templates.iter().sum::<u64>() + self.orphaned
    }

    fn used(&self) -> u64 {
        self.unreclaimable() + self.disks.iter().map(|disk| disk.own).sum::<u64>()
    }

    fn space(&self) -> Space {
        let used = self.used();
        space(
            self.capacity,
            used,
            self.measured.map_or(used, |unreclaimable| unreclaimable.min(used)),
        )
    }

    fn disk(&mut self, at: usize) -> Option<&mut Disk> {
        let count = self.disks.len().max(1);
        self.disks.get_mut(at % count)
    }

    /// Applies an action, calling admission in the same order as the pool; a refusal changes
    /// nothing.
    fn take(&mut self, action: Action, admission: &Admission) {
        match action {
            Action::Create(size) => {
                if let Ok(admitted) = admission.admit(gib(size), || Ok(self.space())) {
                    admitted.commit();
                    self.disks.push(Disk { size, own: 0 });
                }
            }
            Action::Grow(at, more) => {
                if self.disk(at).is_some()
                    && let Ok(admitted) = admission.admit(gib(more), || Ok(self.space()))
                {
                    admitted.commit();
                    self.disk(at).unwrap().size += more;
                }
            }
            Action::Write(at, blocks) => {
                if let Some(disk) = self.disk(at) {
                    disk.own = disk.size.min(disk.own + blocks);
                }
            }
            Action::Trim(at, blocks) => {
                if let Some(disk) = self.disk(at) {
                    disk.own = disk.own.saturating_sub(blocks);
                }
            }
            Action::Delete(at) => {
                if !self.disks.is_empty() {
                    let disk = self.disks.swap_remove(at % self.disks.len());
                    admission.release(gib(disk.size));
                }
            }
            Action::Import(data) => {
                if let Ok(_room) = admission.admit(gib(data), || Ok(self.space())) {
                    self.measured = None;
                    self.templates.push(data);
                }
            }
            Action::Snapshot(at) => {
                let Some(data) = self.disk(at).map(|disk| disk.own) else {
                    return;
                };
                if let Ok(_room) = admission.admit(gib(data), || Ok(self.space())) {
                    self.measured = None;
                    self.templates.push(data);
                    self.disk(at).unwrap().own = 0;
                }
            }
            Action::DeleteTemplate(at) => {
                if !self.templates.is_empty() {
                    self.measured = None;
                    self.orphaned += self.templates.swap_remove(at % self.templates.len());
                }
            }
            Action::Measure => self.measured = Some(self.unreclaimable()),
        }
    }
}

proptest! {
    #[test]
    fn no_interleaving_exceeds_a_bound_and_all_end_at_zero(requests in requests(), ratio in 0.5f64..4.0, buffer in 0u64..4) {
        let admission = admission(buffer, ratio);
        let (mut capacity, mut used) = (100, 10);
        // Disks by size. A growth in progress also has its disk.
        let mut disks: Vec<Option<Bytes>> = Vec::new();
        let mut in_progress: Vec<(Reservation, Option<usize>)> = Vec::new();
        for request in requests {
            let now = space(capacity, used, used / 2);
            let alive: Vec<usize> = (0..disks.len()).filter(|&at| disks[at].is_some()).collect();
            let pick = |at: usize| alive.get(at % alive.len().max(1)).copied();
            let requested = match request {
                Request::Create(size) => Some((size, None)),
                Request::Grow(at, size) => pick(at).map(|disk| (size, Some(disk))),
                _ => None,
            };
            if let Some((size, disk)) = requested
                && let Ok(reservation) = admission.admit(gib(size), || Ok(now))
            {
                in_progress.push((reservation, disk));
                let Commitments { committed, reserved } = admission.commitments();
                prop_assert!(reserved + gib(buffer) <= now.free);
                prop_assert!(committed + reserved <= admission.limit(now.capacity));
                if ratio <= 1.0 {
                    prop_assert!(now.unreclaimable + committed + reserved + gib(buffer) <= now.worst_case_capacity);
                }
            }
            match request {
                Request::Commit(at) if !in_progress.is_empty() => {
                    let (reservation, disk) = in_progress.swap_remove(at % in_progress.len());
                    let size = reservation.size();
                    reservation.commit();
                    match disk {
                        None => disks.push(Some(size)),
                        // The disk was deleted before its growth was committed: both are released.
                        Some(disk) => match &mut disks[disk] {
                            Some(whole) => *whole += size,
                            None => admission.release(size),
                        },
                    }
                }
                Request::Fail(at) if !in_progress.is_empty() => drop(in_progress.swap_remove(at % in_progress.len())),
                Request::Delete(at) => {
                    if let Some(disk) = pick(at) {
                        admission.release(disks[disk].take().unwrap());
                    }
                }
                Request::Used(now) => used = now.min(capacity),
                Request::Capacity(now) => {
                    capacity = now;
                    used = used.min(now);
                }
                _ => {}
            }
            let commitments = admission.commitments();
            prop_assert_eq!(commitments.reserved, in_progress.iter().map(|(reservation, _)| reservation.size()).sum());
            prop_assert_eq!(commitments.committed, disks.iter().copied().flatten().sum());
        }
        drop(in_progress);
        disks.into_iter().flatten().for_each(|size| admission.release(size));
        prop_assert_eq!(admission.commitments(), Commitments::default());
    }

    #[test]
    fn with_a_ratio_of_one_guests_can_always_write_all_committed_bytes(actions in actions(), buffer in 0u64..4) {
        let admission = admission(buffer, 1.0);
        let mut model = Model { capacity: 200, disks: Vec::new(), templates: Vec::new(), orphaned: 0, measured: None };
        for action in actions {
            model.take(action, &admission);
            let written_full = model.unreclaimable() + model.disks.iter().map(|disk| disk.size).sum::<u64>();
            prop_assert!(written_full == 0 || written_full + buffer <= model.capacity, "{:?}", action);
        }
        for at in 0..model.disks.len() {
            model.take(Action::Write(at, u64::MAX / 2), &admission);
        }
        prop_assert!(model.used() == 0 || model.used() + buffer <= model.capacity);
        prop_assert!(model.disks.iter().all(|disk| disk.own == disk.size));
    }
}

/// Pseudo-random numbers, the same in every run (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// Threads concurrently create, grow, fail and delete disks. Every disk is written completely
/// before it is recorded.
fn threads_share_a_pool(ratio: f64) {
    const CAPACITY: u64 = 100;
    const BUFFER: u64 = 2;
    let admission = admission(BUFFER, ratio);
    let written = AtomicU64::new(0);
    let admit = |size: u64| admission.admit(gib(size), || Ok(space(CAPACITY, written.load(SeqCst), 0)));
    let write = |size: u64| {
        let before = written.fetch_add(size, SeqCst);
        assert!(
            before + size + BUFFER <= CAPACITY,
            "{size} GiB were admitted with {before} GiB written"
        );
    };
    let work = |seed: u64| {
        let mut numbers = Numbers(seed);
        let mut disks: Vec<u64> = Vec::new();
        let (mut made, mut refused) = (0, 0);
        for _ in 0..4000 {
            let pick = numbers.below(disks.len().max(1) as u64) as usize;
            match numbers.below(4) {
                0 | 1 => {
                    let size = 1 + numbers.below(30);
                    match admit(size) {
                        // Fails before writing anything.
                        Ok(admitted) if numbers.below(4) == 0 => drop(admitted),
                        Ok(admitted) => {
                            write(size);
                            admitted.commit();
                            disks.push(size);
                            made += 1;
                        }
                        Err(_) => refused += 1,
                    }
                }
                2 if !disks.is_empty() => {
                    let more = 1 + numbers.below(5);
                    if let Ok(admitted) = admit(more) {
                        write(more);
                        admitted.commit();
                        disks[pick] += more;
                    }
                }
                _ if !disks.is_empty() => {
                    let size = disks.swap_remove(pick);
                    written.fetch_sub(size, SeqCst);
                    admission.release(gib(size));
                }
                _ => {}
            }
            let Commitments { committed, reserved } = admission.commitments();
            assert!(committed + reserved <= admission.limit(gib(CAPACITY)));
            assert!(reserved + gib(BUFFER) <= gib(CAPACITY));
        }
        for size in disks {
            written.fetch_sub(size, SeqCst);
            admission.release(gib(size));
        }
        (made, refused)
    };
    let counts: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|seed| scope.spawn(move || work(seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(admission.commitments(), Commitments::default());
    assert_eq!(written.into_inner(), 0);
    // Checks that both admissions and refusals occurred often.
    let (made, refused) = counts
        .iter()
        .fold((0, 0), |(a, b), (made, refused)| (a + made, b + refused));
    assert!(made > 100 && refused > 100, "{made} made, {refused} refused");
}

#[test]
fn eight_threads_never_exceed_an_overcommitted_pool() {
    threads_share_a_pool(4.0);
}

#[test]
fn eight_threads_never_exceed_a_pool_with_a_ratio_of_one() {
    threads_share_a_pool(1.0);
}
