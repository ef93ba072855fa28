//! Admission: the decision, before anything is made, that a disk fits.
//!
//! Two bounds hold at every admission, with every request under way counted:
//!
//! ```text
//! free − reserved                  ≥ size + buffer
//! committed + reserved + size      ≤ overcommit ratio × capacity
//! ```
//!
//! Under a ratio of 1 or less, every promised byte is backed, and a third bound says so:
//!
//! ```text
//! fixed + committed + reserved + size + buffer ≤ backable
//! ```
//!
//! *Backable* is the data that pool and host disk can hold in all, with the metadata for it in its
//! worst case ([`Space::backable`]). *Fixed* is what is used and no promise covers
//! ([`Space::fixed`]): all but the blocks that a disk maps in extents which nothing else refers to.
//!
//! Why it is enough. Take the moment of the decision, and any later one at which the same disks are
//! there. A block in use then is either part of what was fixed, or a disk maps it in an extent of
//! its own: it was mapped so before, or the guest wrote it since. A guest's write goes in place
//! where the disk has the block to itself (NOCOW), and to a new block, mapped at that offset from
//! then on, where it shares it or had none. So at most one such block stands at each offset of a
//! disk, and all of them together are at most what was promised: used ≤ fixed + promised. The bound
//! keeps that, and the buffer, within what can be held. What changes *fixed* is admitted itself: a
//! template's data when it is imported, a disk's when it becomes a template (its blocks are shared
//! from then on). A template deleted changes nothing, for fixed counts the extents that clones
//! still share. A deleted disk takes its promise and its blocks along; what it shared stays in
//! fixed until it is measured anew.
//!
//! What the argument does not cover: a guest that discards parts of an extent of its own and writes
//! them again. The extent stays whole on disk, and the new blocks are further ones. The next
//! measurement finds it: fixed grows, and nothing is promised on it. Nor does it cover another
//! program that fills the host disk.
//!
//! A request holds a [`Reservation`] from its admission until its disk is recorded (it becomes a
//! commitment) or it fails (the guard is dropped, and the space is there again). Either happens
//! exactly once, because the guard is consumed.

use crate::error::StorageError;
use crate::size::{Bytes, Gib};
use crate::space::Space;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What admission is held to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Space that is always left free.
    pub buffer: Gib,
    /// How many times the capacity may be promised; 1 backs every promised byte.
    pub overcommit_ratio: f64,
}

/// Sums of what was promised, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Promises {
    /// Provisioned sizes of the disks there are.
    pub committed: Bytes,
    /// Admitted to requests that are under way.
    pub reserved: Bytes,
}

/// The books of one pool. Cloning gives another handle on the same books.
#[derive(Debug, Clone)]
pub struct Admission {
    bounds: Bounds,
    // A std mutex: held for a few additions and one reading of the pool's space, never across an
    // await.
    books: Arc<Mutex<Books>>,
}

#[derive(Debug, Default)]
struct Books {
    promises: Promises,
    /// The size of the pool to count with while it is being shrunk to that.
    ceiling: Option<Bytes>,
}

impl Books {
    /// The space as it will be when a shrinking under way is done.
    fn foreseen(&self, space: Space) -> Space {
        match self.ceiling {
            Some(ceiling) if ceiling < space.capacity => Space {
                free: space.free - (space.capacity - ceiling),
                capacity: ceiling,
                backable: space.backable - (space.capacity - ceiling),
                ..space
            },
            _ => space,
        }
    }
}

impl Admission {
    /// Empty books.
    pub fn new(bounds: Bounds) -> Self {
        Admission {
            bounds,
            books: Arc::default(),
        }
    }

    /// The bounds the books are held to.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// What stands in the books now.
    pub fn promises(&self) -> Promises {
        self.books().promises
    }

    /// The largest sum of promises on a pool of this capacity.
    pub fn limit(&self, capacity: Bytes) -> Bytes {
        capacity.scaled(self.bounds.overcommit_ratio)
    }

    /// Whether every promised byte has to be backed.
    pub fn backs_every_byte(&self) -> bool {
        self.bounds.overcommit_ratio <= 1.0
    }

    /// Admits `size` if the bounds hold. `space` is read under the lock, so that no two requests
    /// are shown the same gigabyte; it should cost no more than a `statfs`.
    ///
    /// # Errors
    /// [`StorageError::Insufficient`], with nothing reserved; whatever `space` fails with.
    pub fn admit(
        &self,
        size: Bytes,
        space: impl FnOnce() -> Result<Space, StorageError>,
    ) -> Result<Reservation, StorageError> {
        let mut books = self.books();
        let space = books.foreseen(space()?);
        let Promises { committed, reserved } = books.promises;
        let writable = space.free - reserved;
        let promisable = self.limit(space.capacity) - committed - reserved;
        let backed = if self.backs_every_byte() {
            space.backable - space.fixed - committed - reserved
        } else {
            Bytes::new(u64::MAX)
        };
        if writable.min(backed) < size + self.bounds.buffer.bytes() || promisable < size {
            return Err(StorageError::Insufficient {
                available: writable.min(promisable).min(backed).floor_gib(),
                need: size.ceil_gib() + self.bounds.buffer,
            });
        }
        books.promises.reserved += size;
        Ok(Reservation {
            size,
            books: self.clone(),
        })
    }

    /// Enters a disk that is there already, at start.
    pub fn restore(&self, size: Bytes) {
        self.books().promises.committed += size;
    }

    /// Strikes out a disk that was deleted.
    pub fn release(&self, size: Bytes) {
        let mut books = self.books();
        debug_assert!(books.promises.committed >= size, "more is released than was committed");
        books.promises.committed = books.promises.committed - size;
    }

    /// Counts with a pool of `size` from now on, until the guard is dropped: the pool is about to
    /// be shrunk to that. `fits` is given the sum of promises, and says whether they and what is
    /// used will fit, or what size would do.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when what is used or promised would not fit; whatever `fits`
    /// fails with.
    pub fn lower_ceiling(
        &self,
        size: Bytes,
        fits: impl FnOnce(Bytes) -> Result<Result<(), Gib>, StorageError>,
    ) -> Result<LoweredCeiling, StorageError> {
        let mut books = self.books();
        let promised = books.promises.committed + books.promises.reserved;
        if promised > self.limit(size) {
            return Err(StorageError::PoolSize(format!(
                "VMs were promised {promised}, and a pool of {size} may be promised at most {}: delete some, or shrink it less",
                self.limit(size)
            )));
        }
        if let Err(needed) = fits(promised)? {
            return Err(StorageError::PoolSize(format!(
                "a pool of {size} cannot hold what is used and promised and keep {} GiB free: at least {needed} GiB are needed",
                self.bounds.buffer
            )));
        }
        books.ceiling = Some(size);
        Ok(LoweredCeiling {
            admission: self.clone(),
        })
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Nothing in here panics between two writes, so the sums are whole even after a panic
        // elsewhere in a holder.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pool that is being shrunk; dropped, admission counts with what the pool has.
#[derive(Debug)]
#[must_use = "dropping it lets admission count with the larger size again"]
pub struct LoweredCeiling {
    admission: Admission,
}

impl Drop for LoweredCeiling {
    fn drop(&mut self) {
        self.admission.books().ceiling = None;
    }
}

/// Space admitted to a request that is under way. Dropped, it is given back.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its space back"]
pub struct Reservation {
    size: Bytes,
    books: Admission,
}

impl Reservation {
    /// How much was admitted.
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// The disk stands and is recorded: the reservation becomes a commitment, in one step under the
    /// lock.
    pub fn commit(mut self) {
        let size = std::mem::take(&mut self.size);
        let mut books = self.books.books();
        books.promises.reserved = books.promises.reserved - size;
        books.promises.committed += size;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut books = self.books.books();
        books.promises.reserved = books.promises.reserved - self.size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(capacity: u64, free: u64) -> Space {
        Space {
            capacity: Gib::new(capacity).bytes(),
            used: Bytes::ZERO,
            free: Gib::new(free).bytes(),
            pool_free: Gib::new(free).bytes(),
            host_free: None,
            unallocated: Bytes::ZERO,
            metadata_total: Bytes::ZERO,
            metadata_used: Bytes::ZERO,
            backable: Gib::new(capacity).bytes(),
            fixed: Bytes::ZERO,
        }
    }

    fn admission(buffer: u64, overcommit_ratio: f64) -> Admission {
        Admission::new(Bounds {
            buffer: Gib::new(buffer),
            overcommit_ratio,
        })
    }

    #[test]
    fn a_refusal_is_in_the_words_of_the_seed() {
        let error = admission(2, 4.0)
            .admit(Gib::new(10).bytes(), || Ok(space(30, 5)))
            .unwrap_err();
        assert_eq!(error.to_string(), "Insufficient storage: 5GB available, need 12GB");
    }

    #[test]
    fn two_requests_cannot_share_the_last_gigabyte() {
        let admission = admission(2, 4.0);
        let first = admission.admit(Gib::new(10).bytes(), || Ok(space(30, 13))).unwrap();
        assert!(admission.admit(Gib::new(10).bytes(), || Ok(space(30, 13))).is_err());
        drop(first);
        assert!(admission.admit(Gib::new(10).bytes(), || Ok(space(30, 13))).is_ok());
    }

    #[test]
    fn with_a_ratio_of_one_nothing_is_promised_twice() {
        let admission = admission(2, 1.0);
        admission
            .admit(Gib::new(20).bytes(), || Ok(space(30, 30)))
            .unwrap()
            .commit();
        let error = admission.admit(Gib::new(20).bytes(), || Ok(space(30, 30))).unwrap_err();
        assert_eq!(error.to_string(), "Insufficient storage: 10GB available, need 22GB");
        admission.release(Gib::new(20).bytes());
        assert!(admission.admit(Gib::new(20).bytes(), || Ok(space(30, 30))).is_ok());
    }

    #[test]
    fn a_pool_about_to_shrink_is_counted_as_shrunk_already() {
        let admission = admission(2, 1.0);
        let room = || Ok(space(60, 60));
        admission.admit(Gib::new(20).bytes(), room).unwrap().commit();
        let lowered = admission.lower_ceiling(Gib::new(40).bytes(), |_| Ok(Ok(()))).unwrap();
        assert!(admission.admit(Gib::new(30).bytes(), room).is_err());
        drop(lowered);
        assert!(admission.admit(Gib::new(30).bytes(), room).is_ok());
        let refused = admission
            .lower_ceiling(Gib::new(10).bytes(), |_| Ok(Ok(())))
            .unwrap_err();
        assert!(refused.to_string().contains("promised 20 GiB"), "{refused}");
        let refused = admission
            .lower_ceiling(Gib::new(40).bytes(), |_| Ok(Err(Gib::new(50))))
            .unwrap_err();
        assert!(refused.to_string().contains("at least 50 GiB"), "{refused}");
        assert!(
            admission.admit(Gib::new(30).bytes(), room).is_ok(),
            "a refusal lowers nothing"
        );
    }

    #[test]
    fn exactly_what_is_left_is_admitted_and_a_byte_more_is_not() {
        let room = || Ok(space(100, 12));
        assert!(admission(2, 4.0).admit(Gib::new(10).bytes(), room).is_ok());
        assert!(
            admission(2, 4.0)
                .admit(Gib::new(10).bytes() + Bytes::new(1), room)
                .is_err()
        );
    }

    #[test]
    fn with_a_ratio_of_one_what_templates_take_is_promised_to_nobody() {
        let room = |fixed| {
            move || {
                Ok(Space {
                    fixed: Gib::new(fixed).bytes(),
                    ..space(30, 30)
                })
            }
        };
        let size = Gib::new(20).bytes();
        assert!(admission(2, 1.0).admit(size, room(8)).is_ok());
        let error = admission(2, 1.0).admit(size, room(9)).unwrap_err();
        assert_eq!(error.to_string(), "Insufficient storage: 21GB available, need 22GB");
        assert!(
            admission(2, 1.01).admit(size, room(9)).is_ok(),
            "overcommitted, it is the guests' risk"
        );
    }
}
