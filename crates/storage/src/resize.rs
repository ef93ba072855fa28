//! A pool that grows and shrinks while it is in use, and gives freed blocks back to the host disk.
//!
//! Three layers have to agree: the image, the loop device over it, the file system on that. Growing goes up through them, shrinking
//! down; after a crash in between, [`Pool::agree`] makes the file system as large as the image is.

use crate::command::{self, Program};
use crate::error::StorageError;
use crate::pool::Pool;
use crate::size::{Bytes, Gib};
use crate::sizing::{LARGEST, SHARE_PERCENT};
use crate::space::{allocated, available};
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::path::Path;
use std::sync::{MutexGuard, TryLockError};

/// btrfs wants some unallocated room to move chunks about in, beyond what is used: one data chunk.
const ROOM_TO_MOVE: Gib = Gib::new(1);

impl Pool {
    /// Grows the pool to `size`, or to what the 80 % rule gives on today's host disk, online.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when that is no growth, or more than the host disk can ever hold; [`StorageError::NoImage`],
    /// [`StorageError::Busy`] while another change of size is under way.
    pub fn grow(&self, size: Option<Gib>) -> Result<(), StorageError> {
        let _changing = self.begin_resize()?;
        let image = self.require_image()?;
        let current = image_size(image)?;
        let holdable = available(image)? + allocated(image)?;
        let size = size.unwrap_or_else(|| {
            let share = Gib::new(holdable.floor_gib().as_u64() * SHARE_PERCENT / 100);
            share.min(LARGEST)
        });
        if size.bytes() <= current {
            return Err(StorageError::PoolSize(format!(
                "the pool has {current}: {size} GiB is no growth; free space on the host disk, or name a larger size"
            )));
        }
        if size.bytes() + self.bounds().buffer.bytes() > holdable {
            return Err(StorageError::PoolSize(format!(
                "the host disk can hold a pool of at most {} GiB and keep {} GiB free: {size} GiB is too large",
                (holdable - self.bounds().buffer.bytes()).floor_gib(),
                self.bounds().buffer
            )));
        }
        set_image_size(image, size.bytes())?;
        self.agree()
    }

    /// Shrinks the pool to `size`, online: what lies behind it is moved first, which can take minutes. The image becomes smaller too.
    /// While that lasts, admission counts with the smaller size already.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when what is used, promised or kept free would not fit, and nothing is changed; [`StorageError::NoImage`],
    /// [`StorageError::Busy`] while another change of size is under way.
    pub fn shrink(&self, size: Gib) -> Result<(), StorageError> {
        let _changing = self.begin_resize()?;
        let image = self.require_image()?;
        let current = image_size(image)?;
        if size.bytes() >= current {
            return Err(StorageError::PoolSize(format!(
                "the pool has {current}: {size} GiB is no shrinking"
            )));
        }
        // From here on nothing is admitted that would not fit; taken back if it comes to nothing.
        let lowered = self.lower_ceiling(size.bytes(), || {
            let space = self.space()?;
            let needed = space.used
                + space.metadata_total
                + space.metadata_total
                + self.bounds().buffer.bytes()
                + ROOM_TO_MOVE.bytes();
            Ok((needed <= size.bytes()).then_some(()).ok_or(needed.ceil_gib()))
        })?;
        let bytes = size.bytes().as_u64().to_string();
        self.btrfs(&["filesystem", "resize", &bytes])?;
        set_image_size(image, size.bytes())?;
        self.refresh_device()?;
        drop(lowered);
        Ok(())
    }

    /// Hands all free blocks of the pool back to the host disk. Returns how much was handed on, what the host had already included.
    ///
    /// # Errors
    /// [`StorageError::Command`].
    pub fn trim(&self) -> Result<Bytes, StorageError> {
        self.require_mounted()?;
        let said = command::run(Program::Fstrim, [OsStr::new("--verbose"), self.path().as_os_str()])?;
        // `/var/lib/scalebox: 1.2 GiB (1288490188 bytes) trimmed`
        let bytes = said
            .rsplit_once('(')
            .and_then(|(_, rest)| rest.split_once(" bytes")?.0.parse().ok());
        Ok(Bytes::new(bytes.unwrap_or(0)))
    }

    /// Makes loop device and file system as large as the image: what a crash between the steps of a change left, and the second half of
    /// a growth.
    ///
    /// # Errors
    /// [`StorageError::Command`].
    pub fn agree(&self) -> Result<(), StorageError> {
        let Some(image) = self.image() else { return Ok(()) };
        if self.space()?.capacity >= image_size(image)? {
            return Ok(());
        }
        self.refresh_device()?;
        self.btrfs(&["filesystem", "resize", "max"])
    }

    fn begin_resize(&self) -> Result<MutexGuard<'_, ()>, StorageError> {
        self.require_mounted()?;
        match self.resizing.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(StorageError::Busy(self.path().to_owned())),
        }
    }

    fn require_image(&self) -> Result<&Path, StorageError> {
        self.image()
            .ok_or_else(|| StorageError::NoImage(self.path().to_owned()))
    }

    fn refresh_device(&self) -> Result<(), StorageError> {
        command::run(
            Program::Losetup,
            [OsStr::new("--set-capacity"), self.device.as_os_str()],
        )?;
        Ok(())
    }

    fn btrfs(&self, args: &[&str]) -> Result<(), StorageError> {
        command::run(
            Program::Btrfs,
            args.iter().map(OsStr::new).chain([self.path().as_os_str()]),
        )?;
        Ok(())
    }
}

fn image_size(image: &Path) -> Result<Bytes, StorageError> {
    let meta = fs::metadata(image).map_err(|error| StorageError::io("read", image.display(), error))?;
    Ok(Bytes::new(meta.len()))
}

fn set_image_size(image: &Path, size: Bytes) -> Result<(), StorageError> {
    OpenOptions::new()
        .write(true)
        .open(image)
        .and_then(|file| file.set_len(size.as_u64()).and_then(|()| file.sync_all()))
        .map_err(|error| StorageError::io("resize", image.display(), error))
}
