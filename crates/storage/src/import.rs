//! Template import and export. An ext4 image, bare or compressed with zstd, is copied into the
//! pool, checked, and only then given its name.

use crate::admission::Reservation;
use crate::error::StorageError;
use crate::image::format;
use crate::image::pack::{self, UnpackError};
use crate::local::files::{self, Folder, PARTIAL};
use crate::pool::Pool;
use crate::template::Template;
use rustix::fs::OFlags;
use scalebox_fault_points::{crash_point, fault_point};
use scalebox_units::{Bytes, TemplateName};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Space admitted at a time while the total size of the data is unknown.
const RESERVATION_STEP: Bytes = Bytes::from_mib(256);

/// An unfinished import. Dropping it removes its file.
struct PendingImport {
    name: TemplateName,
    replace: bool,
    partial: PathBuf,
    file: File,
    finished: bool,
    /// The space that is reserved until the data is written, and then counted as used.
    room: Vec<Reservation>,
}

impl Drop for PendingImport {
    fn drop(&mut self) {
        if !self.finished {
            files::discard(&self.partial);
        }
    }
}

/// A template opened for export. Deleting the template does not affect it.
#[derive(Debug)]
pub struct TemplateExport {
    file: File,
    size: Bytes,
}

impl TemplateExport {
    /// Returns the size of the uncompressed image.
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// Writes the compressed image. Calls `progress` after each MiB of the image with the bytes
    /// done so far.
    ///
    /// # Errors
    /// Any error of reading or writing.
    pub fn write_to(&self, out: impl Write, progress: impl FnMut(Bytes)) -> io::Result<()> {
        pack::pack(&self.file, out, progress)
    }
}

impl Pool {
    /// Imports the ext4 image `source`, of at most `max` bytes, as template `name`. The source is a
    /// file, bare or compressed with zstd, or an unused block device; it is only read. The copy's
    /// journal is replayed and the copy is checked; it appears under its name when it is complete
    /// and durable. With `replace`, it replaces a template of that name; disks made from the old
    /// template are not affected.
    ///
    /// # Errors
    /// [`StorageError::NotATemplate`] with the reason, [`StorageError::TemplateExists`],
    /// [`StorageError::TemplateBeingMade`], [`StorageError::Insufficient`], [`StorageError::Host`].
    pub fn import_template(
        &self,
        name: &TemplateName,
        source: &Path,
        max: Bytes,
        replace: bool,
    ) -> Result<Template, StorageError> {
        let what = source.display().to_string();
        let failed = |error| StorageError::io("read", &what, error);
        // The type is checked before opening, because opening a FIFO would wait for a writer.
        let kind = fs::metadata(source).map_err(failed)?.file_type();
        if kind.is_block_device() {
            return self.import_device(name, &what, source, max, replace);
        }
        if !kind.is_file() {
            return Err(StorageError::not_a_template(
                &what,
                "it is neither a regular file nor a block device",
            ));
        }
        let file = File::open(source).map_err(failed)?;
        let head = format::head_of(&file).map_err(failed)?;
        if pack::is_packed(&head) {
            return self.unpack(name, &what, file, max, replace);
        }
        format::refuse_others(&head).map_err(|reason| StorageError::not_a_template(&what, reason))?;
        self.images.require_template(&what, source)?;
        if file.metadata().map_err(failed)?.len() > max.as_u64() {
            return Err(StorageError::not_a_template(&what, too_large(max)));
        }
        let mut pending = self.begin_import(name, replace)?;
        let data = files::allocated_of(&file).map_err(|errno| failed(errno.into()))?;
        pending.room.push(self.admit(data)?);
        // From within the pool a reflink suffices; otherwise the data is copied.
        if files::reflink(&file, &pending.file).is_err() {
            files::copy_sparse(&file, &pending.file).map_err(|error| StorageError::io("copy", &what, error))?;
        }
        self.finish_import(pending, &what)
    }

    /// Imports a whole block device that is not mounted.
    fn import_device(
        &self,
        name: &TemplateName,
        what: &str,
        source: &Path,
        max: Bytes,
        replace: bool,
    ) -> Result<Template, StorageError> {
        // For a block device, the flag rejects one that is in use (open(2)).
        let exclusive = OFlags::EXCL.bits() as i32;
        let device = File::options().read(true).custom_flags(exclusive).open(source);
        let mut device = device.map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => StorageError::not_a_template(what, "the device is in use: unmount it first"),
            _ => StorageError::io("read", what, error),
        })?;
        let sized = device
            .seek(SeekFrom::End(0))
            .and_then(|size| device.rewind().map(|()| size));
        if sized.map_err(|error| StorageError::io("read", what, error))? > max.as_u64() {
            return Err(StorageError::not_a_template(what, too_large(max)));
        }
        self.unpack(name, what, device, max, replace)
    }

    /// Imports a template like [`Pool::import_template`], from a stream of at most `max` bytes
    /// uncompressed.
    ///
    /// # Errors
    /// The same; [`StorageError::NotATemplate`] also when the stream is damaged or ends early.
    pub fn unpack_template(
        &self,
        name: &TemplateName,
        input: impl Read,
        max: Bytes,
        replace: bool,
    ) -> Result<Template, StorageError> {
        self.unpack(name, "the uploaded file", input, max, replace)
    }

    /// Opens a template for export.
    ///
    /// # Errors
    /// [`StorageError::NoTemplate`].
    pub fn pack_template(&self, name: &TemplateName) -> Result<TemplateExport, StorageError> {
        self.require_mounted()?;
        let (template, file) = self.open_template(name)?;
        Ok(TemplateExport {
            file,
            size: template.size,
        })
    }

    fn unpack(
        &self,
        name: &TemplateName,
        what: &str,
        input: impl Read,
        max: Bytes,
        replace: bool,
    ) -> Result<Template, StorageError> {
        let mut pending = self.begin_import(name, replace)?;
        let PendingImport { file, room, .. } = &mut pending;
        let mut left = Bytes::ZERO;
        let ask = |more: Bytes| {
            if left < more {
                room.push(self.admit(RESERVATION_STEP)?);
                left += RESERVATION_STEP;
            }
            left = left - more;
            Ok::<_, StorageError>(())
        };
        pack::unpack(input, file, max, format::refuse_others, ask).map_err(|why| match why {
            UnpackError::Input(error) => StorageError::not_a_template(what, error),
            UnpackError::Output(error) => StorageError::io("unpack", what, error),
            UnpackError::Room(error) => error,
        })?;
        self.images.require_template(what, &pending.partial)?;
        self.finish_import(pending, what)
    }

    /// Reserves the name of a template to import.
    fn begin_import(&self, name: &TemplateName, replace: bool) -> Result<PendingImport, StorageError> {
        self.require_mounted()?;
        if !replace && self.template_path(name).exists() {
            return Err(StorageError::TemplateExists(name.to_string()));
        }
        let partial = self.templates_dir().join(format!(".{name}{PARTIAL}"));
        let file = self.claim(&partial).map_err(|error| match error {
            StorageError::Busy(_) => StorageError::TemplateBeingMade(name.to_string()),
            other => other,
        })?;
        let pending = PendingImport {
            name: name.clone(),
            replace,
            partial,
            file,
            finished: false,
            room: Vec::new(),
        };
        fault_point("import: file made").map_err(StorageError::step)?;
        Ok(pending)
    }

    /// Checks the imported image, and gives it its name.
    fn finish_import(&self, mut pending: PendingImport, what: &str) -> Result<Template, StorageError> {
        let (partial, name) = (pending.partial.as_path(), &pending.name);
        let refused = |error| match error {
            StorageError::FileSystem(_) => StorageError::not_a_template(what, error),
            other => other,
        };
        fault_point("import: copied").map_err(StorageError::step)?;
        self.images.repair(partial).map_err(refused)?;
        fault_point("import: repaired").map_err(StorageError::step)?;
        // A repair can fail to write and report success.
        self.images.check(partial).map_err(refused)?;
        pending
            .file
            .sync_all()
            .map_err(|error| StorageError::io("flush", partial.display(), error))?;
        fault_point("import: flushed").map_err(StorageError::step)?;
        let template = Template::of_file(name, &pending.file)?;
        let (folder, target) = (Folder::open(&self.templates_dir())?, self.template_path(name));
        let in_place = || fault_point("import: template in place");
        let published = if pending.replace {
            folder.replace(partial, &target, in_place)
        } else {
            folder.publish(partial, &target, in_place)
        };
        published.map_err(|error| exists(error, name))?;
        pending.finished = true;
        crash_point("import: template durable");
        self.prune_base_images(&pending.name, Some(template.inode));
        Ok(template)
    }
}

/// Turns the error for a name in use into [`StorageError::TemplateExists`].
pub(crate) fn exists(error: StorageError, name: &TemplateName) -> StorageError {
    match error {
        StorageError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
            StorageError::TemplateExists(name.to_string())
        }
        other => other,
    }
}

fn too_large(max: Bytes) -> String {
    format!("it is larger than the maximum disk size of {max}")
}
