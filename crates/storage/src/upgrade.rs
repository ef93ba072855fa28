//! Upgrades a pool of an earlier release. Such a pool has one kernel for all templates, in
//! `kernel/`, and no records of templates.
//!
//! The folder `kernel/` marks such a pool. The upgrade installs its kernel under its id, gives each
//! image a record, and removes the folder last. Nothing is copied. After a crash at any step, the
//! next upgrade completes the rest. A folder `kernel/` of another program, in a pool on an existing
//! file system, is not changed. A pool that has images and not a single record is upgraded too.

use crate::error::StorageError;
use crate::kernels::{INITRD, KernelFiles, Transfer, VMLINUZ};
use crate::local::files::{self, Folder};
use crate::local::init::PREVIOUS_KERNEL;
use crate::pool::Pool;
use crate::record::{Record, image_owner, record_owner};
use crate::template::list;
use scalebox_fault_points::{crash_point, fault_point};
use scalebox_units::{KernelId, TemplateName};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The files that earlier releases put into that folder, with the unfinished ones.
const PREVIOUS_FILES: [&str; 4] = [VMLINUZ, INITRD, "vmlinuz.partial", "initrd.partial"];

impl Pool {
    /// Returns whether the pool has records of its templates. Otherwise it was made by an earlier
    /// release, and [`Pool::upgrade`] must come first.
    pub fn is_upgraded(&self) -> bool {
        !self.has_previous_kernel() && !self.has_images_without_any_record()
    }

    fn has_previous_kernel(&self) -> bool {
        let entries = match fs::read_dir(self.previous_kernel_dir()) {
            Ok(entries) => entries,
            Err(error) => return error.kind() != io::ErrorKind::NotFound,
        };
        let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
        let ours = |name: &OsString| PREVIOUS_FILES.iter().any(|file| name == *file);
        let is_kernel = |name: &OsString| name == VMLINUZ || name == INITRD;
        names.iter().all(ours) || names.iter().any(is_kernel)
    }

    /// Detects a pool of an earlier release whose folder `kernel/` was removed by hand. The sweep
    /// must not treat its templates as leftovers.
    fn has_images_without_any_record(&self) -> bool {
        let files = list(&self.templates_dir()).unwrap_or_default();
        let names = || files.iter().filter_map(|path| path.file_name()?.to_str());
        names().any(|file| image_owner(file).is_some()) && !names().any(|file| record_owner(file).is_some())
    }

    /// Upgrades a pool of an earlier release; does nothing with any other. Call it with the pool
    /// [locked](Pool::lock).
    ///
    /// # Errors
    /// [`StorageError::Io`]. Call it again to complete the upgrade.
    pub fn upgrade(&self) -> Result<(), StorageError> {
        if self.is_upgraded() {
            return Ok(());
        }
        let kernel = self.adopt_kernel()?;
        let recorded = self.record_images(kernel.as_ref())?;
        self.remove_previous_kernel()?;
        crash_point("upgrade: complete");
        tracing::info!(
            templates = recorded,
            kernel = kernel.as_ref().map(KernelId::as_str),
            "upgraded the pool: templates have records, and kernels are kept by their ids"
        );
        Ok(())
    }

    /// Installs the kernel of the earlier release under its id. `None` if there is none.
    fn adopt_kernel(&self) -> Result<Option<KernelId>, StorageError> {
        let folder = self.previous_kernel_dir();
        let previous = KernelFiles {
            vmlinuz: folder.join(VMLINUZ),
            initrd: folder.join(INITRD),
            modules: None,
        };
        if !previous.vmlinuz.is_file() || !previous.initrd.is_file() {
            return Ok(None);
        }
        let kernel = self.install_kernel_by(&previous, Transfer::Link)?;
        fault_point("upgrade: kernel adopted").map_err(StorageError::step)?;
        Ok(Some(kernel))
    }

    /// Writes a record for each image that has none. Returns their number.
    fn record_images(&self, kernel: Option<&KernelId>) -> Result<usize, StorageError> {
        let mut recorded = 0;
        for path in list(&self.templates_dir())? {
            let Some(file) = path.file_name().and_then(OsStr::to_str) else {
                continue;
            };
            let Some(name) = image_owner(file) else { continue };
            if self.record(&name)?.is_none() {
                self.record_image(&name, &path, file, kernel)?;
                recorded += 1;
            }
        }
        fault_point("upgrade: templates recorded").map_err(StorageError::step)?;
        Ok(recorded)
    }

    fn record_image(
        &self,
        name: &TemplateName,
        path: &Path,
        file: &str,
        kernel: Option<&KernelId>,
    ) -> Result<(), StorageError> {
        let meta = path
            .symlink_metadata()
            .map_err(|error| StorageError::io("read", path.display(), error))?;
        let created = meta.created().or_else(|_| meta.modified());
        let record = Record {
            image: file.to_owned(),
            size_bytes: meta.len(),
            created_at: created.unwrap_or(SystemTime::UNIX_EPOCH).try_into().unwrap_or_default(),
            source: None,
            source_vm: None,
            reference: None,
            manifest_digest: None,
            config: None,
            init: None,
            kernel: kernel.cloned(),
            digest: None,
            other: serde_json::Map::new(),
        };
        let (_locked, partial) = self.write_record(name, &record)?;
        let folder = Folder::open(&self.templates_dir())?;
        let published = folder.publish(&partial, &self.record_path(name), || {
            fault_point("upgrade: record in place")
        });
        published.inspect_err(|_| files::discard(&partial))
    }

    fn previous_kernel_dir(&self) -> PathBuf {
        self.root.join(PREVIOUS_KERNEL)
    }

    /// Removes the folder of the previous kernel. Files in it that are not of the earlier release
    /// stay.
    fn remove_previous_kernel(&self) -> Result<(), StorageError> {
        let folder = self.previous_kernel_dir();
        for name in PREVIOUS_FILES {
            let file = folder.join(name);
            match fs::remove_file(&file) {
                Ok(()) => fault_point("upgrade: old kernel's file removed").map_err(StorageError::step)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StorageError::io("remove", file.display(), error)),
            }
        }
        match fs::remove_dir(&folder) {
            Err(error) => match error.kind() {
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound => Ok(()),
                _ => Err(StorageError::io("remove", folder.display(), error)),
            },
            Ok(()) => files::sync_dir(&self.root),
        }
    }
}
