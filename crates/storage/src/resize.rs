//! A pool that grows and shrinks while it is in use, and gives freed blocks back to the host disk.
//!
//! Three layers of a pool on an image have to be of one size: the image, the loop device over it,
//! the file system on that. Growing goes up through them, shrinking down. The pool's size is that
//! of its file system. A change that fails half-way is undone at once, and what cannot be undone at
//! once is by [`Pool::reconcile`], before the next change and in the background. After a crash in
//! between, [`Pool::reconcile`] makes the file system as large as the image is: nobody was told
//! that the change failed.
//!
//! A pool on a device of its own has the file system alone, which may be smaller than the device.
//! One on a file system that was there before has a size that is not its affair.

use crate::backing::{FileSystem, Ground};
use crate::btrfs::chunk_space;
use crate::command::{self, Program};
use crate::error::StorageError;
use crate::pool::Pool;
use crate::size::{Bytes, Gib};
use crate::sizing::{LARGEST, SHARE_PERCENT};
use crate::space::{allocated, available, device_size};
use scalebox_fault_points::{crash_point, fault_point};
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError, TryLockError};

/// btrfs wants some unallocated room to move chunks about in, beyond what is used: one data chunk.
const ROOM_TO_MOVE: Gib = Gib::new(1);
/// A device or an image is larger than the file system on it by less than this, because that counts
/// in blocks.
const LEAST_GROWTH: Bytes = Bytes::from_mib(1);
/// The file system's block, in bytes.
const BLOCK: u64 = 4096;

impl Pool {
    /// Grows the pool to `size`, online; without one, to what the 80 % rule gives on today's host
    /// disk, or to all of its device.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when that is no growth, or more than the host disk or the device
    /// can hold; [`StorageError::Given`], [`StorageError::Busy`] while another change of size is
    /// under way.
    pub fn grow(&self, size: Option<Gib>) -> Result<(), StorageError> {
        let _changing = self.begin_change()?;
        match &self.ground {
            Ground::Image(image) => self.grow_image(image, size),
            Ground::Device(device) => self.grow_on_device(device, size),
            Ground::Given => Err(StorageError::Given(self.root.clone())),
        }
    }

    fn grow_image(&self, image: &Path, size: Option<Gib>) -> Result<(), StorageError> {
        let current = self.file_system_size()?;
        let holdable = holdable(image)?;
        let size = size.unwrap_or_else(|| share_of(holdable));
        if size.bytes() < current + LEAST_GROWTH {
            return Err(StorageError::PoolSize(format!(
                "the pool has {current}: {size} GiB is not larger; free space on the host disk, or name a larger size"
            )));
        }
        if size.bytes() + self.bounds().buffer.bytes() > holdable {
            return Err(StorageError::PoolSize(format!(
                "the host disk can hold a pool of at most {} GiB and keep {} GiB free: {size} GiB is too large",
                (holdable - self.bounds().buffer.bytes()).floor_gib(),
                self.bounds().buffer
            )));
        }
        self.grow_layers(image, size.bytes())
    }

    /// Makes all three layers larger, or leaves them as they were.
    fn grow_layers(&self, image: &Path, size: Bytes) -> Result<(), StorageError> {
        let before = self.file_system_size()?;
        let grown = set_image_size(image, size)
            .and_then(|()| fault_point("pool grow: image larger").map_err(injected))
            .and_then(|()| self.refresh_device())
            .and_then(|()| fault_point("pool grow: device larger").map_err(injected))
            .and_then(|()| self.resize_file_system(size));
        self.or_undo(grown, before)?;
        crash_point("pool grow: file system larger");
        Ok(())
    }

    /// Hands on the result of a change; brings the layers back to `before` where it failed. That
    /// they could not be brought back is logged, and kept in mind for [`Pool::reconcile`].
    fn or_undo(&self, changed: Result<(), StorageError>, before: Bytes) -> Result<(), StorageError> {
        let Err(error) = changed else { return Ok(()) };
        *self.undo_to() = Some(before);
        if let Err(undo) = self.reconcile_layers() {
            tracing::warn!(error = %undo, "a failed change of the pool's size is not undone yet; it is tried again");
        }
        Err(error)
    }

    /// The size that an undo which failed was to bring back.
    fn undo_to(&self) -> MutexGuard<'_, Option<Bytes>> {
        self.undo_to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grow_on_device(&self, device: &Path, size: Option<Gib>) -> Result<(), StorageError> {
        let (current, holdable) = (self.file_system_size()?, device_size(device)?);
        let wanted = size.map_or(holdable, Gib::bytes);
        if wanted > holdable {
            return Err(StorageError::PoolSize(format!(
                "{} has {holdable}: a pool of {wanted} does not fit on it",
                device.display()
            )));
        }
        if wanted < current + LEAST_GROWTH {
            return Err(StorageError::PoolSize(format!(
                "the pool has {current} of the {holdable} of {}: {wanted} is not larger; make the device larger first",
                device.display()
            )));
        }
        self.resize_file_system(wanted)
    }

    /// Grows the pool to what the 80 % rule gives on today's host disk, or to all of its device, if
    /// that is at least a GiB more than it has. Returns whether it did: a pool that is as large as
    /// it may be, or whose size is being changed already or not its own, stays as it is.
    ///
    /// # Errors
    /// [`StorageError::NotMounted`], [`StorageError::Io`], [`StorageError::Command`].
    pub fn extend(&self) -> Result<bool, StorageError> {
        let worth_it = Gib::new(1).bytes();
        let _changing = match self.begin_change() {
            Err(StorageError::Busy(_)) => return Ok(false),
            other => other?,
        };
        match &self.ground {
            Ground::Image(image) => {
                let holdable = holdable(image)?;
                let kept_free = (holdable - self.bounds().buffer.bytes()).floor_gib();
                let size = share_of(holdable).min(kept_free).bytes();
                if size < self.file_system_size()? + worth_it {
                    return Ok(false);
                }
                self.grow_layers(image, size)?;
            }
            Ground::Device(device) => {
                let size = device_size(device)?;
                if size < self.file_system_size()? + worth_it {
                    return Ok(false);
                }
                self.resize_file_system(size)?;
            }
            Ground::Given => return Ok(false),
        }
        Ok(true)
    }

    /// Shrinks the pool to `size`, online: what lies behind it is moved first, which can take
    /// minutes. An image becomes smaller too. While that lasts, admission counts with the smaller
    /// size already.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when what is used, promised or kept free would not fit, and
    /// nothing is changed; [`StorageError::Given`], [`StorageError::Busy`] while another change of
    /// size is under way.
    pub fn shrink(&self, size: Gib) -> Result<(), StorageError> {
        let _changing = self.begin_change()?;
        let current = match &self.ground {
            Ground::Image(_) | Ground::Device(_) => self.file_system_size()?,
            Ground::Given => return Err(StorageError::Given(self.root.clone())),
        };
        if size.bytes() >= current {
            return Err(StorageError::PoolSize(format!(
                "the pool has {current}: {size} GiB is not smaller"
            )));
        }
        // From here on nothing is admitted that would not fit; taken back if it comes to nothing.
        let lowered = self.lower_ceiling(size.bytes(), |promised| self.fits_in(size.bytes(), promised))?;
        let shrunk = self.shrink_layers(size.bytes());
        self.or_undo(shrunk, current)?;
        crash_point("pool shrink: device smaller");
        drop(lowered);
        Ok(())
    }

    /// Whether a pool of `size` could hold what is used, promised and kept free; `Err` with what is
    /// needed.
    fn fits_in(&self, size: Bytes, promised: Bytes) -> Result<Result<(), Gib>, StorageError> {
        let space = self.space()?;
        let needed = space.used
            + space.metadata_total
            + space.metadata_total
            + self.bounds().buffer.bytes()
            + ROOM_TO_MOVE.bytes();
        // With every promise backed, the guests' blocks that are yet to come count as those that
        // are there.
        let backed = match self.bounds().overcommit_ratio {
            ratio if ratio <= 1.0 => {
                let overhead = space.capacity - space.backable;
                space.fixed + promised + self.bounds().buffer.bytes() + overhead
            }
            _ => Bytes::ZERO,
        };
        let needed = needed.max(backed);
        Ok((needed <= size).then_some(()).ok_or(needed.ceil_gib()))
    }

    fn shrink_layers(&self, size: Bytes) -> Result<(), StorageError> {
        fault_point("pool shrink: ceiling lowered").map_err(injected)?;
        self.resize_file_system(size)?;
        fault_point("pool shrink: file system smaller").map_err(injected)?;
        if let Ground::Image(image) = &self.ground {
            set_image_size(image, size)?;
            fault_point("pool shrink: image smaller").map_err(injected)?;
            self.refresh_device()?;
        }
        Ok(())
    }

    /// Hands all free blocks of the pool back to the host disk. Returns how much was handed on,
    /// what the host had already included.
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

    /// Brings the layers to one size: that from before a change which failed; else, after a crash
    /// between the steps of a change, the image's.
    ///
    /// # Errors
    /// [`StorageError::Command`], also while btrfs is still busy with a change that another program
    /// began; [`StorageError::Busy`] while this one is. It may be repeated.
    pub fn reconcile(&self) -> Result<(), StorageError> {
        let _changing = self.begin_resize()?;
        self.reconcile_layers()
    }

    fn reconcile_layers(&self) -> Result<(), StorageError> {
        let mut undo_to = self.undo_to();
        match &self.ground {
            Ground::Image(image) => {
                if let Some(before) = *undo_to {
                    // Never less than what the file system has: what lies behind the end would be
                    // lost.
                    let size = before.max(self.file_system_size()?);
                    if image_size(image)? != size {
                        set_image_size(image, size)?;
                    }
                }
                self.follow_image(image)?;
            }
            Ground::Device(_) => {
                if let Some(before) = *undo_to
                    && self.file_system_size()? + LEAST_GROWTH <= before
                {
                    self.resize_file_system(before)?;
                }
            }
            Ground::Given => {}
        }
        *undo_to = None;
        Ok(())
    }

    /// Makes loop device and file system as large as the image.
    fn follow_image(&self, image: &Path) -> Result<(), StorageError> {
        let size = image_size(image)?;
        if device_size(&self.device)? != size {
            self.refresh_device()?;
        }
        if self.file_system_size()? + LEAST_GROWTH <= size {
            self.resize_file_system(size)?;
        }
        Ok(())
    }

    /// The size of the file system as its device counts: neither its profile nor a quota makes it
    /// smaller.
    fn file_system_size(&self) -> Result<Bytes, StorageError> {
        match &self.file_system {
            FileSystem::Btrfs(..) => {
                let space = chunk_space(&self.dir)
                    .map_err(|errno| StorageError::io("read the size of", self.root.display(), errno.into()))?;
                Ok(space.device_size)
            }
            FileSystem::Xfs => Ok(self.space()?.capacity),
        }
    }

    /// What a change of size begins with: what an earlier one left undone.
    fn begin_change(&self) -> Result<MutexGuard<'_, ()>, StorageError> {
        let changing = self.begin_resize()?;
        if self.undo_to().is_some() {
            self.reconcile_layers()?;
        }
        Ok(changing)
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
        let size = size.as_u64() & !(BLOCK - 1);
        let text = size.to_string();
        let args = ["filesystem", "resize", &text].map(OsStr::new);
        let resized = command::run(Program::Btrfs, args.into_iter().chain([self.path().as_os_str()]));
        match resized {
            // A program that fails behind its last step has done what it was asked for.
            Err(error) if self.file_system_size()?.as_u64() != size => Err(error.into()),
            _ => Ok(()),
        }
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

fn injected(error: io::Error) -> StorageError {
    StorageError::io("change", "the size of the pool", error)
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
