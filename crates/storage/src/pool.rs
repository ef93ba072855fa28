//! An open pool: the handle for creating templates and disks.

use crate::admission::{Admission, Bounds, Commitments, LoweredCeiling, Reservation};
use crate::error::StorageError;
use crate::image::images::Images;
use crate::local::backing::{self, ActualBacking, Backing};
use crate::local::files;
use crate::local::group_sync::GroupSync;
use crate::local::init;
use crate::local::pool_fs::PoolFs;
use crate::local::space;
use crate::measurement::Measurements;
use crate::space::Space;
use scalebox_units::{Bytes, Gib, VmId};
use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The file in the pool's root that names the pool's owner.
const OWNER: &str = "owner";

/// Returns the folder for hypervisor jails in the pool at `data_dir`. Jails are in the pool so that
/// disks can be hard-linked into them. The folder may not exist.
pub fn jails_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("jails")
}

/// A mounted pool. All methods block: share it in an `Arc` and call it from blocking threads.
#[derive(Debug)]
pub struct Pool {
    pub(crate) root: PathBuf,
    pub(crate) backing: ActualBacking,
    /// The device the pool is mounted from.
    pub(crate) device: PathBuf,
    /// The root folder, held open. Space is read through it without a path look-up, and the pool
    /// cannot be unmounted while it is open.
    pub(crate) dir: File,
    pub(crate) file_system: PoolFs,
    pub(crate) images: Images,
    admission: Admission,
    /// The unreclaimable usage found by the last measurement.
    pub(crate) measurements: Mutex<Measurements>,
    /// The lock is held while the pool's size changes.
    pub(crate) resizing: Mutex<()>,
    /// The size before a failed change that has not been rolled back yet.
    pub(crate) undo_to: Mutex<Option<Bytes>>,
    /// One lock per (template, size) whose resized base image is being made. Requests for the same
    /// one wait for each other, other requests do not.
    pub(crate) growing: Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>,
    /// Flushes of the disks' folder, shared by concurrent creations.
    pub(crate) disks_sync: GroupSync,
}

impl Pool {
    /// Opens the pool at `data_dir` with an empty ledger: [`Pool::restore`] adds the existing
    /// disks.
    ///
    /// # Errors
    /// [`StorageError::NotMounted`], [`StorageError::OtherDevice`], [`StorageError::NotAPool`] when
    /// the file system cannot clone files.
    pub fn open(data_dir: &Path, backing: &Backing, bounds: Bounds) -> Result<Pool, StorageError> {
        let place = backing::find(data_dir, backing)?.ok_or_else(|| StorageError::NotMounted(data_dir.to_owned()))?;
        let dir = File::open(data_dir).map_err(|error| StorageError::io("open", data_dir.display(), error))?;
        let file_system = PoolFs::open(place.kind, &dir).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StorageError::NoSysfs(data_dir.to_owned()),
            _ => StorageError::io("read the uncommitted writes of", data_dir.display(), error),
        })?;
        let pool = Pool::new(data_dir, dir, file_system, (place.backing, place.device), bounds);
        pool.require_folders()?;
        files::require_reflink(&pool.templates_dir(), &pool.disks_dir())?;
        Ok(pool)
    }

    /// Creates the handle, with an empty ledger, on the folder `root`, open as `dir`. `place` is
    /// the pool's backing and the device it is mounted from.
    pub(crate) fn new(
        root: &Path,
        dir: File,
        file_system: PoolFs,
        place: (ActualBacking, PathBuf),
        bounds: Bounds,
    ) -> Pool {
        let (backing, device) = place;
        Pool {
            root: root.to_owned(),
            backing,
            device,
            dir,
            file_system,
            images: Images::Ext4,
            admission: Admission::new(bounds),
            measurements: Mutex::default(),
            resizing: Mutex::default(),
            undo_to: Mutex::default(),
            growing: Mutex::default(),
            disks_sync: GroupSync::default(),
        }
    }

    /// Locks the pool for this program, as the only one that creates and removes disks, until the
    /// pool is closed.
    ///
    /// # Errors
    /// [`StorageError::Busy`] while another program holds the lock.
    pub fn lock(&self) -> Result<(), StorageError> {
        match files::try_lock_exclusive(&self.dir) {
            Ok(true) => Ok(()),
            Ok(false) => Err(StorageError::Busy(self.root.clone())),
            Err(error) => Err(StorageError::io("lock", self.root.display(), error)),
        }
    }

    /// Returns the owner recorded by [`Pool::set_owner`]; `None` for a pool that was never used.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn owner(&self) -> Result<Option<String>, StorageError> {
        let path = self.root.join(OWNER);
        match std::fs::read(&path) {
            Ok(owner) => Ok(Some(String::from_utf8_lossy(&owner).trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StorageError::io("read", path.display(), error)),
        }
    }

    /// Records `owner` durably. It identifies the state file that has the records of the disks. A
    /// daemon with another state then does not treat the disks as orphaned.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn set_owner(&self, owner: &str) -> Result<(), StorageError> {
        let path = self.root.join(OWNER);
        let partial = path.with_extension("partial");
        files::discard(&partial);
        let written = files::create_new(&partial).and_then(|mut file| {
            file.write_all(owner.as_bytes())
                .and_then(|()| file.sync_all())
                .and_then(|()| std::fs::rename(&partial, &path))
                .map_err(|error| StorageError::io("write", path.display(), error))
        });
        written.and_then(|()| files::sync_dir(&self.root))
    }

    /// Fails unless the pool is mounted: an unmounted pool must not look like an empty one.
    pub(crate) fn require_mounted(&self) -> Result<(), StorageError> {
        let (held, there) = (rustix::fs::fstat(&self.dir), rustix::fs::stat(&self.root));
        match (held, there) {
            (Ok(held), Ok(there)) if (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino) => Ok(()),
            _ => Err(StorageError::NotMounted(self.root.clone())),
        }
    }

    /// Returns the mount point.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Returns the backing of the mounted pool.
    pub fn backing(&self) -> &ActualBacking {
        &self.backing
    }

    /// Returns the path of the backing image, if the pool has one.
    pub fn image(&self) -> Option<&Path> {
        match &self.backing {
            ActualBacking::Image(image) => Some(image),
            ActualBacking::Device(_) | ActualBacking::Existing => None,
        }
    }

    /// Returns the device the pool is mounted from.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Returns the name of the pool's file system: `btrfs` or `xfs`.
    pub fn file_system(&self) -> &'static str {
        self.file_system.name()
    }

    /// Returns whether the pool's loop device bypasses the host's page cache. `None` when the
    /// kernel does not report it or the pool has no loop device.
    pub fn direct_io(&self) -> Option<bool> {
        self.image()?;
        let name = self.device.file_name()?;
        let attribute = Path::new("/sys/block").join(name).join("loop/dio");
        Some(std::fs::read_to_string(attribute).ok()?.trim() == "1")
    }

    /// Returns the folder in which a template is built before its import, and creates it if
    /// necessary. Its contents are removed after each build.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn build_dir(&self) -> Result<PathBuf, StorageError> {
        let dir = self.root.join("build");
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(StorageError::io("create", dir.display(), error))
            }
            _ => Ok(dir),
        }
    }

    /// Returns the folder of the layers of pulled images. It need not exist.
    pub fn layers_dir(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(crate) fn templates_dir(&self) -> PathBuf {
        self.root.join("templates")
    }

    /// Returns the folder of the resized base images.
    pub(crate) fn grown_dir(&self) -> PathBuf {
        self.templates_dir().join(".grown")
    }

    pub(crate) fn disks_dir(&self) -> PathBuf {
        self.root.join("vms")
    }

    /// Reads how much the pool and its host disk can take now. Costs a few system calls.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the kernel does not report it.
    pub fn space(&self) -> Result<Space, StorageError> {
        let space = space::read(&self.dir, &self.file_system, self.image())?;
        Ok(match self.measured_unreclaimable() {
            // Deletions since the measurement lower `used`.
            Some(unreclaimable) => Space {
                unreclaimable: unreclaimable.min(space.used),
                ..space
            },
            None => space,
        })
    }

    /// Admits a disk of `size`, or refuses it and changes nothing; see [`Admission::admit`].
    ///
    /// # Errors
    /// [`StorageError::Insufficient`].
    pub fn admit(&self, size: Bytes) -> Result<Reservation, StorageError> {
        self.require_mounted()?;
        self.admission.admit(size, || self.space())
    }

    /// Admits `max`, or as many whole GiB below it as fit; see [`Admission::admit_between`].
    ///
    /// # Errors
    /// [`StorageError::Insufficient`] if not even `min` fits.
    pub fn admit_between(&self, min: Bytes, max: Bytes) -> Result<Reservation, StorageError> {
        self.require_mounted()?;
        self.admission.admit_between(min, max, || self.space())
    }

    pub(crate) fn backs_every_byte(&self) -> bool {
        self.admission.backs_every_byte()
    }

    /// Limits admission before a shrink; see [`Admission::lower_ceiling`].
    pub(crate) fn lower_ceiling(
        &self,
        size: Bytes,
        fits: impl FnOnce(Bytes) -> Result<Result<(), Gib>, StorageError>,
    ) -> Result<LoweredCeiling, StorageError> {
        self.admission.lower_ceiling(size, fits)
    }

    /// Adds an existing disk to the ledger, at start.
    pub fn restore(&self, size: Bytes) {
        self.admission.restore(size);
    }

    /// Removes a deleted disk from the ledger.
    pub fn release(&self, size: Bytes) {
        self.admission.release(size);
    }

    /// Returns the sums of committed and reserved sizes.
    pub fn commitments(&self) -> Commitments {
        self.admission.commitments()
    }

    /// Returns the bounds of admission.
    pub fn bounds(&self) -> Bounds {
        self.admission.bounds()
    }

    /// Returns the maximum of committed and reserved space together, for a pool of this capacity.
    pub fn commitment_limit(&self, capacity: Bytes) -> Bytes {
        self.admission.limit(capacity)
    }

    pub(crate) fn disk_path(&self, id: &VmId) -> PathBuf {
        self.disks_dir().join(format!("{id}.ext4"))
    }

    fn require_folders(&self) -> Result<(), StorageError> {
        match init::is_pool(&self.root) {
            true => Ok(()),
            false => Err(StorageError::NotMounted(self.root.clone())),
        }
    }
}
