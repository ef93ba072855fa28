//! Space reserved for the moment when the disk of `STATE_DIR` is full.
//!
//! A deletion has to be recorded before it frees space. Therefore a file without content holds some
//! blocks, which are released when a change does not fit on the disk.

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The size of the reserve: some thousand deletions.
const RESERVE_BYTES: u64 = 8 << 20;
/// Minimum free space for creating the reserve, which would otherwise cause a shortage itself.
const MIN_FREE_BYTES: u64 = 8 * RESERVE_BYTES;

/// The file that holds the reserved space, present or released.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// Creates a handle on the reserve in `folder`.
    pub(super) fn at(folder: &Path) -> Reserve {
        Reserve {
            path: folder.join("reserve"),
        }
    }

    /// Creates the reserve if it is missing and the disk has space for it.
    pub(super) fn ensure(&self) {
        if let Err(error) = self.make() {
            tracing::warn!(path = %self.path.display(), %error, "cannot reserve space on the disk of STATE_DIR: deleting a VM may fail while that disk is full");
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
            // A partial reserve is removed; the next start creates a complete one.
            let _absent = fs::remove_file(&self.path);
        })
    }

    /// Releases the reserved space. Returns whether there was any.
    pub(super) fn release(&self) -> bool {
        let released = fs::remove_file(&self.path).is_ok();
        if released {
            tracing::error!(
                path = %self.path.display(),
                "the disk of STATE_DIR is full, and the reserved space is now in use: delete VMs or files there"
            );
        }
        released
    }
}
