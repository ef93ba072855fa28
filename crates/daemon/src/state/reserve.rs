//! Room kept for the moment in which the disk of `STATE_DIR` is full.
//!
//! A deletion has to be written down before it makes room. So some blocks are held by a file of no
//! content, and given up when a change cannot be written for lack of space.

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The size of the file: some thousand deletions.
const RESERVE_BYTES: u64 = 8 << 20;
/// With less than this free, no reserve is made: it would cause the shortage that it is for.
const MIN_FREE_BYTES: u64 = 8 * RESERVE_BYTES;

/// The file that holds the room, present or released.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// The reserve in `folder`.
    pub(super) fn at(folder: &Path) -> Reserve {
        Reserve {
            path: folder.join("reserve"),
        }
    }

    /// Makes the reserve unless it is there, if the disk has room for it.
    pub(super) fn ensure(&self) {
        if let Err(error) = self.make() {
            tracing::warn!(path = %self.path.display(), %error, "no room is reserved for the case that the disk of STATE_DIR is full");
        }
    }

    fn make(&self) -> io::Result<()> {
        if fs::metadata(&self.path).is_ok_and(|meta| meta.len() >= RESERVE_BYTES) {
            return Ok(());
        }
        let folder = self.path.parent().unwrap_or(&self.path);
        let stat = statvfs(folder)?;
        if stat.f_bavail.saturating_mul(stat.f_frsize) < MIN_FREE_BYTES {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let made =
            File::create(&self.path).and_then(|file| Ok(fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES)?));
        made.inspect_err(|_| {
            // A smaller one is made whole at the next start.
            let _absent = fs::remove_file(&self.path);
        })
    }

    /// Gives the room up. Returns whether there was any.
    pub(super) fn release(&self) -> bool {
        let released = fs::remove_file(&self.path).is_ok();
        if released {
            tracing::error!(
                path = %self.path.display(),
                "the disk of STATE_DIR is full: the room reserved for that is used up now; delete VMs or files there"
            );
        }
        released
    }
}
