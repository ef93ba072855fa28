//! Guest kernels, each in a folder `kernels/ID/`, where the id is the digest of its files.
//!
//! A template names its kernel, and so does a VM. A new kernel therefore changes nothing for
//! existing ones. A folder with its final name is complete and never changes.

use crate::error::StorageError;
use crate::local::files::{self, Folder, PARTIAL};
use crate::local::init::KERNELS;
use crate::pool::Pool;
use crate::template::lock_at;
use scalebox_fault_points::{crash_point, fault_point};
use scalebox_units::KernelId;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// File names in a kernel's folder.
pub(crate) const VMLINUZ: &str = "vmlinuz";
pub(crate) const INITRD: &str = "initrd.img";
const MODULES: &str = "modules.img";

/// The mode of a kernel's files. They come from the distribution and are not secret; hypervisor
/// jails hard-link them, and the jail's account must be able to read them.
pub(crate) const KERNEL_MODE: u32 = 0o644;

/// The files of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    /// The kernel that the hypervisor boots.
    pub vmlinuz: PathBuf,
    /// The initramfs of the kernel.
    pub initrd: PathBuf,
    /// The image of a file system with its modules. Kernels of earlier releases have none.
    pub modules: Option<PathBuf>,
}

/// An installed kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The id of the kernel.
    pub id: KernelId,
    /// The files of the kernel.
    pub files: KernelFiles,
}

/// The way in which a kernel's files get into the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// The files are copied from any place.
    Copy,
    /// The files are in the pool, and are hard-linked.
    Link,
}

impl KernelFiles {
    fn in_folder(folder: &Path) -> KernelFiles {
        KernelFiles {
            vmlinuz: folder.join(VMLINUZ),
            initrd: folder.join(INITRD),
            modules: Some(folder.join(MODULES)).filter(|modules| modules.is_file()),
        }
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        [
            (VMLINUZ, Some(&self.vmlinuz)),
            (INITRD, Some(&self.initrd)),
            (MODULES, self.modules.as_ref()),
        ]
        .into_iter()
        .filter_map(|(name, path)| Some((name, path?.as_path())))
    }

    /// Computes the id from the digest of the kernel and the initramfs, and from the presence of
    /// modules. The content of the modules' image is not included, because each build makes it
    /// again from the kernel's package, with other times in it.
    fn id(&self) -> Result<KernelId, StorageError> {
        let mut hash = Sha256::new();
        for (name, path) in self.named() {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            if name != MODULES {
                let failed = |error| StorageError::io("read", path.display(), error);
                let mut file = files::open_read(path).map_err(failed)?;
                hash.update(file.metadata().map_err(failed)?.len().to_le_bytes());
                io::copy(&mut file, &mut hash).map_err(failed)?;
            }
        }
        Ok(KernelId::of_digest(&hash.finalize().into()))
    }
}

impl Pool {
    /// Returns the folder of the kernels.
    pub fn kernels_dir(&self) -> PathBuf {
        self.root.join(KERNELS)
    }

    /// Installs a kernel under its id, durably, and makes it the newest. Its files are copied.
    ///
    /// # Errors
    /// [`StorageError::Busy`] while another program installs the same kernel; [`StorageError::Io`].
    pub fn install_kernel(&self, files: &KernelFiles) -> Result<KernelId, StorageError> {
        self.install_kernel_by(files, Transfer::Copy)
    }

    pub(crate) fn install_kernel_by(&self, files: &KernelFiles, by: Transfer) -> Result<KernelId, StorageError> {
        let id = files.id()?;
        let (parent, target) = (self.kernels_dir(), self.kernels_dir().join(id.as_str()));
        ensure_dir(&parent)?;
        if self.kernel(&id).is_some() {
            make_newest(&target)?;
            files::sync_dir(&parent)?;
            return Ok(id);
        }
        let partial = self.kernels_dir().join(format!(".{id}{PARTIAL}"));
        // The folder is locked, so that no sweep removes it.
        let folder = claim_dir(&partial)?;
        let placed = fill(files, &partial, by)
            .and_then(|()| make_newest(&partial))
            .and_then(|()| Folder::open(&parent)?.publish(&partial, &target, || fault_point("kernel: in place")));
        if let Err(error) = placed {
            discard_dir(&partial);
            return Err(error);
        }
        drop(folder);
        Ok(id)
    }

    /// Returns an installed kernel; `None` if it is missing.
    pub fn kernel(&self, id: &KernelId) -> Option<Kernel> {
        let files = KernelFiles::in_folder(&self.kernels_dir().join(id.as_str()));
        (files.vmlinuz.is_file() && files.initrd.is_file()).then(|| Kernel { id: id.clone(), files })
    }

    /// Lists the installed kernels, the newest first.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn kernels(&self) -> Result<Vec<KernelId>, StorageError> {
        let mut found: Vec<(SystemTime, KernelId)> = Vec::new();
        for path in self.kernel_folders()? {
            let Some(Ok(id)) = path.file_name().and_then(OsStr::to_str).map(str::parse) else {
                continue;
            };
            if self.kernel(&id).is_none() {
                continue;
            }
            match path.symlink_metadata().and_then(|meta| meta.modified()) {
                Ok(modified) => found.push((modified, id)),
                // The folder was removed since the listing.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StorageError::io("read", path.display(), error)),
            }
        }
        found.sort_by(|a, b| b.cmp(a));
        Ok(found.into_iter().map(|(_, id)| id).collect())
    }

    /// Returns the kernel that was installed last; `None` if there is none.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn newest_kernel(&self) -> Result<Option<KernelId>, StorageError> {
        Ok(self.kernels()?.into_iter().next())
    }

    /// Returns the kernel to boot: the preferred one, or the newest if that is missing.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn kernel_or_newest(&self, preferred: Option<&KernelId>) -> Result<Option<Kernel>, StorageError> {
        match preferred.and_then(|id| self.kernel(id)) {
            Some(kernel) => Ok(Some(kernel)),
            None => Ok(self.newest_kernel()?.and_then(|id| self.kernel(&id))),
        }
    }

    /// Removes the kernels that no template names and that are not in `used`, and returns their
    /// ids. The newest one stays, because imported templates get it. While a template's record is
    /// damaged, no kernel is removed.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn remove_unused_kernels(&self, used: &HashSet<KernelId>) -> Result<Vec<KernelId>, StorageError> {
        let others: Vec<KernelId> = self
            .kernels()?
            .into_iter()
            .skip(1)
            .filter(|id| !used.contains(id))
            .collect();
        if others.is_empty() || !self.is_upgraded() {
            return Ok(Vec::new());
        }
        let mut named = HashSet::new();
        for template in self.recorded_templates()? {
            match self.record(&template) {
                Ok(record) => named.extend(record.and_then(|record| record.kernel)),
                Err(StorageError::DamagedRecord { .. }) => return Ok(Vec::new()),
                Err(error) => return Err(error),
            }
        }
        let mut removed = Vec::new();
        for id in others.into_iter().filter(|id| !named.contains(id)) {
            let folder = self.kernels_dir().join(id.as_str());
            let hidden = self.kernels_dir().join(format!(".{id}.deleted{PARTIAL}"));
            self.remove_initramfs(&id, None);
            // A crash from here on leaves a name that the next sweep removes.
            fs::rename(&folder, &hidden).map_err(|error| StorageError::io("remove", folder.display(), error))?;
            crash_point("remove kernel: name gone");
            discard_dir(&hidden);
            removed.push(id);
        }
        Ok(removed)
    }

    /// Makes the files of all kernels readable for every account of the host. A hypervisor's
    /// account then reads this file instead of a copy of its own. Early releases installed them
    /// with mode 0600.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn make_kernels_readable(&self) -> Result<(), StorageError> {
        for id in self.kernels()? {
            for (_, file) in KernelFiles::in_folder(&self.kernels_dir().join(id.as_str())).named() {
                make_readable(file)?;
            }
        }
        Ok(())
    }

    /// Removes the folders of interrupted installations and removals, and returns their paths.
    pub(crate) fn sweep_kernels(&self) -> Result<Vec<PathBuf>, StorageError> {
        let mut removed = Vec::new();
        for path in self.kernel_folders()? {
            if path.as_os_str().as_encoded_bytes().ends_with(PARTIAL.as_bytes()) && sweep_dir(&path)? {
                removed.push(path);
            }
        }
        Ok(removed)
    }

    /// Lists the folders in `kernels/`; empty if it does not exist.
    fn kernel_folders(&self) -> Result<Vec<PathBuf>, StorageError> {
        match files::entries(&self.kernels_dir()) {
            Ok(entries) => Ok(entries
                .into_iter()
                .filter_map(|(path, is_file)| (!is_file && path.is_dir()).then_some(path))
                .collect()),
            Err(StorageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

pub(crate) fn ensure_dir(path: &Path) -> Result<(), StorageError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(StorageError::io("create", path.display(), error))
        }
        _ => Ok(()),
    }
}

/// Creates and locks an unfinished folder. Replaces one left by an interrupted operation.
fn claim_dir(partial: &Path) -> Result<File, StorageError> {
    sweep_dir(partial)?;
    DirBuilder::new()
        .mode(0o700)
        .create(partial)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => StorageError::Busy(partial.to_owned()),
            _ => StorageError::io("create", partial.display(), error),
        })?;
    let folder = File::open(partial).map_err(|error| StorageError::io("open", partial.display(), error));
    let locked = folder.and_then(|folder| Ok((lock_at(&folder, partial)?, folder)));
    match locked {
        Ok((true, folder)) => Ok(folder),
        Ok((false, _)) => Err(StorageError::Busy(partial.to_owned())),
        Err(error) => {
            discard_dir(partial);
            Err(error)
        }
    }
}

/// Removes an unfinished folder unless a running process has it locked.
fn sweep_dir(path: &Path) -> Result<bool, StorageError> {
    let folder = match files::open_read(path) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(StorageError::io("read", path.display(), error)),
    };
    if !lock_at(&folder, path)? {
        return Ok(false);
    }
    files::remove_tree(path)?;
    Ok(true)
}

/// Removes a folder while handling another error, or after the operation has succeeded.
fn discard_dir(path: &Path) {
    if let Err(error) = files::remove_tree(path) {
        tracing::warn!(%error, "cannot remove an unfinished folder; the next start removes it");
    }
}

/// Puts a kernel's files into the new folder `folder`, and flushes all of them.
fn fill(kernel: &KernelFiles, folder: &Path, by: Transfer) -> Result<(), StorageError> {
    fault_point("kernel: folder made").map_err(StorageError::step)?;
    for (name, from) in kernel.named() {
        let to = folder.join(name);
        let placed = match by {
            Transfer::Copy => copy(from, &to)?,
            Transfer::Link => fs::hard_link(from, &to).and_then(|()| files::open_read(&to)),
        };
        placed
            .and_then(|file| {
                file.set_permissions(Permissions::from_mode(KERNEL_MODE))?;
                file.sync_all()
            })
            .map_err(|error| StorageError::io("install", to.display(), error))?;
    }
    files::sync_dir(folder)?;
    fault_point("kernel: files there").map_err(StorageError::step)
}

fn copy(from: &Path, to: &Path) -> Result<io::Result<File>, StorageError> {
    let source = files::open_read(from).map_err(|error| StorageError::io("read", from.display(), error))?;
    let target = files::create_new(to)?;
    Ok(files::copy_sparse(&source, &target).map(|()| target))
}

/// Sets the modification time of the kernel's folder, which makes the kernel the newest.
fn make_newest(folder: &Path) -> Result<(), StorageError> {
    let touched = File::open(folder).and_then(|open| {
        open.set_modified(SystemTime::now())?;
        open.sync_all()
    });
    touched.map_err(|error| StorageError::io("set the time of", folder.display(), error))
}

fn make_readable(file: &Path) -> Result<(), StorageError> {
    match fs::set_permissions(file, Permissions::from_mode(KERNEL_MODE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StorageError::io("set the mode of", file.display(), error))
        }
        _ => Ok(()),
    }
}
