//! Deletes a disk in two steps: first its name, then its blocks.
//!
//! Freeing a large disk takes the kernel a while. So the file stays open while it is unlinked, and
//! its blocks are freed when it is closed. If the program ends in between, the kernel closes the
//! file; if the host crashes, the next mount drops files without a name. So a sweep finds no
//! leftover.

use crate::error::StorageError;
use crate::local::files;
use crate::local::space::allocated;
use crate::pool::Pool;
use scalebox_fault_points::crash_point;
use scalebox_units::{Bytes, VmId};
use std::fs::{self, File};
use std::io;

/// A disk without a name that still has its blocks.
#[derive(Debug)]
#[must_use = "its blocks are certain to be free only after Pool::reclaim"]
pub struct UnlinkedDisk {
    file: File,
}

impl Pool {
    /// Removes the name of the disk `id`. Returns `None` if the disk does not exist: nothing is
    /// left to do.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn unlink_disk(&self, id: &VmId) -> Result<Option<UnlinkedDisk>, StorageError> {
        let path = self.disk_path(id);
        // The file is opened for writing, because on XFS it is truncated later.
        let unlinked = files::open_write(&path).and_then(|disk| fs::remove_file(&path).map(|()| disk));
        match unlinked {
            Ok(file) => {
                crash_point("delete: disk's name gone");
                Ok(Some(UnlinkedDisk { file }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.require_mounted().map(|()| None),
            Err(error) => Err(StorageError::io("delete", path.display(), error)),
        }
    }

    /// Frees the blocks of a disk, and waits until they are available in the pool. On btrfs, freed
    /// blocks are writable only after a commit, by default every 30 s; this function commits at
    /// once.
    ///
    /// # Errors
    /// [`StorageError::Io`]; the disk is deleted nevertheless.
    pub fn reclaim(&self, disk: UnlinkedDisk) -> Result<(), StorageError> {
        self.file_system
            .free(disk.file)
            .map_err(|error| StorageError::io("free a disk in", self.path().display(), error))?;
        crash_point("delete: disk closed");
        self.commit()
    }

    /// Discards free blocks that the image still owns, returning them to the host disk. Returns by
    /// how much the image shrank on the host disk; concurrent writes may have grown it meanwhile.
    ///
    /// # Errors
    /// [`StorageError::Program`], [`StorageError::Io`].
    pub fn discard_free_blocks(&self) -> Result<Bytes, StorageError> {
        let Some(image) = self.image() else {
            return Ok(Bytes::ZERO);
        };
        let before = allocated(image)?;
        // Blocks freed in the current transaction, for example by a guest's trim a moment ago,
        // cannot be trimmed before its commit.
        self.commit()?;
        self.trim()?;
        Ok(before - allocated(image)?)
    }

    fn commit(&self) -> Result<(), StorageError> {
        self.file_system
            .commit(&self.dir)
            .map_err(|errno| StorageError::io("flush", self.path().display(), errno.into()))
    }
}
