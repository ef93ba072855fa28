//! A pool that grows and shrinks while it is in use, and gives freed blocks back to the host disk.
//!
//! Three layers of a pool on an image have to agree: the image, the loop device over it, the file system on that. Growing goes up through them,
//! shrinking down; after a crash in between, [`Pool::agree`] makes the file system as large as the image is. A pool on a device of its own has
//! the file system alone, which may be smaller than the device. One on a file system that was there before has a size that is not its affair.

use crate::command::{self, Program};
use crate::error::StorageError;
use crate::ground::Ground;
use crate::pool::Pool;
use crate::size::{Bytes, Gib};
use crate::sizing::{LARGEST, SHARE_PERCENT};
use crate::space::{allocated, available, device_size};
use scalebox_fault_points::crash_point;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::path::Path;
use std::sync::{MutexGuard, TryLockError};

/// btrfs wants some unallocated room to move chunks about in, beyond what is used: one data chunk.
const ROOM_TO_MOVE: Gib = Gib::new(1);
/// A device is larger than the file system on it by less than this, because that counts in blocks.
const LEAST_GROWTH: Bytes = Bytes::from_mib(1);
/// The file system's block, in bytes.
const BLOCK: u64 = 4096;

impl Pool {
    /// Grows the pool to `size`, online; without one, to what the 80 % rule gives on today's host disk, or to all of its device.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when that is no growth, or more than the host disk or the device can hold; [`StorageError::Given`],
    /// [`StorageError::Busy`] while another change of size is under way.
    pub fn grow(&self, size: Option<Gib>) -> Result<(), StorageError> {
        let _changing = self.begin_resize()?;
        match &self.ground {
            Ground::Image(image) => self.grow_image(image, size),
            Ground::Device(device) => self.grow_on_device(device, size),
            Ground::Given => Err(StorageError::Given(self.root.clone())),
        }
    }

    fn grow_image(&self, image: &Path, size: Option<Gib>) -> Result<(), StorageError> {
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
        self.agree_layers()
    }

    fn grow_on_device(&self, device: &Path, size: Option<Gib>) -> Result<(), StorageError> {
        let (current, holdable) = (self.space()?.capacity, device_size(device)?);
        let wanted = size.map_or(holdable, Gib::bytes);
        if wanted > holdable {
            return Err(StorageError::PoolSize(format!(
                "{} has {holdable}: a pool of {wanted} does not fit on it",
                device.display()
            )));
        }
        if wanted < current + LEAST_GROWTH {
            return Err(StorageError::PoolSize(format!(
                "the pool has {current} of the {holdable} of {}: {wanted} is no growth; make the device larger first",
                device.display()
            )));
        }
        self.resize_file_system(wanted)
    }

    /// Grows the pool to what the 80 % rule gives on today's host disk, or to all of its device, if that is at least a GiB more than it has. Returns
    /// whether it did: a pool that is as large as it may be, or whose size is being changed already or not its own, stays as it is.
    ///
    /// # Errors
    /// [`StorageError::NotMounted`], [`StorageError::Io`], [`StorageError::Command`].
    pub fn extend(&self) -> Result<bool, StorageError> {
        let worth_it = Gib::new(1).bytes();
        let _changing = match self.begin_resize() {
            Err(StorageError::Busy(_)) => return Ok(false),
            other => other?,
        };
        match &self.ground {
            Ground::Image(image) => {
                let holdable = holdable(image)?;
                let kept_free = (holdable - self.bounds().buffer.bytes()).floor_gib();
                let size = share_of(holdable).min(kept_free).bytes();
                if size < image_size(image)? + worth_it {
                    return Ok(false);
                }
                set_image_size(image, size)?;
                self.agree_layers()?;
            }
            Ground::Device(device) => {
                let size = device_size(device)?;
                if size < self.space()?.capacity + worth_it {
                    return Ok(false);
                }
                self.resize_file_system(size)?;
            }
            Ground::Given => return Ok(false),
        }
        Ok(true)
    }

    /// Shrinks the pool to `size`, online: what lies behind it is moved first, which can take minutes. An image becomes smaller too.
    /// While that lasts, admission counts with the smaller size already.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when what is used, promised or kept free would not fit, and nothing is changed; [`StorageError::Given`],
    /// [`StorageError::Busy`] while another change of size is under way.
    pub fn shrink(&self, size: Gib) -> Result<(), StorageError> {
        let _changing = self.begin_resize()?;
        let current = match &self.ground {
            Ground::Image(image) => image_size(image)?,
            Ground::Device(_) => self.space()?.capacity,
            Ground::Given => return Err(StorageError::Given(self.root.clone())),
        };
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
        crash_point("pool shrink: ceiling lowered");
        self.resize_file_system(size.bytes())?;
        crash_point("pool shrink: file system smaller");
        if let Ground::Image(image) = &self.ground {
            set_image_size(image, size.bytes())?;
            crash_point("pool shrink: image smaller");
            self.refresh_device()?;
            crash_point("pool shrink: device smaller");
        }
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

    /// Makes loop device and file system as large as the image, if there is one: what a crash between the steps of a change left, and the second
    /// half of a growth.
    ///
    /// # Errors
    /// [`StorageError::Command`], also while the file system is still about a change that another program began; [`StorageError::Busy`] while
    /// this one is. It may be repeated.
    pub fn agree(&self) -> Result<(), StorageError> {
        let _changing = self.begin_resize()?;
        self.agree_layers()
    }

    fn agree_layers(&self) -> Result<(), StorageError> {
        let Some(image) = self.image() else { return Ok(()) };
        let size = image_size(image)?;
        if device_size(&self.device)? != size {
            self.refresh_device()?;
            crash_point("pool grow: device larger");
        }
        if self.space()?.capacity < size {
            self.resize_file_system(size)?;
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

    fn refresh_device(&self) -> Result<(), StorageError> {
        command::run(
            Program::Losetup,
            [OsStr::new("--set-capacity"), self.device.as_os_str()],
        )?;
        Ok(())
    }

    fn resize_file_system(&self, size: Bytes) -> Result<(), StorageError> {
        // Whole blocks: an image or a device may be larger by a part of one.
        let size = (size.as_u64() & !(BLOCK - 1)).to_string();
        let args = ["filesystem", "resize", &size].map(OsStr::new);
        command::run(Program::Btrfs, args.into_iter().chain([self.path().as_os_str()]))?;
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
