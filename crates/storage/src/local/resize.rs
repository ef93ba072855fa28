//! Resizing a pool in use, and returning freed blocks to the host disk.
//!
//! A pool on an image has three layers that must have the same size: the image, its loop device,
//! and the file system on the device. Growing proceeds upwards through them, shrinking downwards.
//! The size of the pool is the size of its file system. A failed change is rolled back immediately.
//! A rollback that fails is retried by [`Pool::reconcile`], before the next change and in the
//! background. After a crash during a change, [`Pool::reconcile`] makes the file system as large as
//! the image: no client saw the change fail.
//!
//! A pool on a device consists of the file system alone, which may be smaller than the device. The
//! size of an existing file system is not changed.

use crate::error::StorageError;
use crate::local::backing::ActualBacking;
use crate::local::btrfs::chunk_space;
use crate::local::pool_fs::PoolFs;
use crate::local::sizing::{DEFAULT_SHARE_PERCENT, MAX_DEFAULT_SIZE};
use crate::local::space::{allocated, available, device_size};
use crate::pool::Pool;
use crate::pool_size_error::PoolSizeError;
use crate::programs::{BTRFS, FSTRIM, LOSETUP};
use scalebox_fault_points::{crash_point, fault_point};
use scalebox_programs::Run;
use scalebox_units::{Bytes, Gib};
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError, TryLockError};

/// Unallocated space that btrfs needs to relocate chunks, beyond the used space: one data chunk.
const RELOCATION_SPACE: Gib = Gib::new(1);
/// Minimum growth. A device or image can be larger than its file system by less than this, because
/// the file system consists of whole blocks.
const MIN_GROWTH: Bytes = Bytes::from_mib(1);
/// Block size of the file system, in bytes.
const BLOCK: u64 = 4096;

impl Pool {
    /// Grows the pool online to `size`. Without a size, it grows to 80 % of the space available to
    /// it on the host disk, or to the whole device.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when the size is not larger, or more than the host disk or the
    /// device can hold; [`StorageError::ExistingFileSystem`]; [`StorageError::Busy`] during another
    /// resize.
    pub fn grow(&self, size: Option<Gib>) -> Result<(), StorageError> {
        let _changing = self.begin_change()?;
        match &self.backing {
            ActualBacking::Image(image) => self.grow_image(image, size),
            ActualBacking::Device(device) => self.grow_on_device(device, size),
            ActualBacking::Existing => Err(StorageError::ExistingFileSystem(self.root.clone())),
        }
    }

    fn grow_image(&self, image: &Path, size: Option<Gib>) -> Result<(), StorageError> {
        let current = self.file_system_size()?;
        let holdable = holdable(image)?;
        let size = size.unwrap_or_else(|| share_of(holdable));
        if size.bytes() < current + MIN_GROWTH {
            return Err(PoolSizeError::NotLarger { size, current }.into());
        }
        if size.bytes() + self.bounds().buffer.bytes() > holdable {
            let kept_free = self.bounds().buffer;
            let max = (holdable - kept_free.bytes()).floor_gib();
            return Err(PoolSizeError::OverHostDisk { size, max, kept_free }.into());
        }
        self.grow_layers(image, size.bytes())
    }

    /// Grows all three layers, or leaves them as they were.
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

    /// Returns the result of a change, after restoring the size `before` if it failed. A failed
    /// rollback is logged, and remembered for [`Pool::reconcile`].
    fn or_undo(&self, changed: Result<(), StorageError>, before: Bytes) -> Result<(), StorageError> {
        let Err(error) = changed else { return Ok(()) };
        *self.undo_to() = Some(before);
        if let Err(undo) = self.reconcile_layers() {
            tracing::warn!(error = %undo, "cannot roll back a failed resize of the pool; it will be retried");
        }
        Err(error)
    }

    /// Locks the size to restore after a failed rollback.
    fn undo_to(&self) -> MutexGuard<'_, Option<Bytes>> {
        self.undo_to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grow_on_device(&self, device: &Path, size: Option<Gib>) -> Result<(), StorageError> {
        let (current, device_size) = (self.file_system_size()?, device_size(device)?);
        let size = size.map_or(device_size, Gib::bytes);
        let device = device.to_owned();
        if size > device_size {
            return Err(PoolSizeError::OverDevice {
                size,
                device_size,
                device,
            }
            .into());
        }
        if size < current + MIN_GROWTH {
            return Err(PoolSizeError::NotLargerOnDevice {
                size,
                current,
                device_size,
                device,
            }
            .into());
        }
        self.resize_file_system(size)
    }

    /// Grows the pool to its default size if that is at least 1 GiB more, and returns whether it
    /// grew. The default is 80 % of the space available to it on the host disk, or the whole
    /// device. Does nothing if the pool is being resized or is an existing file system.
    ///
    /// # Errors
    /// [`StorageError::NotMounted`], [`StorageError::Io`], [`StorageError::Program`].
    pub fn extend(&self) -> Result<bool, StorageError> {
        let min_growth = Gib::new(1).bytes();
        let _changing = match self.begin_change() {
            Err(StorageError::Busy(_)) => return Ok(false),
            other => other?,
        };
        match &self.backing {
            ActualBacking::Image(image) => {
                let holdable = holdable(image)?;
                let kept_free = (holdable - self.bounds().buffer.bytes()).floor_gib();
                let size = share_of(holdable).min(kept_free).bytes();
                if size < self.file_system_size()? + min_growth {
                    return Ok(false);
                }
                self.grow_layers(image, size)?;
            }
            ActualBacking::Device(device) => {
                let size = device_size(device)?;
                if size < self.file_system_size()? + min_growth {
                    return Ok(false);
                }
                self.resize_file_system(size)?;
            }
            ActualBacking::Existing => return Ok(false),
        }
        Ok(true)
    }

    /// Shrinks the pool online to `size`, including its image. Data beyond the new end is moved
    /// first, which can take minutes. Admission counts with the smaller size from the start.
    ///
    /// # Errors
    /// [`StorageError::PoolSize`] when the used data, the committed and reserved space, or the
    /// buffer do not fit, with nothing changed; [`StorageError::ExistingFileSystem`];
    /// [`StorageError::Busy`] during another resize.
    pub fn shrink(&self, size: Gib) -> Result<(), StorageError> {
        let _changing = self.begin_change()?;
        let current = match &self.backing {
            ActualBacking::Image(_) | ActualBacking::Device(_) => self.file_system_size()?,
            ActualBacking::Existing => return Err(StorageError::ExistingFileSystem(self.root.clone())),
        };
        if size.bytes() >= current {
            return Err(PoolSizeError::NotSmaller { size, current }.into());
        }
        // From here on, admission uses the smaller size; the guard lifts this limit on failure.
        let lowered = self.lower_ceiling(size.bytes(), |commitments| self.fits_in(size.bytes(), commitments))?;
        let shrunk = self.shrink_layers(size.bytes());
        self.or_undo(shrunk, current)?;
        crash_point("pool shrink: device smaller");
        drop(lowered);
        Ok(())
    }

    /// Checks that a pool of `size` can hold the used data, the committed and reserved space, and
    /// the buffer. Returns the required size if not.
    fn fits_in(&self, size: Bytes, commitments: Bytes) -> Result<Result<(), Gib>, StorageError> {
        let space = self.space()?;
        let needed = space.used
            + space.metadata_total
            + space.metadata_total
            + self.bounds().buffer.bytes()
            + RELOCATION_SPACE.bytes();
        // If every committed byte is backed, guests' future blocks count like present ones.
        let backed = match self.bounds().overcommit_ratio {
            ratio if ratio <= 1.0 => {
                let overhead = space.capacity - space.worst_case_capacity;
                space.unreclaimable + commitments + self.bounds().buffer.bytes() + overhead
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
        if let ActualBacking::Image(image) = &self.backing {
            set_image_size(image, size)?;
            fault_point("pool shrink: image smaller").map_err(injected)?;
            self.refresh_device()?;
        }
        Ok(())
    }

    /// Discards all free blocks of the pool, returning them to the host disk. Returns the discarded
    /// size, including blocks that the host had already.
    ///
    /// # Errors
    /// [`StorageError::Program`].
    pub fn trim(&self) -> Result<Bytes, StorageError> {
        self.require_mounted()?;
        #[cfg(feature = "simulated")]
        if let PoolFs::Simulated(_) = self.file_system {
            return Ok(Bytes::ZERO);
        }
        let output = Run::of(FSTRIM).args(["--verbose"]).args([self.path()]).stdout()?;
        // `/var/lib/scalebox: 1.2 GiB (1288490188 bytes) trimmed`
        let bytes = output
            .rsplit_once('(')
            .and_then(|(_, rest)| rest.split_once(" bytes")?.0.parse().ok());
        Ok(Bytes::new(bytes.unwrap_or(0)))
    }

    /// Sets all layers to one size. This is the size before a failed change; after a crash during a
    /// change it is the size of the image.
    ///
    /// # Errors
    /// [`StorageError::Program`], also while btrfs is busy with a resize by another program;
    /// [`StorageError::Busy`] during a resize by this one. It can be repeated.
    pub fn reconcile(&self) -> Result<(), StorageError> {
        let _changing = self.begin_resize()?;
        self.reconcile_layers()
    }

    fn reconcile_layers(&self) -> Result<(), StorageError> {
        let mut undo_to = self.undo_to();
        match &self.backing {
            ActualBacking::Image(image) => {
                if let Some(before) = *undo_to {
                    // The size is never smaller than the file system: data beyond the end would be
                    // lost.
                    let size = before.max(self.file_system_size()?);
                    if image_size(image)? != size {
                        set_image_size(image, size)?;
                    }
                }
                self.follow_image(image)?;
            }
            ActualBacking::Device(_) => {
                if let Some(before) = *undo_to
                    && self.file_system_size()? + MIN_GROWTH <= before
                {
                    self.resize_file_system(before)?;
                }
            }
            ActualBacking::Existing => {}
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
        if self.file_system_size()? + MIN_GROWTH <= size {
            self.resize_file_system(size)?;
        }
        Ok(())
    }

    /// Returns the size of the file system on its device, regardless of profiles and quotas.
    fn file_system_size(&self) -> Result<Bytes, StorageError> {
        match &self.file_system {
            PoolFs::Btrfs(..) => {
                let space = chunk_space(&self.dir)
                    .map_err(|errno| StorageError::io("read the size of", self.root.display(), errno.into()))?;
                Ok(space.device_size)
            }
            PoolFs::Xfs => Ok(self.space()?.capacity),
            #[cfg(feature = "simulated")]
            PoolFs::Simulated(_) => Ok(self.space()?.capacity),
        }
    }

    /// Starts a resize, completing a failed rollback first.
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
        Run::of(LOSETUP)
            .args(["--set-capacity"])
            .args([&self.device])
            .stdout()?;
        Ok(())
    }

    fn resize_file_system(&self, size: Bytes) -> Result<(), StorageError> {
        // A file system has whole blocks; an image or a device can be larger by part of a block.
        let size = size.as_u64() & !(BLOCK - 1);
        let text = size.to_string();
        let run = Run::of(BTRFS).args(["filesystem", "resize", &text]).args([self.path()]);
        let resized = run.stdout();
        match resized {
            // A program that fails after its last step has still done its work.
            Err(error) if self.file_system_size()?.as_u64() != size => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Returns the maximum size that the image could have on the host disk.
fn holdable(image: &Path) -> Result<Bytes, StorageError> {
    Ok(available(image)? + allocated(image)?)
}

/// Returns 80 % of `holdable`, without the lower limit for new pools.
fn share_of(holdable: Bytes) -> Gib {
    let share = Gib::new(holdable.floor_gib().as_u64() * DEFAULT_SHARE_PERCENT / 100);
    share.min(MAX_DEFAULT_SIZE)
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
