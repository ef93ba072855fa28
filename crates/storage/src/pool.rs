//! An open pool: the handle through which templates and disks are made.

use crate::admission::{Admission, Bounds, Promises, Reservation};
use crate::error::StorageError;
use crate::files;
use crate::init::{backing_file, mounted_pool};
use crate::name::Name;
use crate::size::Bytes;
use crate::space::Space;
use rustix::fs::{Mode, OFlags};
use std::collections::HashMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// A mounted pool. All methods block; share it in an `Arc` and call it from threads that may.
#[derive(Debug)]
pub struct Pool {
    pub(crate) root: PathBuf,
    image: Option<PathBuf>,
    /// The root folder, held open: space is read through it without a path look-up, and the pool cannot be unmounted under us.
    dir: File,
    admission: Admission,
    /// One lock for each (template, size) that is being grown: two requests for the same wait for one another, others do not.
    pub(crate) growing: Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>,
}

impl Pool {
    /// Opens the pool mounted at `data_dir`, with empty books: [`Pool::restore`] enters the disks there are.
    ///
    /// # Errors
    /// [`StorageError::NotMounted`], [`StorageError::NotAPool`] when it cannot clone files.
    pub fn open(data_dir: &Path, bounds: Bounds) -> Result<Pool, StorageError> {
        let mount = mounted_pool(data_dir)?.ok_or_else(|| StorageError::NotMounted(data_dir.to_owned()))?;
        let image = backing_file(&mount)?;
        let dir = File::open(data_dir).map_err(|error| StorageError::io("open", data_dir.display(), error))?;
        let pool = Pool {
            root: data_dir.to_owned(),
            image,
            dir,
            admission: Admission::new(bounds),
            growing: Mutex::default(),
        };
        pool.require_folders()?;
        pool.require_reflink()?;
        Ok(pool)
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// The backing image; `None` for a pool on a device of its own.
    pub fn image(&self) -> Option<&Path> {
        self.image.as_deref()
    }

    /// Where kernel and initramfs of the guests lie.
    pub fn kernel_dir(&self) -> PathBuf {
        self.root.join("kernel")
    }

    /// Where a template is built before it is imported; made if it is not there. Nothing in it outlives a build.
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

    pub(crate) fn disks_dir(&self) -> PathBuf {
        self.root.join("vms")
    }

    /// What the pool and its host disk can take now. A few system calls.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the kernel does not tell.
    pub fn space(&self) -> Result<Space, StorageError> {
        Space::read(&self.dir, self.image())
    }

    /// Admits a disk of `size`, or refuses it with nothing done; see [`Admission::admit`].
    ///
    /// # Errors
    /// [`StorageError::Insufficient`].
    pub fn admit(&self, size: Bytes) -> Result<Reservation, StorageError> {
        self.admission.admit(size, || self.space())
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

    /// Refuses what could not be written right now, for data that is copied in and not promised.
    pub(crate) fn require_free(&self, size: Bytes) -> Result<(), StorageError> {
        self.admit(size).map(drop)
    }

    /// Puts kernel and initramfs in place of what was there. Machines that run keep the old ones.
    ///
    /// # Errors
    /// [`StorageError::Io`]; either both are new or, after a crash between the two, the next run puts it right.
    pub fn install_kernel(&self, vmlinuz: &Path, initrd: &Path) -> Result<(), StorageError> {
        let dir = self.kernel_dir();
        for (from, name) in [(initrd, "initrd.img"), (vmlinuz, "vmlinuz")] {
            self.install_file(from, &dir.join(name))?;
        }
        files::sync_dir(&dir)
    }

    fn install_file(&self, from: &Path, to: &Path) -> Result<(), StorageError> {
        let partial = to.with_extension("partial");
        files::discard(&partial);
        let source = files::open_read(from).map_err(|error| StorageError::io("read", from.display(), error))?;
        let target = files::create_new(&partial)?;
        let copied = files::copy_sparse(&source, &target)
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

    /// Clones an unnamed file from the templates' folder to the disks', as every creation will.
    fn require_reflink(&self) -> Result<(), StorageError> {
        let unnamed = |dir: PathBuf| {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            let fd = rustix::fs::open(&dir, flags, Mode::RUSR | Mode::WUSR);
            fd.map(File::from)
                .map_err(|errno| StorageError::io("create a file in", dir.display(), errno.into()))
        };
        let (source, target) = (unnamed(self.templates_dir())?, unnamed(self.disks_dir())?);
        files::reflink(&source, &target)
            .map_err(|error| StorageError::io("clone files from templates/ to vms/ of", self.root.display(), error))
    }
}
