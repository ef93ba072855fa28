//! Admission: the decision that a disk fits, made before anything is created.
//!
//! Two bounds hold at every admission, with all concurrent requests counted:
//!
//! ```text
//! free − reserved                  ≥ size + buffer
//! committed + reserved + size      ≤ overcommit ratio × capacity
//! ```
//!
//! With a ratio of 1 or less, every committed byte is backed. A third bound ensures that:
//!
//! ```text
//! unreclaimable + committed + reserved + size + buffer ≤ worst-case capacity
//! ```
//!
//! The *worst-case capacity* is the data that pool and host disk can hold in total, with the
//! metadata for it in its worst case ([`Space::worst_case_capacity`]). The *unreclaimable usage* is
//! all used space that no commitment covers ([`Space::unreclaimable`]). That is all blocks except
//! those that a disk maps in extents referenced by nothing else.
//!
//! Why this is sufficient: take the moment of the decision, and any later moment at which the same
//! disks exist. Each block in use then is either part of the unreclaimable usage, or mapped by a
//! disk in an extent of its own. In the second case the disk mapped it before the decision, or the
//! guest wrote it since. A guest's write goes in place where the disk owns the block exclusively
//! (NOCOW). Where the block is shared or missing, the write goes to a new block, mapped at that
//! offset from then on. So each offset of a disk has at most one such block, and all of them
//! together are at most the committed size: used ≤ unreclaimable + committed. The bound keeps that
//! sum, plus the buffer, within the worst-case capacity. Operations that raise the unreclaimable
//! usage are admitted themselves: the import of a template for its data, and a snapshot for the
//! disk's blocks, which are shared from then on. Deleting a template changes nothing, because the
//! unreclaimable usage includes the extents that clones still share. Deleting a disk removes its
//! commitment and its blocks; the blocks it shared stay in the unreclaimable usage until the next
//! measurement.
//!
//! The argument does not cover a guest that discards parts of an extent of its own and writes them
//! again. The extent stays whole on disk, and the new blocks are additional. The next measurement
//! detects it: the unreclaimable usage rises, and that space can no longer be committed. Nor does
//! the argument cover another program that fills the host disk.
//!
//! A request holds a [`Reservation`] from its admission until its disk is recorded or the request
//! fails. Recording turns the reservation into a commitment; a failure drops the guard and releases
//! the space. Exactly one of the two happens, because the guard is consumed.

use crate::error::StorageError;
use crate::pool_size_error::PoolSizeError;
use crate::space::Space;
use scalebox_units::{Bytes, Gib};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The limits that admission enforces.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Space that is always left free.
    pub buffer: Gib,
    /// Multiple of the capacity that may be committed; with 1, every committed byte is backed.
    pub overcommit_ratio: f64,
}

/// Sums of committed and reserved sizes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Commitments {
    /// Provisioned sizes of the existing disks.
    pub committed: Bytes,
    /// Sizes admitted for requests in progress.
    pub reserved: Bytes,
}

/// The ledger of one pool. A clone is another handle on the same ledger.
#[derive(Debug, Clone)]
pub struct Admission {
    bounds: Bounds,
    // A std mutex: held for a few additions and one reading of the pool's space, never across an
    // await.
    ledger: Arc<Mutex<Ledger>>,
}

#[derive(Debug, Default)]
struct Ledger {
    commitments: Commitments,
    /// The size of the pool after a shrink in progress, which limits admission.
    ceiling: Option<Bytes>,
}

impl Ledger {
    /// Returns the space as it will be after the shrink in progress.
    fn after_shrink(&self, space: Space) -> Space {
        match self.ceiling {
            Some(ceiling) if ceiling < space.capacity => Space {
                free: space.free - (space.capacity - ceiling),
                capacity: ceiling,
                worst_case_capacity: space.worst_case_capacity - (space.capacity - ceiling),
                ..space
            },
            _ => space,
        }
    }
}

impl Admission {
    /// Creates an empty ledger.
    pub fn new(bounds: Bounds) -> Self {
        Admission {
            bounds,
            ledger: Arc::default(),
        }
    }

    /// Returns the limits of this ledger.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Returns the current sums.
    pub fn commitments(&self) -> Commitments {
        self.ledger().commitments
    }

    /// Returns the maximum of committed and reserved space together, for a pool of this capacity.
    pub fn limit(&self, capacity: Bytes) -> Bytes {
        capacity.scaled(self.bounds.overcommit_ratio)
    }

    /// Returns whether every committed byte must be backed.
    pub fn backs_every_byte(&self) -> bool {
        self.bounds.overcommit_ratio <= 1.0
    }

    /// Admits `size` if the bounds hold. `space` is called under the lock, so that no two requests
    /// count the same space twice; it should cost no more than a `statfs`.
    ///
    /// # Errors
    /// [`StorageError::Insufficient`], with nothing reserved; any error of `space`.
    pub fn admit(
        &self,
        size: Bytes,
        space: impl FnOnce() -> Result<Space, StorageError>,
    ) -> Result<Reservation, StorageError> {
        self.admit_between(size, size, space)
    }

    /// Admits `max`, or as many whole GiB below it as fit, but no less than `min`. Otherwise the
    /// same as [`Admission::admit`].
    ///
    /// # Errors
    /// Those of [`Admission::admit`], for `min`.
    pub fn admit_between(
        &self,
        min: Bytes,
        max: Bytes,
        space: impl FnOnce() -> Result<Space, StorageError>,
    ) -> Result<Reservation, StorageError> {
        let mut ledger = self.ledger();
        let space = ledger.after_shrink(space()?);
        let Commitments { committed, reserved } = ledger.commitments;
        let writable = space.free - reserved;
        let promisable = self.limit(space.capacity) - committed - reserved;
        let backed = if self.backs_every_byte() {
            space.worst_case_capacity - space.unreclaimable - committed - reserved
        } else {
            Bytes::new(u64::MAX)
        };
        let buffer = self.bounds.buffer.bytes();
        let fits = promisable.min(writable.min(backed) - buffer);
        let size = if max <= fits {
            max
        } else {
            min.max(fits.floor_gib().bytes())
        };
        if writable.min(backed) < size + buffer || promisable < size {
            return Err(StorageError::Insufficient {
                available: writable.min(promisable).min(backed).floor_gib(),
                need: size.ceil_gib() + self.bounds.buffer,
            });
        }
        ledger.commitments.reserved += size;
        Ok(Reservation {
            size,
            ledger: self.clone(),
        })
    }

    /// Adds an existing disk, at start.
    pub fn restore(&self, size: Bytes) {
        self.ledger().commitments.committed += size;
    }

    /// Removes a deleted disk.
    pub fn release(&self, size: Bytes) {
        let mut ledger = self.ledger();
        debug_assert!(ledger.commitments.committed >= size, "released more than was committed");
        ledger.commitments.committed = ledger.commitments.committed - size;
    }

    /// Limits admission to a pool of `size` until the guard is dropped; for use before a shrink.
    /// `fits` receives the sum of committed and reserved space, and checks that it fits together
    /// with the used data; if not, it returns the required size.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when the used data, or the committed and reserved space, does not
    /// fit; any error of `fits`.
    pub fn lower_ceiling(
        &self,
        size: Bytes,
        fits: impl FnOnce(Bytes) -> Result<Result<(), Gib>, StorageError>,
    ) -> Result<LoweredCeiling, StorageError> {
        let mut ledger = self.ledger();
        let promised = ledger.commitments.committed + ledger.commitments.reserved;
        if promised > self.limit(size) {
            let limit = self.limit(size);
            return Err(PoolSizeError::Overcommitted { promised, size, limit }.into());
        }
        if let Err(needed) = fits(promised)? {
            let kept_free = self.bounds.buffer;
            return Err(PoolSizeError::UnderData {
                size,
                kept_free,
                needed,
            }
            .into());
        }
        ledger.ceiling = Some(size);
        Ok(LoweredCeiling {
            admission: self.clone(),
        })
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // No code under the lock panics between two writes, so the sums are consistent even if a
        // holder panicked.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A shrink in progress. Dropping it lifts the limit on admission.
#[derive(Debug)]
#[must_use = "dropping it lifts the limit on admission"]
pub struct LoweredCeiling {
    admission: Admission,
}

impl Drop for LoweredCeiling {
    fn drop(&mut self) {
        self.admission.ledger().ceiling = None;
    }
}

/// Space admitted for a request in progress. Dropping it releases the space.
#[derive(Debug)]
#[must_use = "dropping a reservation releases its space"]
pub struct Reservation {
    size: Bytes,
    ledger: Admission,
}

impl Reservation {
    /// Returns the admitted size.
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// Turns the reservation into a commitment, in one step under the lock. Call it when the disk
    /// exists and is recorded.
    pub fn commit(mut self) {
        let size = std::mem::take(&mut self.size);
        let mut ledger = self.ledger.ledger();
        ledger.commitments.reserved = ledger.commitments.reserved - size;
        ledger.commitments.committed += size;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut ledger = self.ledger.ledger();
        ledger.commitments.reserved = ledger.commitments.reserved - self.size;
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
            worst_case_capacity: Gib::new(capacity).bytes(),
            unreclaimable: Bytes::ZERO,
        }
    }

    fn admission(buffer: u64, overcommit_ratio: f64) -> Admission {
        Admission::new(Bounds {
            buffer: Gib::new(buffer),
            overcommit_ratio,
        })
    }

    #[test]
    fn refusals_have_the_message_of_the_seed() {
        let error = admission(2, 4.0)
            .admit(Gib::new(10).bytes(), || Ok(space(30, 5)))
            .unwrap_err();
        assert_eq!(error.to_string(), "Insufficient storage: 5GB available, need 12GB");
    }

    #[test]
    fn two_requests_cannot_both_get_the_last_gigabyte() {
        let admission = admission(2, 4.0);
        let first = admission.admit(Gib::new(10).bytes(), || Ok(space(30, 13))).unwrap();
        assert!(admission.admit(Gib::new(10).bytes(), || Ok(space(30, 13))).is_err());
        drop(first);
        assert!(admission.admit(Gib::new(10).bytes(), || Ok(space(30, 13))).is_ok());
    }

    #[test]
    fn a_range_is_admitted_as_far_as_it_fits() {
        let gib = |count| Gib::new(count).bytes();
        let admission = admission(2, 4.0);
        let admit = |min, max, free| {
            let admitted = admission.admit_between(gib(min), gib(max), || Ok(space(30, free)));
            admitted.map(|reservation| reservation.size())
        };
        assert_eq!(admit(1, 10, 20).unwrap(), gib(10));
        assert_eq!(admit(1, 10, 8).unwrap(), gib(6));
        assert_eq!(admit(6, 10, 8).unwrap(), gib(6));
        let refused = admit(7, 10, 8).unwrap_err();
        assert_eq!(refused.to_string(), "Insufficient storage: 8GB available, need 9GB");
        assert!(admit(1, 10, 2).is_err(), "the buffer stays free");
    }

    #[test]
    fn a_ratio_of_one_never_commits_a_byte_twice() {
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
    fn admission_counts_with_the_smaller_size_during_a_shrink() {
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
        assert!(refused.to_string().contains("20 GiB are committed"), "{refused}");
        let refused = admission
            .lower_ceiling(Gib::new(40).bytes(), |_| Ok(Err(Gib::new(50))))
            .unwrap_err();
        assert!(refused.to_string().contains("at least 50 GiB"), "{refused}");
        assert!(
            admission.admit(Gib::new(30).bytes(), room).is_ok(),
            "a refused shrink does not limit admission"
        );
    }

    #[test]
    fn the_exact_free_space_is_admitted_and_one_byte_more_is_refused() {
        let room = || Ok(space(100, 12));
        assert!(admission(2, 4.0).admit(Gib::new(10).bytes(), room).is_ok());
        assert!(
            admission(2, 4.0)
                .admit(Gib::new(10).bytes() + Bytes::new(1), room)
                .is_err()
        );
    }

    #[test]
    fn a_ratio_of_one_does_not_commit_the_space_of_templates() {
        let room = |unreclaimable| {
            move || {
                Ok(Space {
                    unreclaimable: Gib::new(unreclaimable).bytes(),
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
            "an overcommitted pool does not count it"
        );
    }
}
