//! Template import and export. An ext4 image, bare or compressed with zstd, is copied into the
//! pool, checked, and only then given its name.

use crate::admission::Reservation;
use crate::error::StorageError;
use crate::image::digest::digest;
use crate::image::format;
use crate::image::pack::{self, UnpackError};
use crate::image::scrub::{EditedFile, Scrub};
use crate::local::files::{self, PARTIAL};
use crate::pool::Pool;
use crate::publish::NewTemplate;
use crate::record::{PulledImage, TemplateSource};
use crate::snapshot::MAX_SCRUB_WRITES;
use crate::template::Template;
use rustix::fs::OFlags;
use scalebox_fault_points::{crash_point, fault_point};
use scalebox_units::{Bytes, ImageConfig, Init, KernelId, TemplateName};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Space admitted at a time while the total size of the data is unknown.
const RESERVATION_STEP: Bytes = Bytes::from_mib(256);

/// An unfinished import. Dropping it removes its file.
struct PendingImport {
    name: TemplateName,
    source: TemplateSource,
    config: Option<ImageConfig>,
    init: Option<Init>,
    kernel: Option<KernelId>,
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

/// A bare ext4 image that was made from an image of another kind.
#[derive(Clone)]
pub struct ConvertedImage<'i> {
    /// The file.
    pub path: &'i Path,
    /// The image in a registry, if it was pulled.
    pub pulled: Option<PulledImage>,
    /// The settings of the image, if it had any.
    pub config: Option<ImageConfig>,
    /// The first process of its VMs.
    pub init: Option<Init>,
    /// Text files whose lines are changed in the template.
    pub edited_files: &'i [EditedFile<'i>],
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
    /// template are not affected. Its VMs boot the newest kernel of the pool.
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
        let pending = self.begin_import(name, replace)?;
        self.copy_image(pending, &what, &file)
    }

    /// Imports the bare ext4 image that was built together with a kernel, which the template's VMs
    /// boot. Replaces a template of that name.
    ///
    /// # Errors
    /// As for [`Pool::import_template`].
    pub fn import_built(&self, name: &TemplateName, image: &Path, kernel: &KernelId) -> Result<Template, StorageError> {
        let what = image.display().to_string();
        self.images.require_template(&what, image)?;
        let file = File::open(image).map_err(|error| StorageError::io("read", &what, error))?;
        let mut pending = self.begin_import(name, true)?;
        pending.source = TemplateSource::Build;
        pending.kernel = Some(kernel.clone());
        self.copy_image(pending, &what, &file)
    }

    /// Imports a converted image as template `name`, which its record describes. With `replace`, it
    /// replaces a template of that name. Its VMs boot the newest kernel of the pool.
    ///
    /// # Errors
    /// As for [`Pool::import_template`].
    pub fn import_converted(
        &self,
        name: &TemplateName,
        image: ConvertedImage<'_>,
        replace: bool,
    ) -> Result<Template, StorageError> {
        let what = name.to_string();
        self.images.require_template(&what, image.path)?;
        let file = File::open(image.path).map_err(|error| StorageError::io("read", &what, error))?;
        let mut pending = self.begin_import(name, replace)?;
        pending.source = image.pulled.map_or(TemplateSource::Import, TemplateSource::Pull);
        pending.config = image.config;
        pending.init = image.init;
        self.fill(&mut pending, &what, &file)?;
        self.check_import(&pending, &what)?;
        if !image.edited_files.is_empty() {
            self.edit_import(&mut pending, &what, image.edited_files)?;
        }
        self.publish_import(pending)
    }

    /// Copies a bare image, and makes a template of the copy.
    fn copy_image(&self, mut pending: PendingImport, what: &str, file: &File) -> Result<Template, StorageError> {
        self.fill(&mut pending, what, file)?;
        self.finish_import(pending, what)
    }

    /// Copies a bare image.
    fn fill(&self, pending: &mut PendingImport, what: &str, file: &File) -> Result<(), StorageError> {
        let failed = |error| StorageError::io("read", what, error);
        let data = files::allocated_of(file).map_err(|errno| failed(errno.into()))?;
        pending.room.push(self.admit(data)?);
        // From within the pool a reflink suffices; otherwise the data is copied.
        if files::reflink(file, &pending.file).is_err() {
            files::copy_sparse(file, &pending.file).map_err(|error| StorageError::io("copy", what, error))?;
        }
        Ok(())
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
        if !replace {
            self.require_unused(name)?;
        }
        let partial = self.templates_dir().join(format!(".{name}{PARTIAL}"));
        let file = self.claim(&partial).map_err(|error| match error {
            StorageError::Busy(_) => StorageError::TemplateBeingMade(name.to_string()),
            other => other,
        })?;
        // From here on, an error removes the file.
        let mut pending = PendingImport {
            name: name.clone(),
            source: TemplateSource::Import,
            config: None,
            init: None,
            kernel: None,
            replace,
            partial,
            file,
            finished: false,
            room: Vec::new(),
        };
        fault_point("import: file made").map_err(StorageError::step)?;
        pending.kernel = self.newest_kernel()?;
        Ok(pending)
    }

    /// Checks the imported image, and publishes it as a template.
    fn finish_import(&self, pending: PendingImport, what: &str) -> Result<Template, StorageError> {
        self.check_import(&pending, what)?;
        self.publish_import(pending)
    }

    /// Replays the journal of the imported image, and checks the image.
    fn check_import(&self, pending: &PendingImport, what: &str) -> Result<(), StorageError> {
        let partial = pending.partial.as_path();
        let refused = |error| match error {
            StorageError::FileSystem(_) => StorageError::not_a_template(what, error),
            other => other,
        };
        fault_point("import: copied").map_err(StorageError::step)?;
        self.images.repair(partial).map_err(refused)?;
        fault_point("import: repaired").map_err(StorageError::step)?;
        // A repair can fail to write and report success.
        self.images.check(partial).map_err(refused)
    }

    /// Changes lines of text files in the imported image, which was checked.
    fn edit_import(
        &self,
        pending: &mut PendingImport,
        what: &str,
        edited_files: &[EditedFile<'_>],
    ) -> Result<(), StorageError> {
        pending.room.push(self.admit(MAX_SCRUB_WRITES)?);
        let edits = Scrub {
            edited_files,
            ..Scrub::default()
        };
        let edited = self.images.scrub(&pending.partial, &pending.file, &edits);
        edited.map_err(|error| match error {
            StorageError::UnfitDisk(_) | StorageError::FileSystem(_) => StorageError::not_a_template(what, error),
            other => other,
        })
    }

    /// Publishes the imported image as a template.
    fn publish_import(&self, mut pending: PendingImport) -> Result<Template, StorageError> {
        let (partial, name) = (pending.partial.as_path(), &pending.name);
        pending
            .file
            .sync_all()
            .map_err(|error| StorageError::io("flush", partial.display(), error))?;
        fault_point("import: flushed").map_err(StorageError::step)?;
        let digest = digest(&pending.file).map_err(|error| StorageError::io("read", partial.display(), error))?;
        let template = self.publish_template(NewTemplate {
            name,
            file: &pending.file,
            path: partial,
            source: pending.source.clone(),
            config: pending.config.clone(),
            init: pending.init,
            kernel: pending.kernel.clone(),
            digest: Some(digest),
            replace: pending.replace,
        })?;
        pending.finished = true;
        crash_point("import: template durable");
        self.prune_base_images(&pending.name, Some(template.inode));
        Ok(template)
    }
}

fn too_large(max: Bytes) -> String {
    format!("it is larger than the maximum disk size of {max}")
}
