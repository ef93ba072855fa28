//! Disks: each VM's own clone of a template.

use crate::admission::Reservation;
use crate::error::StorageError;
use crate::image::live_growth;
use crate::local::files::{self, Folder};
use crate::pool::Pool;
use scalebox_fault_points::{crash_point, fault_point};
use scalebox_units::{Bytes, DiskLocation, TemplateName, VmId};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

/// The result of a sweep; see [`Pool::sweep`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SweepResult {
    /// Orphaned files that were removed.
    pub removed: Vec<PathBuf>,
    /// Disks that should exist but were not found.
    pub missing: Vec<VmId>,
}

impl Pool {
    /// Creates the disk `id` from `template`, with the admitted size. On return the disk survives a
    /// power cut; on failure nothing of it is left. The first disk of a (template, size) waits
    /// until its resized base image is made.
    ///
    /// # Errors
    /// [`StorageError::NoTemplate`], [`StorageError::SmallerThanTemplate`], [`StorageError::Io`].
    pub fn create_disk(&self, id: &VmId, template: &TemplateName, admitted: &Reservation) -> Result<(), StorageError> {
        let base_image = self.base_image(template, admitted.size())?;
        let path = self.disk_path(id);
        let disk = files::create_new(&path)?;
        let made = fault_point("create: disk's file made")
            .and_then(|()| self.file_system.clone_file(&base_image, &disk))
            .and_then(|()| fault_point("create: disk cloned"))
            .and_then(|()| disk.sync_all())
            .map_err(|error| StorageError::io("clone", path.display(), error))
            .and_then(|()| self.sync_new_name());
        if made.is_err() {
            files::discard(&path);
        }
        made
    }

    /// Makes the name of a new, already flushed file survive a power cut. On btrfs this does
    /// nothing: the log that `fsync` writes for a new file includes its name (`INODE_REF`, from
    /// which the replay recreates the folder's entry). Flushing the folder would be a second commit
    /// of the log, as slow as the first. RocksDB has relied on this since 2021
    /// (facebook/rocksdb#8903); a test here cuts the power.
    fn sync_new_name(&self) -> Result<(), StorageError> {
        if self.file_system.fsync_keeps_name() {
            return Ok(());
        }
        let folder = self.disks_dir();
        self.disks_sync
            .sync(|| File::open(&folder)?.sync_all())
            .map_err(|error| StorageError::io("flush", folder.display(), error))
    }

    /// Grows the disk `id`, and the ext4 file system on it, to `size`. No VM may be using it. After
    /// a crash the disk has either the old or the new size, and is sound in both cases. A disk that
    /// is already as large is not changed.
    ///
    /// # Errors
    /// [`StorageError::Io`]; [`StorageError::FileSystem`] with e2fsck's message when the file
    /// system is damaged. The disk is not changed then.
    pub fn grow_disk(&self, id: &VmId, size: Bytes) -> Result<(), StorageError> {
        let path = self.disk_path(id);
        let disk = files::open_read(&path).map_err(|error| StorageError::io("read", path.display(), error))?;
        let meta = disk
            .metadata()
            .map_err(|error| StorageError::io("read", path.display(), error))?;
        if meta.len() >= size.as_u64() {
            return Ok(());
        }
        // The growth happens on a clone, so a failure leaves the guest's disk as it was.
        let folder = Folder::open(&self.disks_dir())?;
        self.replace_by_resized_clone(
            &disk,
            &path,
            size,
            |_| Ok(()),
            |partial| folder.replace(partial, &path, || fault_point("grow: disk in place")),
        )?;
        self.forget_measurement();
        crash_point("grow: disk durable");
        Ok(())
    }

    /// Returns the provisioned size of the disk `id`, as found in the pool.
    ///
    /// # Errors
    /// [`StorageError::Io`] when it does not exist.
    pub fn provisioned(&self, id: &VmId) -> Result<Bytes, StorageError> {
        let path = self.disk_path(id);
        let meta = fs::metadata(&path).map_err(|error| StorageError::io("read", path.display(), error))?;
        Ok(Bytes::new(meta.len()))
    }

    /// Returns whether the disk `id` exists.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the host cannot determine that.
    pub fn has_disk(&self, id: &VmId) -> Result<bool, StorageError> {
        self.require_mounted()?;
        let path = self.disk_path(id);
        match fs::symlink_metadata(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StorageError::io("read", path.display(), error)),
        }
    }

    /// Returns the location of the disk `id`.
    pub fn disk_location(&self, id: &VmId) -> DiskLocation {
        DiskLocation::File(self.disk_path(id))
    }

    /// Returns the size of the blocks that the disk `id` maps, shared or exclusive.
    ///
    /// # Errors
    /// [`StorageError::Io`] when it does not exist.
    pub fn disk_used(&self, id: &VmId) -> Result<Bytes, StorageError> {
        crate::local::space::allocated(&self.disk_path(id))
    }

    /// Returns why a guest's kernel may be unable to grow the mounted file system on the disk `id`.
    /// Returns `None` without a known obstacle.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn obstacle_to_live_growth(&self, id: &VmId) -> Result<Option<&'static str>, StorageError> {
        let path = self.disk_path(id);
        files::open_read(&path)
            .and_then(|disk| live_growth::obstacle(&disk))
            .map_err(|error| StorageError::io("read", path.display(), error))
    }

    /// Deletes the disk `id` durably. Succeeds if it does not exist.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn delete_disk(&self, id: &VmId) -> Result<(), StorageError> {
        let path = self.disk_path(id);
        match fs::remove_file(&path) {
            Ok(()) => files::sync_dir(&self.disks_dir()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(StorageError::io("delete", path.display(), error)),
        }
    }

    /// Lists all disks, whatever their owner.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn disks(&self) -> Result<Vec<VmId>, StorageError> {
        // Other files are not disks.
        let disk = |(path, is_file): (PathBuf, bool)| {
            let id = path.file_name()?.to_str()?.strip_suffix(".ext4")?;
            id.parse().ok().filter(|_| is_file)
        };
        Ok(files::entries(&self.disks_dir())?
            .into_iter()
            .filter_map(disk)
            .collect())
    }

    /// Logs entries of the pool's folders that are not regular files; they are not touched.
    fn log_foreign_entries(&self) -> Result<(), StorageError> {
        let grown = self.grown_dir();
        for folder in [self.disks_dir(), self.templates_dir(), grown.clone()] {
            if folder == grown && !grown.exists() {
                continue;
            }
            for (path, is_file) in files::entries(&folder)? {
                if !is_file && path != grown {
                    tracing::warn!(path = %path.display(), "unexpected entry in the pool's folders: not a regular file, not touched");
                }
            }
        }
        Ok(())
    }

    /// Removes orphaned disks and unfinished files after a crash, and reports missing disks. Disks
    /// in `keep` are not orphaned. Call it before the first request.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn sweep(&self, keep: &HashSet<VmId>) -> Result<SweepResult, StorageError> {
        self.log_foreign_entries()?;
        let mut swept = SweepResult {
            removed: self.sweep_partials()?,
            missing: Vec::new(),
        };
        let found: HashSet<VmId> = self.disks()?.into_iter().collect();
        let mut strays: Vec<_> = found.difference(keep).map(|id| self.disk_path(id)).collect();
        strays.sort();
        for path in strays {
            fs::remove_file(&path).map_err(|error| StorageError::io("remove", path.display(), error))?;
            swept.removed.push(path);
        }
        files::sync_dir(&self.disks_dir())?;
        swept.missing = keep.difference(&found).cloned().collect();
        swept.missing.sort();
        Ok(swept)
    }
}
