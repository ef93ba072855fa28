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
use scalebox_crash_points::crash_point;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
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
        let holdable = holdable(image)?;
        let size = size.unwrap_or_else(|| share_of(holdable));
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
        crash_point("pool grow: image larger");
        self.agree()
    }

    /// Grows the pool to what the 80 % rule gives on today's host disk, if that is at least a GiB more than it has. Returns whether it did:
    /// a pool that is as large as it may be, that has no image, or whose size is being changed already stays as it is.
    ///
    /// # Errors
    /// [`StorageError::NotMounted`], [`StorageError::Io`], [`StorageError::Command`].
    pub fn extend(&self) -> Result<bool, StorageError> {
        let Some(image) = self.image() else { return Ok(false) };
        let _changing = match self.begin_resize() {
            Err(StorageError::Busy(_)) => return Ok(false),
            other => other?,
        };
        let holdable = holdable(image)?;
        let kept_free = (holdable - self.bounds().buffer.bytes()).floor_gib();
        let size = share_of(holdable).min(kept_free).bytes();
        if size < image_size(image)? + Gib::new(1).bytes() {
            return Ok(false);
        }
        set_image_size(image, size)?;
        self.agree()?;
        Ok(true)
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
        let lowered = self.lower_ceiling(size.bytes(), |promised| {
            let space = self.space()?;
            let needed = space.used
                + space.metadata_total
                + space.metadata_total
                + self.bounds().buffer.bytes()
                + ROOM_TO_MOVE.bytes();
            // With every promise backed, the guests' blocks that are yet to come count as those that are there.
            let backed = match self.bounds().overcommit_ratio {
                ratio if ratio <= 1.0 => {
                    let overhead = space.capacity - space.backable;
                    space.fixed + promised + self.bounds().buffer.bytes() + overhead
                }
                _ => Bytes::ZERO,
            };
            let needed = needed.max(backed);
            Ok((needed <= size.bytes()).then_some(()).ok_or(needed.ceil_gib()))
        })?;
        let bytes = size.bytes().as_u64().to_string();
        crash_point("pool shrink: ceiling lowered");
        self.btrfs(&["filesystem", "resize", &bytes])?;
        crash_point("pool shrink: file system smaller");
        set_image_size(image, size.bytes())?;
        crash_point("pool shrink: image smaller");
        self.refresh_device()?;
        crash_point("pool shrink: device smaller");
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
        let size = image_size(image)?;
        if self.device_size()? != size {
            self.refresh_device()?;
            crash_point("pool grow: device larger");
        }
        if self.space()?.capacity < size {
            self.btrfs(&["filesystem", "resize", "max"])?;
            crash_point("pool grow: file system larger");
        }
        Ok(())
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

    fn device_size(&self) -> Result<Bytes, StorageError> {
        let attribute = Path::new("/sys/class/block")
            .join(self.device.file_name().unwrap_or_default())
            .join("size");
        let read = fs::read_to_string(&attribute).and_then(|sectors| {
            sectors
                .trim()
                .parse()
                .map_err(|_| io::Error::other("it is not a number"))
        });
        // The kernel counts in sectors of 512 bytes, whatever the device's own are.
        read.map(|sectors| Bytes::from_blocks(sectors, 512))
            .map_err(|error| StorageError::io("read", attribute.display(), error))
    }

    fn btrfs(&self, args: &[&str]) -> Result<(), StorageError> {
        command::run(
            Program::Btrfs,
            args.iter().map(OsStr::new).chain([self.path().as_os_str()]),
        )?;
        Ok(())
    }
}

/// What the host disk could hold of the image at most.
fn holdable(image: &Path) -> Result<Bytes, StorageError> {
    Ok(available(image)? + allocated(image)?)
}

/// The 80 % rule, without its lower bound: the pool is there already.
fn share_of(holdable: Bytes) -> Gib {
    let share = Gib::new(holdable.floor_gib().as_u64() * SHARE_PERCENT / 100);
    share.min(LARGEST)
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
