//! Imports a template from a file or a stream, of any kind that is recognised by its content.

use crate::host::error::ServiceError;
use scalebox_images::convert::{FSTAB, HEAD_BYTES, convert, needs_conversion, receive, recognise, without_partitions};
use scalebox_images::oci::{Limits, OciError, Phase, Room, Supervisor, Task};
use scalebox_storage::{ConvertedImage, EditedFile, Pool, StorageError, Template};
use scalebox_units::{Bytes, TemplateName};
use std::error::Error;
use std::io::{Cursor, Read};
use std::path::Path;
use std::sync::Arc;

/// An import into a pool. Its functions block.
pub(crate) struct Import {
    pool: Arc<Pool>,
    name: TemplateName,
    replace: bool,
    task: Task,
    max_disk: Bytes,
}

impl Import {
    /// Prepares the import of a template of at most `max_disk` bytes.
    pub(crate) fn new(pool: Arc<Pool>, name: TemplateName, max_disk: Bytes, replace: bool) -> Import {
        let limits = Limits {
            max_disk,
            ..Limits::default()
        };
        Import {
            task: Task::new(Arc::new(Admission(Arc::clone(&pool))), limits),
            pool,
            name,
            replace,
            max_disk,
        }
    }

    /// Returns the task, by which another thread can cancel a conversion.
    pub(crate) fn task(&self) -> Task {
        self.task.clone()
    }

    /// Imports a file, or an unused block device with a file system.
    ///
    /// # Errors
    /// 400 if the image cannot become a template, 409 if the name is in use or the template is
    /// being made, 507 if it does not fit. Nothing is left behind.
    pub(crate) fn file(&self, file: &Path) -> Result<Template, ServiceError> {
        // Only a regular file is opened: opening a FIFO would wait for a writer.
        let is_file = std::fs::metadata(file).is_ok_and(|meta| meta.is_file());
        match is_file && recognise(file)?.is_convertible() {
            true => self.convert(file),
            false => Ok(self
                .pool
                .import_template(&self.name, file, self.max_disk, self.replace)?),
        }
    }

    /// Imports an image that arrives as a stream. A file system goes straight into the pool; other
    /// images are stored in a file first.
    ///
    /// # Errors
    /// Those of [`Import::file`].
    pub(crate) fn stream(&self, mut input: impl Read) -> Result<Template, ServiceError> {
        let mut head = Vec::new();
        let read = input.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head);
        read.map_err(OciError::Incomplete)?;
        let is_converted = needs_conversion(&head);
        let whole = Cursor::new(head).chain(input);
        if !is_converted {
            let made = self
                .pool
                .unpack_template(&self.name, whole, self.max_disk, self.replace);
            return Ok(made?);
        }
        // Known before gigabytes have arrived.
        if !self.replace && self.pool.template(&self.name).is_ok() {
            return Err(StorageError::TemplateExists(self.name.to_string()).into());
        }
        let received = receive(whole, &self.pool.build_dir()?, &self.task)?;
        self.convert(received.path())
    }

    /// Imports a disk image or an archive.
    fn convert(&self, file: &Path) -> Result<Template, ServiceError> {
        let made = convert(file, &self.pool.build_dir()?, &self.task)?;
        let fstab = [EditedFile {
            path: FSTAB,
            edit: &without_partitions,
        }];
        let image = ConvertedImage {
            path: &made.image,
            pulled: None,
            config: made.config.clone(),
            init: Some(made.init),
            // An image of containers has settings instead of partitions.
            edited_files: if made.config.is_some() { &[] } else { &fstab },
        };
        Ok(self.pool.import_converted(&self.name, image, self.replace)?)
    }
}

/// Admits the space of a conversion.
struct Admission(Arc<Pool>);

impl Supervisor for Admission {
    fn reserve(&self, bytes: Bytes) -> Result<Room, Box<dyn Error + Send + Sync>> {
        Ok(Box::new(self.0.admit(bytes)?))
    }

    fn progress(&self, _phase: Phase, _done: Bytes, _total: Bytes) {}
}
