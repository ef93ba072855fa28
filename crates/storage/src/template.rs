//! Templates: read-only root disks, and their resized base images.
//!
//! A template is a record, `templates/NAME.json`, and the image that it names: `NAME.ext4`, a bare
//! ext4 file system that was unmounted cleanly and checked. Growing a file system takes tens of
//! milliseconds, so it is done once per (template, size): the result, a resized base image, is kept
//! in `templates/.grown/`, and disks are cloned from it. Its file name contains the template's
//! inode number, so a base image of a replaced template is never used.

use crate::error::StorageError;
use crate::local::files::{self, Folder, PARTIAL};
use crate::pool::Pool;
use crate::record::{self, IMAGE, Record, TemplateSource};
use rustix::fs::{FlockOperation, flock};
use scalebox_fault_points::{crash_point, fault_point};
use scalebox_units::{Bytes, Gib, ImageConfig, Init, KernelId, TemplateName};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

/// A template in the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// The name of the template.
    pub name: TemplateName,
    /// The size of the template's image: disks made from it cannot be smaller.
    pub size: Bytes,
    /// The blocks that the template maps, shared or exclusive.
    pub used: Bytes,
    /// The time of creation.
    pub created_at: SystemTime,
    /// The origin of the template; `None` for a template of a release that recorded none.
    pub source: Option<TemplateSource>,
    /// The settings of the image that the template was made from, if the image had any.
    pub config: Option<ImageConfig>,
    /// The first process of its VMs; `None` means the init system in its file system.
    pub init: Option<Init>,
    /// The kernel that its VMs boot; `None` if it was imported into a pool without a kernel.
    pub kernel: Option<KernelId>,
    /// The digest of its image: `blocks-sha256:` and 64 hex digits. `None` for a snapshot, because
    /// reading all of a disk would take much longer than cloning it.
    pub digest: Option<String>,
    pub(crate) inode: u64,
}

impl Template {
    pub(crate) fn of(name: &TemplateName, record: &Record, image: &fs::Metadata) -> Template {
        Template {
            name: name.clone(),
            size: Bytes::new(image.len()),
            used: Bytes::from_blocks(image.blocks(), 512),
            created_at: record.created_at.into(),
            source: record.source(),
            config: record.config.clone(),
            init: record.init,
            kernel: record.kernel.clone(),
            digest: record.digest.clone(),
            inode: image.ino(),
        }
    }
}

/// Maximum number of attempts to create an unfinished file that concurrent sweeps remove.
const MAX_CLAIM_ATTEMPTS: u32 = 16;
/// Maximum number of attempts to open a template that is replaced concurrently.
const MAX_OPEN_ATTEMPTS: u32 = 16;

impl Pool {
    /// Lists all templates, sorted by name. Logs and omits a template whose record is damaged.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn templates(&self) -> Result<Vec<Template>, StorageError> {
        self.require_mounted()?;
        let mut templates = Vec::new();
        for name in self.recorded_templates()? {
            match self.template(&name) {
                Ok(template) => templates.push(template),
                // The template was deleted between the listing and now.
                Err(StorageError::NoTemplate(_)) => {}
                Err(error @ StorageError::DamagedRecord { .. }) => {
                    tracing::error!(template = %name, %error, "cannot list a template");
                }
                Err(error) => return Err(error),
            }
        }
        templates.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(templates)
    }

    /// Lists the names that have a record, damaged or not.
    pub(crate) fn recorded_templates(&self) -> Result<Vec<TemplateName>, StorageError> {
        let name = |path: PathBuf| record::record_owner(path.file_name()?.to_str()?);
        Ok(list(&self.templates_dir())?.into_iter().filter_map(name).collect())
    }

    /// Returns the template `name`.
    ///
    /// # Errors
    /// [`StorageError::NoTemplate`], [`StorageError::DamagedRecord`].
    pub fn template(&self, name: &TemplateName) -> Result<Template, StorageError> {
        let (record, meta) = self.open_recorded(name, |path| {
            let meta = fs::symlink_metadata(path)?;
            match meta.is_file() {
                true => Ok(meta),
                false => Err(io::ErrorKind::NotFound.into()),
            }
        })?;
        Ok(Template::of(name, &record, &meta))
    }

    /// Fails if a template has this name.
    ///
    /// # Errors
    /// [`StorageError::TemplateExists`].
    pub(crate) fn require_unused(&self, name: &TemplateName) -> Result<(), StorageError> {
        match self.template(name) {
            Ok(_) | Err(StorageError::DamagedRecord { .. }) => Err(StorageError::TemplateExists(name.to_string())),
            Err(StorageError::NoTemplate(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes a template and its resized base images. Disks made from it are not affected: the
    /// blocks they share with it stay.
    ///
    /// # Errors
    /// [`StorageError::NoTemplate`].
    pub fn delete_template(&self, name: &TemplateName) -> Result<(), StorageError> {
        let image = match self.record(name) {
            Ok(Some(record)) => Some(self.templates_dir().join(record.image)),
            Ok(None) => {
                self.require_mounted()?;
                return Err(StorageError::NoTemplate(name.to_string()));
            }
            // Its images are leftovers once it is gone: the next sweep removes them.
            Err(StorageError::DamagedRecord { .. }) => None,
            Err(error) => return Err(error),
        };
        let (dir, record) = (self.templates_dir(), self.record_path(name));
        // After a crash from here on, the sweep of unfinished files removes it.
        let hidden = dir.join(format!(".{name}.json.deleted{PARTIAL}"));
        let hidden_step = || fault_point("delete template: name gone");
        let removed = Folder::open(&dir)?.remove(&record, &hidden, hidden_step);
        removed.map_err(|error| match error {
            StorageError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                StorageError::NoTemplate(name.to_string())
            }
            other => other,
        })?;
        crash_point("delete template: template durably gone");
        if let Some(image) = image {
            files::discard(&image);
        }
        self.prune_base_images(name, None);
        Ok(())
    }

    /// Returns the size of a disk made from `template`. It is the requested size, or the larger of
    /// `default` and the template's size.
    ///
    /// # Errors
    /// [`StorageError::SmallerThanTemplate`].
    pub fn disk_size(template: &Template, requested: Option<Gib>, default: Gib) -> Result<Gib, StorageError> {
        let template_size = template.size.ceil_gib();
        match requested {
            Some(requested) if requested < template_size => Err(StorageError::SmallerThanTemplate {
                template: template.name.to_string(),
                template_size,
            }),
            Some(requested) => Ok(requested),
            None => Ok(default.max(template_size)),
        }
    }

    /// Returns an open image of exactly `size` from which a disk of template `name` is cloned. It
    /// is the template itself, or its resized base image, which is made if necessary. The image can
    /// be cloned even if the template is deleted or replaced meanwhile.
    pub(crate) fn base_image(&self, name: &TemplateName, size: Bytes) -> Result<File, StorageError> {
        let (template, original) = self.open_template(name)?;
        if size < template.size {
            let template_size = template.size.ceil_gib();
            return Err(StorageError::SmallerThanTemplate {
                template: name.to_string(),
                template_size,
            });
        }
        // A file system that does not fill its image has to be grown in any case.
        if size == template.size && self.images.fills(&original)? {
            return Ok(original);
        }
        let grown = self.grown_path(&template, size);
        let lock = self.growing_lock(&grown);
        let _growing = lock.lock().unwrap_or_else(PoisonError::into_inner);
        match files::open_read(&grown) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(StorageError::io("read", grown.display(), error)),
        }
        let clone = self.grow_clone(&original, &grown, size).map_err(|error| match error {
            StorageError::FileSystem(reason) => StorageError::DamagedTemplate {
                template: name.to_string(),
                reason,
            },
            StorageError::CannotGrow { size, reason, .. } => StorageError::CannotGrow {
                what: format!("the template {name}"),
                size,
                reason,
            },
            other => other,
        })?;
        // If the template was deleted or replaced meanwhile, its base image is useless, and no
        // later deletion would find it.
        if !self.template(name).is_ok_and(|now| now.inode == template.inode) {
            files::discard(&grown);
        }
        Ok(clone)
    }

    /// Opens a template. Record and image belong together, even during a replacement.
    pub(crate) fn open_template(&self, name: &TemplateName) -> Result<(Template, File), StorageError> {
        let (record, file) = self.open_recorded(name, files::open_read)?;
        let meta = file.metadata().map_err(|error| StorageError::io("read", name, error))?;
        Ok((Template::of(name, &record, &meta), file))
    }

    /// Reads the record of a template, and calls `open` with the path of its image.
    fn open_recorded<T>(
        &self,
        name: &TemplateName,
        open: impl Fn(&Path) -> io::Result<T>,
    ) -> Result<(Record, T), StorageError> {
        for _ in 0..MAX_OPEN_ATTEMPTS {
            let Some(record) = self.record(name)? else { break };
            let path = self.templates_dir().join(&record.image);
            match open(&path) {
                Ok(opened) => return Ok((record, opened)),
                // The template was replaced or deleted since its record was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StorageError::io("read", path.display(), error)),
            }
        }
        // In an unmounted pool every template is missing; report that instead.
        self.require_mounted()?;
        Err(StorageError::NoTemplate(name.to_string()))
    }

    fn grow_clone(&self, original: &File, grown: &Path, size: Bytes) -> Result<File, StorageError> {
        let folder = self.grown_dir();
        // Inside templates/, the folder inherits NOCOW.
        fs::create_dir_all(&folder).map_err(|error| StorageError::io("create", folder.display(), error))?;
        // The name need not survive a power cut: the image would be made again.
        let arrange = |clone: &File| self.images.defragment(clone);
        self.replace_by_resized_clone(original, grown, size, arrange, |partial| {
            fs::rename(partial, grown).map_err(|error| StorageError::io("create", grown.display(), error))?;
            crash_point("resized clone: in place");
            Ok(())
        })
    }

    /// Clones `original`, grows the clone to `size`, calls `arrange` on it and checks it. Then
    /// `place` gives the complete and flushed clone the name `target`. Until then nothing changes,
    /// and a failure leaves nothing behind. Returns the open clone.
    pub(crate) fn replace_by_resized_clone(
        &self,
        original: &File,
        target: &Path,
        size: Bytes,
        arrange: impl FnOnce(&File) -> io::Result<()>,
        place: impl FnOnce(&Path) -> Result<(), StorageError>,
    ) -> Result<File, StorageError> {
        let mut partial = target.as_os_str().to_owned();
        partial.push(PARTIAL);
        let partial = PathBuf::from(partial);
        if let Some(reason) = self.images.cannot_grow(original)? {
            return Err(StorageError::CannotGrow {
                what: "the disk".to_owned(),
                size: size.ceil_gib(),
                reason: format!("it {reason}"),
            });
        }
        let clone = self.claim(&partial)?;
        let made = self
            .make_resized(original, &partial, &clone, size, arrange)
            .and_then(|()| place(&partial));
        if made.is_err() {
            files::discard(&partial);
        }
        made.map(|()| clone)
    }

    /// Turns the unfinished file `clone` at `partial` into a flushed copy of `original`, grown to
    /// `size`.
    fn make_resized(
        &self,
        original: &File,
        partial: &Path,
        clone: &File,
        size: Bytes,
        arrange: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<(), StorageError> {
        fault_point("resized clone: file made").map_err(StorageError::step)?;
        self.file_system
            .clone_file(original, clone)
            .map_err(|error| StorageError::io("clone", partial.display(), error))?;
        fault_point("resized clone: cloned").map_err(StorageError::step)?;
        let before = self.images.grow(partial, clone, size)?;
        fault_point("resized clone: file system larger").map_err(StorageError::step)?;
        arrange(clone).map_err(|error| StorageError::io("defragment", partial.display(), error))?;
        fault_point("resized clone: arranged").map_err(StorageError::step)?;
        self.images.finish_growth(partial, clone, before.as_ref())?;
        drop(before);
        clone
            .sync_all()
            .map_err(|error| StorageError::io("flush", partial.display(), error))?;
        fault_point("resized clone: flushed").map_err(StorageError::step)
    }

    fn growing_lock(&self, grown: &Path) -> Arc<std::sync::Mutex<()>> {
        let mut growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(growing.entry(grown.to_owned()).or_default())
    }

    /// Creates and locks an unfinished file, so that no sweep removes it. Replaces one left by an
    /// interrupted operation.
    pub(crate) fn claim(&self, partial: &Path) -> Result<File, StorageError> {
        let busy = || StorageError::Busy(partial.to_owned());
        for _ in 0..MAX_CLAIM_ATTEMPTS {
            sweep_partial(partial)?;
            let file = match files::create_new(partial) {
                Err(StorageError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(busy());
                }
                other => other?,
            };
            // Before it is locked, a concurrent sweep may mistake it for a leftover and remove it.
            match lock_at(&file, partial) {
                Ok(true) => return Ok(file),
                Ok(false) => {}
                Err(error) => {
                    files::discard(partial);
                    return Err(error);
                }
            }
        }
        Err(busy())
    }

    /// Removes the resized base images of a template, except those of the template file with inode
    /// `keep`. Images that cannot be removed are useless; the next start removes them.
    pub(crate) fn prune_base_images(&self, name: &TemplateName, keep: Option<u64>) {
        let prefix = format!("{name}@");
        let clones = list(&self.grown_dir()).unwrap_or_else(|error| {
            tracing::warn!(template = %name, %error, "cannot list the template's resized base images; the next start removes them");
            Vec::new()
        });
        for path in clones {
            let Some(file) = path.file_name().and_then(OsStr::to_str) else {
                continue;
            };
            let stale = file
                .strip_prefix(&prefix)
                .is_some_and(|rest| !keep.is_some_and(|inode| rest.starts_with(&format!("{inode}."))));
            if stale && !file.ends_with(PARTIAL) {
                files::discard(&path);
            }
        }
    }

    /// Removes the unfinished files of interrupted operations, and returns their paths. Files
    /// locked by another process are left alone.
    pub fn sweep_partials(&self) -> Result<Vec<PathBuf>, StorageError> {
        let templates = self.templates_dir();
        let mut removed = Vec::new();
        let folders = [self.grown_dir(), templates, self.disks_dir()];
        for folder in folders {
            for path in list(&folder)? {
                if path.as_os_str().as_encoded_bytes().ends_with(PARTIAL.as_bytes()) && sweep_partial(&path)? {
                    removed.push(path);
                }
            }
        }
        removed.extend(self.sweep_kernels()?);
        removed.extend(self.sweep_unrecorded_images()?);
        removed.extend(self.sweep_stale_clones()?);
        Ok(removed)
    }

    /// Removes images that no record names, which are left by interrupted operations. In a pool of
    /// an earlier release there are no records yet: the [upgrade](Pool::upgrade) comes first.
    fn sweep_unrecorded_images(&self) -> Result<Vec<PathBuf>, StorageError> {
        let mut removed = Vec::new();
        if !self.is_upgraded() {
            return Ok(removed);
        }
        for path in list(&self.templates_dir())? {
            let Some(file) = path.file_name().and_then(OsStr::to_str) else {
                continue;
            };
            let Some(name) = record::image_owner(file) else {
                continue;
            };
            let is_recorded = || match self.record(&name) {
                Ok(record) => Ok(record.is_some_and(|record| record.image == file)),
                // A damaged record may name the image.
                Err(StorageError::DamagedRecord { .. }) => Ok(true),
                Err(error) => Err(error),
            };
            if !is_recorded()? && sweep_if(&path, || Ok(!is_recorded()?))? {
                removed.push(path);
            }
        }
        Ok(removed)
    }

    /// Removes resized base images whose template was deleted or replaced.
    fn sweep_stale_clones(&self) -> Result<Vec<PathBuf>, StorageError> {
        let current: Vec<String> = self
            .templates()?
            .iter()
            .map(|template| format!("{}@{}.", template.name, template.inode))
            .collect();
        let mut removed = Vec::new();
        for path in list(&self.grown_dir())? {
            let file = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
            if file.ends_with(IMAGE) && !current.iter().any(|prefix| file.starts_with(prefix)) {
                fs::remove_file(&path).map_err(|error| StorageError::io("remove", path.display(), error))?;
                removed.push(path);
            }
        }
        Ok(removed)
    }

    fn grown_path(&self, template: &Template, size: Bytes) -> PathBuf {
        let file = format!("{}@{}.{}{IMAGE}", template.name, template.inode, size.as_u64());
        self.grown_dir().join(file)
    }
}

/// Removes an unfinished file unless a running process has it locked.
fn sweep_partial(path: &Path) -> Result<bool, StorageError> {
    sweep_if(path, || Ok(true))
}

/// Removes a file unless a running process has it locked, or `is_leftover`, called with the lock
/// held, returns `false`.
fn sweep_if(path: &Path, is_leftover: impl FnOnce() -> Result<bool, StorageError>) -> Result<bool, StorageError> {
    let file = match files::open_read(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(StorageError::io("read", path.display(), error)),
    };
    if !lock_at(&file, path)? || !is_leftover()? {
        return Ok(false);
    }
    fs::remove_file(path).map_err(|error| StorageError::io("remove", path.display(), error))?;
    Ok(true)
}

/// Locks `file` and returns whether it is still the file at `path`. Only the holder of the lock
/// removes that file. Returns `false` also when another process holds the lock.
pub(crate) fn lock_at(file: &File, path: &Path) -> Result<bool, StorageError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
        Err(errno) => return Err(StorageError::io("lock", path.display(), errno.into())),
    }
    let failed = |error| StorageError::io("read", path.display(), error);
    let held = file.metadata().map_err(failed)?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (held.dev(), held.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Lists the regular files in a folder; empty if the folder does not exist. Other entries are
/// ignored.
pub(crate) fn list(dir: &Path) -> Result<Vec<PathBuf>, StorageError> {
    match files::entries(dir) {
        Ok(entries) => Ok(entries
            .into_iter()
            .filter_map(|(path, is_file)| is_file.then_some(path))
            .collect()),
        Err(StorageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
