//! Deleting a disk in two steps: its name goes at once, its blocks follow.
//!
//! Freeing a large disk takes the kernel a while, so the file is kept open over its unlinking, and
//! the blocks go when it is closed. Should the program end in between, the kernel closes it; should
//! the host, what has no name is dropped at the next mount. Nothing is left to sweep.

use crate::error::StorageError;
use crate::files;
use crate::name::Name;
use crate::pool::Pool;
use crate::size::Bytes;
use crate::space::allocated;
use scalebox_fault_points::crash_point;
use std::fs::{self, File};
use std::io;

/// A disk that has no name any more, and still its blocks.
#[derive(Debug)]
#[must_use = "its blocks are free for sure only after Pool::reclaim"]
pub struct Unlinked {
    file: File,
}

impl Pool {
    /// Takes the name of the disk `id` away. `None` when there is no such disk: the goal is
    /// reached.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn unlink_disk(&self, id: &Name) -> Result<Option<Unlinked>, StorageError> {
        let path = self.disk_path(id);
        // For writing, because XFS has it cut off.
        let unlinked = files::open_write(&path).and_then(|disk| fs::remove_file(&path).map(|()| disk));
        match unlinked {
            Ok(file) => {
                crash_point("delete: disk's name gone");
                Ok(Some(Unlinked { file }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.require_mounted().map(|()| None),
            Err(error) => Err(StorageError::io("delete", path.display(), error)),
        }
    }

    /// Frees the blocks of a disk, and waits until the pool can give them to others. Blocks freed
    /// become writable only when btrfs commits its transaction, which it does by itself every 30 s:
    /// here that is not waited for.
    ///
    /// # Errors
    /// [`StorageError::Io`]; the disk is gone all the same.
    pub fn reclaim(&self, disk: Unlinked) -> Result<(), StorageError> {
        self.file_system
            .free(disk.file)
            .map_err(|error| StorageError::io("free a disk in", self.path().display(), error))?;
        crash_point("delete: blocks let go");
        self.commit()
    }

    /// Hands the free blocks that the image still owns on to the host disk. Returns how many the
    /// image gave up; it may have taken others meanwhile.
    ///
    /// # Errors
    /// [`StorageError::Command`], [`StorageError::Io`].
    pub fn hand_on(&self) -> Result<Bytes, StorageError> {
        let Some(image) = self.image() else {
            return Ok(Bytes::ZERO);
        };
        let before = allocated(image)?;
        // What was freed in the transaction under way, such as by a guest that trimmed a moment
        // ago, is not free for a trim before its commit.
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
