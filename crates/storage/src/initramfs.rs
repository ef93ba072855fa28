//! The initramfs that VMs boot: that of their kernel, with an archive of the daemon appended
//! (`kernels/initramfs/ID-TAG.img`).
//!
//! A kernel is installed once and never changes; the archive changes with each release of the
//! daemon. The kernel unpacks both, one after the other (the buffer format of
//! `Documentation/driver-api/early-userspace/buffer-format.rst`). The combined files are made when
//! they are needed, and again if they are missing.

use crate::error::StorageError;
use crate::kernels::{KERNEL_MODE, Kernel};
use crate::local::files::{self, PARTIAL};
use crate::pool::Pool;
use scalebox_fault_points::fault_point;
use scalebox_units::KernelId;
use std::fs::{self, File, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The folder, in that of the kernels.
const FOLDER: &str = "initramfs";
const SUFFIX: &str = ".img";

/// Archives begin at a multiple of this, in bytes.
const ALIGNMENT: u64 = 4;

/// Serializes the writers. Only the daemon makes these files, and a pool has one daemon.
static WRITER: Mutex<()> = Mutex::new(());

/// An archive that is appended to the initramfs of each kernel.
#[derive(Debug, Clone, Copy)]
pub struct AppendedArchive<'a> {
    /// Distinguishes this archive from those of other releases: letters and digits.
    pub tag: &'a str,
    /// The archive.
    pub content: &'a [u8],
}

impl Pool {
    /// Returns the initramfs of `kernel` with `archive` appended. Makes it if it does not exist;
    /// files of the same kernel with other tags are then removed.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn boot_initramfs(&self, kernel: &Kernel, archive: AppendedArchive) -> Result<PathBuf, StorageError> {
        let folder = self.kernels_dir().join(FOLDER);
        let target = folder.join(format!("{}-{}{SUFFIX}", kernel.id, archive.tag));
        if target.is_file() {
            return Ok(target);
        }
        let _writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        if target.is_file() {
            return Ok(target);
        }
        crate::kernels::ensure_dir(&folder)?;
        let partial = folder.join(format!(".{}{PARTIAL}", kernel.id));
        let placed = write(&kernel.files.initrd, archive.content, &partial)
            .and_then(|()| {
                fault_point("initramfs: written")?;
                fs::rename(&partial, &target)
            })
            .map_err(|error| StorageError::io("write", target.display(), error));
        if let Err(error) = placed {
            files::discard(&partial);
            return Err(error);
        }
        files::sync_dir(&folder)?;
        self.remove_initramfs(&kernel.id, Some(&target));
        Ok(target)
    }

    /// Removes the combined files of a kernel, except `keep`. A failure is logged only: the files
    /// are removed with those of the next release.
    pub(crate) fn remove_initramfs(&self, kernel: &KernelId, keep: Option<&Path>) {
        let folder = self.kernels_dir().join(FOLDER);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return tracing::warn!(%error, folder = %folder.display(), "cannot read the folder"),
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            let is_of_kernel = name.is_some_and(|name| {
                name.strip_prefix(kernel.as_str())
                    .is_some_and(|rest| rest.starts_with('-'))
                    || name == format!(".{kernel}{PARTIAL}")
            });
            if is_of_kernel && keep != Some(path.as_path()) {
                files::discard(&path);
            }
        }
    }
}

/// Writes a kernel's initramfs and the archive to `partial`, and flushes them.
fn write(base: &Path, archive: &[u8], partial: &Path) -> io::Result<()> {
    let mut source = files::open_read(base)?;
    let mut file = File::create(partial)?;
    io::copy(&mut source, &mut file)?;
    let end = file.seek(SeekFrom::End(0))?.next_multiple_of(ALIGNMENT);
    file.set_len(end)?;
    file.seek(SeekFrom::Start(end))?;
    file.write_all(archive)?;
    file.set_permissions(Permissions::from_mode(KERNEL_MODE))?;
    file.sync_all()
}
