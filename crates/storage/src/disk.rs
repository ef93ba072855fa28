//! Disks: each VM's own clone of a template.

use crate::DiskLocation;
use crate::admission::Reservation;
use crate::error::StorageError;
use crate::files::{self, Folder};
use crate::name::Name;
use crate::pool::Pool;
use crate::size::Bytes;
use scalebox_fault_points::{crash_point, fault_point};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

/// What a sweep found; see [`Pool::sweep`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Files that belonged to nobody and are gone.
    pub removed: Vec<PathBuf>,
    /// Disks that should be there and are not.
    pub missing: Vec<Name>,
}

impl Pool {
    /// Makes the disk `id` from `template`, as large as what was admitted. When this returns, the
    /// disk survives a power cut; when it fails, nothing is left of it. A first disk of a
    /// (template, size) waits for the grown clone to be made.
    ///
    /// # Errors
    /// [`StorageError::NoTemplate`], [`StorageError::SmallerThanTemplate`], [`StorageError::Io`].
    pub fn create_disk(&self, id: &Name, template: &Name, admitted: &Reservation) -> Result<(), StorageError> {
        let golden = self.golden(template, admitted.size())?;
        let path = self.disk_path(id);
        let disk = files::create_new(&path)?;
        let made = fault_point("create: disk's file made")
            .and_then(|()| files::reflink(&golden, &disk))
            .and_then(|()| fault_point("create: disk cloned"))
            .and_then(|()| disk.sync_all())
            .map_err(|error| StorageError::io("clone", path.display(), error))
            .and_then(|()| self.sync_new_name());
        if made.is_err() {
            files::discard(&path);
        }
        made
    }

    /// Makes the name of a new file, which itself is flushed already, survive a power cut. On btrfs
    /// it does: what `fsync` logs of a new file includes its name (`INODE_REF`, from which the
    /// replay makes the folder's entry), and a flush of the folder would be a second commit of the
    /// log, as long as the first. RocksDB counts on it since 2021 (facebook/rocksdb#8903); here a
    /// test cuts the power.
    fn sync_new_name(&self) -> Result<(), StorageError> {
        if self.file_system.fsync_keeps_name() {
            return Ok(());
        }
        let folder = self.disks_dir();
        self.disks_sync
            .sync(|| File::open(&folder)?.sync_all())
            .map_err(|error| StorageError::io("flush", folder.display(), error))
    }

    /// Grows the disk `id`, which no machine may be using, and the ext4 file system on it to
    /// `size`. A crash leaves it as large as it was or as large as it should be, and sound in both
    /// cases. One that is at least as large already stays as it is.
    ///
    /// # Errors
    /// [`StorageError::Io`]; [`StorageError::FileSystem`] with e2fsck's words when it is damaged:
    /// it is left as it was.
    pub fn grow_disk(&self, id: &Name, size: Bytes) -> Result<(), StorageError> {
        let path = self.disk_path(id);
        let disk = files::open_read(&path).map_err(|error| StorageError::io("read", path.display(), error))?;
        let meta = disk
            .metadata()
            .map_err(|error| StorageError::io("read", path.display(), error))?;
        if meta.len() >= size.as_u64() {
            return Ok(());
        }
        // Cloned once, it stays as the guest wrote it.
        let folder = Folder::open(&self.disks_dir())?;
        self.replace_by_grown_clone(
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

    /// The provisioned size of the disk `id`, as it stands in the pool.
    ///
    /// # Errors
    /// [`StorageError::Io`] when it is not there.
    pub fn provisioned(&self, id: &Name) -> Result<Bytes, StorageError> {
        let path = self.disk_path(id);
        let meta = fs::metadata(&path).map_err(|error| StorageError::io("read", path.display(), error))?;
        Ok(Bytes::new(meta.len()))
    }

    /// Whether there is a disk `id`.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the host cannot tell.
    pub fn has_disk(&self, id: &Name) -> Result<bool, StorageError> {
        self.require_mounted()?;
        let path = self.disk_path(id);
        match fs::symlink_metadata(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StorageError::io("read", path.display(), error)),
        }
    }

    /// Where the disk `id` is.
    pub fn disk_location(&self, id: &Name) -> DiskLocation {
        DiskLocation::File(self.disk_path(id))
    }

    /// The blocks the disk `id` maps, shared or not.
    ///
    /// # Errors
    /// [`StorageError::Io`] when it is not there.
    pub fn disk_used(&self, id: &Name) -> Result<Bytes, StorageError> {
        crate::space::allocated(&self.disk_path(id))
    }

    /// Deletes the disk `id`, durably. One that is not there is no error: the goal is reached.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn delete_disk(&self, id: &Name) -> Result<(), StorageError> {
        let path = self.disk_path(id);
        match fs::remove_file(&path) {
            Ok(()) => files::sync_dir(&self.disks_dir()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(StorageError::io("delete", path.display(), error)),
        }
    }

    /// The disks there are, whoever they belong to.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn disks(&self) -> Result<Vec<Name>, StorageError> {
        // What does not have the form of a disk is none.
        let disk = |(path, is_file): (PathBuf, bool)| {
            let id = path.file_name()?.to_str()?.strip_suffix(".ext4")?;
            id.parse().ok().filter(|_| is_file)
        };
        Ok(files::entries(&self.disks_dir())?
            .into_iter()
            .filter_map(disk)
            .collect())
    }

    /// Logs what lies in the pool's folders and is neither a file nor a folder of the pool's: it is
    /// left alone.
    fn log_odd_entries(&self) -> Result<(), StorageError> {
        let grown = self.grown_dir();
        for folder in [self.disks_dir(), self.templates_dir(), grown.clone()] {
            if folder == grown && !grown.exists() {
                continue;
            }
            for (path, is_file) in files::entries(&folder)? {
                if !is_file && path != grown {
                    tracing::warn!(path = %path.display(), "this is not a file of the pool: left as it is");
                }
            }
        }
        Ok(())
    }

    /// Puts the folders right after a crash: disks that nobody in `keep` owns and half-made files
    /// go, and what is missing is told. To be called before the first request.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn sweep(&self, keep: &HashSet<Name>) -> Result<Swept, StorageError> {
        self.log_odd_entries()?;
        let mut swept = Swept {
            removed: self.sweep_partials()?,
            missing: Vec::new(),
        };
        let found: HashSet<Name> = self.disks()?.into_iter().collect();
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
