//! Publishing templates: image first, record last.

use crate::error::StorageError;
use crate::local::files::{self, Folder};
use crate::pool::Pool;
use crate::record::{IMAGE, Record, TemplateSource};
use crate::template::Template;
use scalebox_fault_points::fault_point;
use scalebox_units::{ImageConfig, Init, KernelId, TemplateName};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A complete and flushed image that is to become a template.
pub(crate) struct NewTemplate<'a> {
    pub(crate) name: &'a TemplateName,
    /// The image, locked, so that no sweep removes it while no record names it.
    pub(crate) file: &'a File,
    /// The present path of the image.
    pub(crate) path: &'a Path,
    pub(crate) source: TemplateSource,
    pub(crate) config: Option<ImageConfig>,
    pub(crate) init: Option<Init>,
    pub(crate) kernel: Option<KernelId>,
    pub(crate) digest: Option<String>,
    /// `true` if the new template may replace a template of that name.
    pub(crate) replace: bool,
}

impl Pool {
    /// Publishes a template: renames the image into place, then durably writes the record. The
    /// record makes the template exist, or replaces the previous one.
    ///
    /// # Errors
    /// [`StorageError::TemplateExists`], [`StorageError::TemplateBeingMade`], [`StorageError::Io`].
    /// Nothing has changed then, and the image has been removed or has its present path.
    pub(crate) fn publish_template(&self, new: NewTemplate<'_>) -> Result<Template, StorageError> {
        let name = new.name;
        let meta = new
            .file
            .metadata()
            .map_err(|error| StorageError::io("read", name, error))?;
        let image = self.free_image_path(name, meta.ino());
        let record = record_of(&new, &image, meta.len());
        // The locked record prevents other publications of this name until it is renamed or
        // removed.
        let (_locked, partial) = self.write_record(name, &record)?;
        let replaced = self.replaceable(name, new.replace);
        let published = self.rename_both(name, (new.path, &image), &partial, replaced.is_some());
        if let Err(error) = published {
            files::discard(&partial);
            return Err(error);
        }
        if let Some(replaced) = replaced.flatten() {
            files::discard(&replaced);
        }
        Ok(Template::of(name, &record, &meta))
    }

    /// Renames the image, and then the record.
    fn rename_both(
        &self,
        name: &TemplateName,
        (from, image): (&Path, &Path),
        record: &Path,
        replace: bool,
    ) -> Result<(), StorageError> {
        let (folder, target) = (Folder::open(&self.templates_dir())?, self.record_path(name));
        folder
            .publish(from, image, || fault_point("template: image in place"))
            .map_err(|error| exists(error, name))?;
        let in_place = || fault_point("template: record in place");
        let published = if replace {
            folder.replace(record, &target, in_place)
        } else {
            folder.publish(record, &target, in_place)
        };
        published.map_err(|error| {
            files::discard(image);
            exists(error, name)
        })
    }

    /// Returns whether the record of a template may be replaced, and the image that it then
    /// replaces. A record without its image is not a template, and is always replaced.
    fn replaceable(&self, name: &TemplateName, replace: bool) -> Option<Option<PathBuf>> {
        match self.record(name) {
            Ok(Some(record)) => {
                let image = self.templates_dir().join(record.image);
                match image.exists() {
                    true => replace.then_some(Some(image)),
                    false => Some(None),
                }
            }
            Ok(None) | Err(_) => replace.then_some(None),
        }
    }

    /// Returns the path of a new image: a name that no other image of the template has.
    fn free_image_path(&self, name: &TemplateName, inode: u64) -> PathBuf {
        let first = self.templates_dir().join(format!("{name}{IMAGE}"));
        match first.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => first,
            _ => self.templates_dir().join(format!("{name}@{inode}{IMAGE}")),
        }
    }
}

/// Returns the record of a new template.
fn record_of(new: &NewTemplate<'_>, image: &Path, size_bytes: u64) -> Record {
    let (mut source_vm, mut reference, mut manifest_digest) = (None, None, None);
    match &new.source {
        TemplateSource::Snapshot(vm) => source_vm = Some(vm.clone()),
        TemplateSource::Pull(pulled) => {
            reference = Some(pulled.reference.clone());
            manifest_digest = Some(pulled.digest.clone());
        }
        TemplateSource::Build | TemplateSource::Import => {}
    }
    Record {
        image: image.file_name().and_then(OsStr::to_str).unwrap_or_default().to_owned(),
        size_bytes,
        created_at: jiff::Timestamp::now(),
        source: Some(new.source.as_str().to_owned()),
        source_vm,
        reference,
        manifest_digest,
        config: new.config.clone(),
        init: new.init,
        kernel: new.kernel.clone(),
        digest: new.digest.clone(),
        other: serde_json::Map::new(),
    }
}

/// Turns the error for a name in use into [`StorageError::TemplateExists`].
fn exists(error: StorageError, name: &TemplateName) -> StorageError {
    match error {
        StorageError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
            StorageError::TemplateExists(name.to_string())
        }
        other => other,
    }
}
