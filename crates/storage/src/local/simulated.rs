//! Stands in for a pool's file system in tests of other crates: any folder, for any user.
//!
//! Clones are copies. The test sets the space, independent of the disks.

use crate::local::fiemap::Mapped;
use crate::local::files::allocated_of;
use crate::space::Space;
use rustix::io;
use scalebox_units::Bytes;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The space of a simulated pool, set by a test.
///
/// Clones of this handle belong to the same pool. Disks that are created or deleted do not change
/// its numbers.
#[derive(Debug, Clone)]
pub struct SimulatedSpace(Arc<Mutex<Numbers>>);

#[derive(Debug, Clone, Copy)]
struct Numbers {
    capacity: Bytes,
    free: Bytes,
}

impl SimulatedSpace {
    /// Creates the space of an empty pool of this capacity.
    pub fn new(capacity: Bytes) -> SimulatedSpace {
        let free = capacity;
        SimulatedSpace(Arc::new(Mutex::new(Numbers { capacity, free })))
    }

    /// Sets the capacity, and how much of it can be written.
    pub fn set(&self, capacity: Bytes, free: Bytes) {
        let free = free.min(capacity);
        *self.lock() = Numbers { capacity, free };
    }

    /// Sets how much can be written.
    pub fn set_free(&self, free: Bytes) {
        let capacity = self.lock().capacity;
        self.set(capacity, free);
    }

    pub(crate) fn read(&self) -> Space {
        let Numbers { capacity, free } = *self.lock();
        let used = capacity - free;
        Space {
            capacity,
            used,
            free,
            pool_free: free,
            host_free: None,
            unallocated: Bytes::ZERO,
            metadata_total: Bytes::ZERO,
            metadata_used: Bytes::ZERO,
            worst_case_capacity: capacity,
            unreclaimable: used,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds the space of `file` as one range that no other file maps.
pub(crate) fn map(file: &File, inode: u64, mapped: &mut Vec<Mapped>) -> io::Result<()> {
    let start = mapped.last().map_or(0, |last| last.start + last.length);
    let length = allocated_of(file)?.as_u64();
    mapped.push(Mapped { inode, start, length });
    Ok(())
}
