//! An open pool: the handle through which templates and disks are made.

use crate::admission::{Admission, Bounds, LoweredCeiling, Promises, Reservation};
use crate::backing::{self, Backing, FileSystem, Ground};
use crate::error::StorageError;
use crate::files;
use crate::group_sync::GroupSync;
use crate::name::Name;
use crate::size::{Bytes, Gib};
use crate::space::Space;
use crate::usage::Measured;
use std::collections::HashMap;
use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The file in the pool's root that tells whose it is.
const OWNER: &str = "owner";

/// The mode of kernel and initramfs: they are the distribution's and no secret, and a jail of an
/// account that may read them links to them.
const KERNEL_MODE: u32 = 0o644;

/// Where the jails of hypervisors lie in the pool at `data_dir`, so that disks can be linked into
/// them. It need not be there.
pub fn jails_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("jails")
}

/// A mounted pool. All methods block; share it in an `Arc` and call it from threads that may.
#[derive(Debug)]
pub struct Pool {
    pub(crate) root: PathBuf,
    pub(crate) ground: Ground,
    /// The device it is mounted from.
    pub(crate) device: PathBuf,
    /// The root folder, held open: space is read through it without a path look-up, and the pool
    /// cannot be unmounted under us.
    pub(crate) dir: File,
    pub(crate) file_system: FileSystem,
    admission: Admission,
    /// What the last walk over the extents found.
    pub(crate) fixed: Mutex<Measured>,
    /// Held while the pool's size changes.
    pub(crate) resizing: Mutex<()>,
    /// The size from before a change that failed and is not undone yet.
    pub(crate) undo_to: Mutex<Option<Bytes>>,
    /// One lock for each (template, size) that is being grown: two requests for the same wait for
    /// one another, others do not.
    pub(crate) growing: Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>,
    /// Flushes of the disks' folder, shared by those who make disks at the same time.
    pub(crate) disks_sync: GroupSync,
}

impl Pool {
    /// Opens the pool at `data_dir`, with empty books: [`Pool::restore`] enters the disks there
    /// are.
    ///
    /// # Errors
    /// [`StorageError::NotMounted`], [`StorageError::OtherDevice`], [`StorageError::NotAPool`] when
    /// it cannot clone files.
    pub fn open(data_dir: &Path, backing: &Backing, bounds: Bounds) -> Result<Pool, StorageError> {
        let place = backing::find(data_dir, backing)?.ok_or_else(|| StorageError::NotMounted(data_dir.to_owned()))?;
        let dir = File::open(data_dir).map_err(|error| StorageError::io("open", data_dir.display(), error))?;
        let file_system = FileSystem::open(place.kind, &dir).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StorageError::NoSysfs(data_dir.to_owned()),
            _ => StorageError::io("read the uncommitted writes of", data_dir.display(), error),
        })?;
        let pool = Pool {
            root: data_dir.to_owned(),
            ground: place.ground,
            device: place.device,
            dir,
            file_system,
            admission: Admission::new(bounds),
            fixed: Mutex::default(),
            resizing: Mutex::default(),
            undo_to: Mutex::default(),
            growing: Mutex::default(),
            disks_sync: GroupSync::default(),
        };
        pool.require_folders()?;
        files::require_reflink(&pool.templates_dir(), &pool.disks_dir())?;
        Ok(pool)
    }

    /// Takes the pool for one program that makes and removes disks in it, for as long as the pool
    /// is open.
    ///
    /// # Errors
    /// [`StorageError::Busy`] while another has it.
    pub fn lock(&self) -> Result<(), StorageError> {
        match files::lock_for_one_program(&self.dir) {
            Ok(true) => Ok(()),
            Ok(false) => Err(StorageError::Busy(self.root.clone())),
            Err(error) => Err(StorageError::io("lock", self.root.display(), error)),
        }
    }

    /// Who the pool belongs to, as [`Pool::set_owner`] wrote it; `None` for a pool that was never
    /// used.
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

    /// Marks the pool as belonging to `owner`, durably: whoever keeps the books of its disks, so
    /// that nobody else takes them for nobody's.
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

    /// An unmounted pool must not look like an empty one.
    pub(crate) fn require_mounted(&self) -> Result<(), StorageError> {
        let (held, there) = (rustix::fs::fstat(&self.dir), rustix::fs::stat(&self.root));
        match (held, there) {
            (Ok(held), Ok(there)) if (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino) => Ok(()),
            _ => Err(StorageError::NotMounted(self.root.clone())),
        }
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// What it lies on.
    pub fn ground(&self) -> &Ground {
        &self.ground
    }

    /// The backing image, if it lies on one.
    pub fn image(&self) -> Option<&Path> {
        match &self.ground {
            Ground::Image(image) => Some(image),
            Ground::Device(_) | Ground::Given => None,
        }
    }

    /// The device that it is mounted from.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// The name of its file system: `btrfs` or `xfs`.
    pub fn file_system(&self) -> &'static str {
        self.file_system.kind().name()
    }

    /// Whether the pool's loop device goes around the host's page cache; `None` when the kernel
    /// does not tell, or there is no such device.
    pub fn direct_io(&self) -> Option<bool> {
        self.image()?;
        let name = self.device.file_name()?;
        let attribute = Path::new("/sys/block").join(name).join("loop/dio");
        Some(std::fs::read_to_string(attribute).ok()?.trim() == "1")
    }

    /// Where kernel and initramfs of the guests lie.
    pub fn kernel_dir(&self) -> PathBuf {
        self.root.join("kernel")
    }

    /// Where a template is built before it is imported; made if it is not there. Nothing in it
    /// outlives a build.
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

    pub(crate) fn templates_dir(&self) -> PathBuf {
        self.root.join("templates")
    }

    /// Where the grown clones of templates are kept.
    pub(crate) fn grown_dir(&self) -> PathBuf {
        self.templates_dir().join(".grown")
    }

    pub(crate) fn disks_dir(&self) -> PathBuf {
        self.root.join("vms")
    }

    /// What the pool and its host disk can take now. A few system calls.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the kernel does not tell.
    pub fn space(&self) -> Result<Space, StorageError> {
        let space = Space::read(&self.dir, &self.file_system, self.image())?;
        Ok(match self.measured_fixed() {
            // Deletions since the walk show in what is used.
            Some(fixed) => Space {
                fixed: fixed.min(space.used),
                ..space
            },
            None => space,
        })
    }

    /// Admits a disk of `size`, or refuses it with nothing done; see [`Admission::admit`].
    ///
    /// # Errors
    /// [`StorageError::Insufficient`].
    pub fn admit(&self, size: Bytes) -> Result<Reservation, StorageError> {
        self.require_mounted()?;
        self.admission.admit(size, || self.space())
    }

    pub(crate) fn backs_every_byte(&self) -> bool {
        self.admission.backs_every_byte()
    }

    /// See [`Admission::lower_ceiling`].
    pub(crate) fn lower_ceiling(
        &self,
        size: Bytes,
        fits: impl FnOnce(Bytes) -> Result<Result<(), Gib>, StorageError>,
    ) -> Result<LoweredCeiling, StorageError> {
        self.admission.lower_ceiling(size, fits)
    }

    /// Enters a disk that is there already, at start.
    pub fn restore(&self, size: Bytes) {
        self.admission.restore(size);
    }

    /// Strikes a deleted disk out of the books.
    pub fn release(&self, size: Bytes) {
        self.admission.release(size);
    }

    /// What is promised now.
    pub fn promises(&self) -> Promises {
        self.admission.promises()
    }

    /// The bounds admission is held to.
    pub fn bounds(&self) -> Bounds {
        self.admission.bounds()
    }

    /// The largest sum of promises this pool takes.
    pub fn commitment_limit(&self, capacity: Bytes) -> Bytes {
        self.admission.limit(capacity)
    }

    /// Puts kernel and initramfs in place of what was there. Machines that run keep the old ones.
    ///
    /// # Errors
    /// [`StorageError::Io`]; after a crash between the two, run it again.
    pub fn install_kernel(&self, vmlinuz: &Path, initrd: &Path) -> Result<(), StorageError> {
        let dir = self.kernel_dir();
        for (from, name) in [(initrd, "initrd.img"), (vmlinuz, "vmlinuz")] {
            self.install_file(from, &dir.join(name))?;
        }
        files::sync_dir(&dir)
    }

    /// Lets every account of the host read kernel and initramfs, as
    /// [`install_kernel`](Pool::install_kernel) does since releases that did not: a hypervisor's
    /// own account then reads the one file, rather than a copy of its own.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn share_kernel(&self) -> Result<(), StorageError> {
        for name in ["initrd.img", "vmlinuz"] {
            let file = self.kernel_dir().join(name);
            match std::fs::set_permissions(&file, Permissions::from_mode(KERNEL_MODE)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StorageError::io("set the mode of", file.display(), error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn install_file(&self, from: &Path, to: &Path) -> Result<(), StorageError> {
        let partial = to.with_extension("partial");
        files::discard(&partial);
        let source = files::open_read(from).map_err(|error| StorageError::io("read", from.display(), error))?;
        let target = files::create_new(&partial)?;
        let copied = files::copy_sparse(&source, &target)
            .and_then(|()| target.set_permissions(Permissions::from_mode(KERNEL_MODE)))
            .and_then(|()| target.sync_all())
            .and_then(|()| std::fs::rename(&partial, to));
        copied.map_err(|error| {
            files::discard(&partial);
            StorageError::io("install", to.display(), error)
        })
    }

    pub(crate) fn disk_path(&self, id: &Name) -> PathBuf {
        self.disks_dir().join(format!("{id}.ext4"))
    }

    fn require_folders(&self) -> Result<(), StorageError> {
        for folder in [self.templates_dir(), self.disks_dir(), self.kernel_dir()] {
            if !folder.is_dir() {
                return Err(StorageError::NotMounted(self.root.clone()));
            }
        }
        Ok(())
    }
}
