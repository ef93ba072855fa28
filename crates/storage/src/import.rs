//! Templates from elsewhere, and to elsewhere: an ext4 image, bare or packed with zstd, is copied in, checked, and only then given its name.

use crate::admission::Reservation;
use crate::error::StorageError;
use crate::ext4;
use crate::files;
use crate::name::Name;
use crate::pack::{self, Unpacked};
use crate::pool::Pool;
use crate::signature::probe;
use crate::size::Bytes;
use crate::space;
use crate::template::{PARTIAL, Template};
use scalebox_fault_points::crash_point;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// So much room is asked for at a time, while it is not known how much data is still to come.
const LOT: Bytes = Bytes::from_mib(256);

/// A template on its way in. Dropped before it is finished, nothing is left of it.
struct Incoming {
    name: Name,
    replace: bool,
    partial: PathBuf,
    file: File,
    finished: bool,
    /// Held until the data is there, and counts for itself.
    room: Vec<Reservation>,
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.finished {
            files::discard(&self.partial);
        }
    }
}

/// A template that is about to be packed. It is open: deleting it changes nothing.
#[derive(Debug)]
pub struct Packing {
    file: File,
    size: Bytes,
}

impl Packing {
    /// The size of the image that is packed.
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// Writes the packed image. `told` is told after each MiB of the image how much of it is done.
    ///
    /// # Errors
    /// What reading or writing fails with.
    pub fn write_to(&self, out: impl Write, told: impl FnMut(Bytes)) -> io::Result<()> {
        pack::pack(&self.file, out, told)
    }
}

impl Pool {
    /// Copies the ext4 image `source`, bare or packed with zstd, into the pool as template `name`. The source is only read; the copy has its journal
    /// replayed and is checked, and appears under its name when it is whole and durable. With `replace`, a template of that name gives way to
    /// it; disks made from the old one are not touched.
    ///
    /// # Errors
    /// [`StorageError::NotATemplate`] with the reason, [`StorageError::TemplateExists`], [`StorageError::TemplateBeingMade`],
    /// [`StorageError::Insufficient`].
    pub fn import_template(&self, name: &Name, source: &Path, replace: bool) -> Result<Template, StorageError> {
        let what = source.display().to_string();
        // Looked at before it is opened: opening a FIFO would wait for somebody to write to it.
        let meta = fs::metadata(source).map_err(|error| StorageError::io("read", &what, error))?;
        if !meta.is_file() {
            return Err(not_a_template(&what, "it is not a plain file"));
        }
        let file = File::open(source).map_err(|error| StorageError::io("read", &what, error))?;
        if starts_with(&file, &pack::MAGIC) {
            let file = File::open(source).map_err(|error| StorageError::io("read", &what, error))?;
            return self.unpack(name, &what, file, Bytes::new(u64::MAX), replace);
        }
        require_bare_ext4(&what, source, &file)?;
        let mut incoming = self.begin_import(name, replace)?;
        let data = space::allocated_of(&file).map_err(|errno| StorageError::io("read", &what, errno.into()))?;
        incoming.room.push(self.admit(data)?);
        // From within the pool a clone will do; from anywhere else its data is copied.
        if files::reflink(&file, &incoming.file).is_err() {
            files::copy_sparse(&file, &incoming.file).map_err(|error| StorageError::io("copy", &what, error))?;
        }
        self.finish_import(incoming, &what)
    }

    /// As [`Pool::import_template`], of an image that comes in as a stream, at most `largest` of it unpacked.
    ///
    /// # Errors
    /// As there; [`StorageError::NotATemplate`] also when the stream is damaged or ends early.
    pub fn unpack_template(
        &self,
        name: &Name,
        input: impl Read,
        largest: Bytes,
        replace: bool,
    ) -> Result<Template, StorageError> {
        self.unpack(name, "what was sent", input, largest, replace)
    }

    /// Opens a template to pack it.
    ///
    /// # Errors
    /// [`StorageError::NoTemplate`].
    pub fn pack_template(&self, name: &Name) -> Result<Packing, StorageError> {
        self.require_mounted()?;
        let (template, file) = self.open_template(name)?;
        Ok(Packing {
            file,
            size: template.size,
        })
    }

    fn unpack(
        &self,
        name: &Name,
        what: &str,
        input: impl Read,
        largest: Bytes,
        replace: bool,
    ) -> Result<Template, StorageError> {
        let mut incoming = self.begin_import(name, replace)?;
        let Incoming { file, room, .. } = &mut incoming;
        let mut left = Bytes::ZERO;
        let ask = |more: Bytes| {
            if left < more {
                room.push(self.admit(LOT)?);
                left += LOT;
            }
            left = left - more;
            Ok::<_, StorageError>(())
        };
        pack::unpack(input, file, largest, ask).map_err(|why| match why {
            Unpacked::Input(error) => not_a_template(what, error),
            Unpacked::Output(error) => StorageError::io("unpack", what, error),
            Unpacked::Room(error) => error,
        })?;
        require_bare_ext4(what, &incoming.partial, &incoming.file)?;
        self.finish_import(incoming, what)
    }

    /// Takes the name of a template to be imported.
    fn begin_import(&self, name: &Name, replace: bool) -> Result<Incoming, StorageError> {
        self.require_mounted()?;
        if !replace && self.template_path(name).exists() {
            return Err(StorageError::TemplateExists(name.to_string()));
        }
        let partial = self.templates_dir().join(format!(".{name}{PARTIAL}"));
        let file = self.claim(&partial).map_err(|error| match error {
            StorageError::Busy(_) => StorageError::TemplateBeingMade(name.to_string()),
            other => other,
        })?;
        crash_point("import: file made");
        Ok(Incoming {
            name: name.clone(),
            replace,
            partial,
            file,
            finished: false,
            room: Vec::new(),
        })
    }

    /// Checks what was copied, and gives it its name.
    fn finish_import(&self, mut incoming: Incoming, what: &str) -> Result<Template, StorageError> {
        let (partial, name) = (incoming.partial.as_path(), &incoming.name);
        crash_point("import: copied");
        ext4::repair(partial).map_err(|error| match error {
            StorageError::FileSystem(_) => not_a_template(what, error),
            other => other,
        })?;
        crash_point("import: checked");
        incoming
            .file
            .sync_all()
            .map_err(|error| StorageError::io("flush", partial.display(), error))?;
        let target = self.template_path(name);
        let renamed = if incoming.replace {
            fs::rename(partial, &target)
        } else {
            files::rename_new(partial, &target)
        };
        renamed.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => StorageError::TemplateExists(name.to_string()),
            _ => StorageError::io("create", target.display(), error),
        })?;
        incoming.finished = true;
        crash_point("import: template in place");
        files::sync_dir(&self.templates_dir())?;
        crash_point("import: template durable");
        // By the file, not by the name: it may have been deleted since.
        let template = Template::of_file(&incoming.name, &incoming.file)?;
        self.prune_grown(&incoming.name, Some(template.inode))?;
        Ok(template)
    }
}

fn not_a_template(what: &str, reason: impl ToString) -> StorageError {
    StorageError::NotATemplate {
        what: what.to_owned(),
        reason: reason.to_string(),
    }
}

/// An image shorter than that does not.
fn starts_with(file: &File, magic: &[u8]) -> bool {
    use std::os::unix::fs::FileExt;
    let mut head = vec![0; magic.len()];
    file.read_exact_at(&mut head, 0).is_ok() && head == magic
}

fn require_bare_ext4(what: &str, path: &Path, file: &File) -> Result<(), StorageError> {
    const OTHERS: [(&[u8], &str); 5] = [
        (b"QFI\xfb", "a qcow2 image: convert it with qemu-img convert -O raw"),
        (b"KDMV", "a VMDK image: convert it with qemu-img convert -O raw"),
        (
            &[0x1f, 0x8b],
            "compressed with gzip: unpack it first, or pack it with zstd",
        ),
        (
            &[0xfd, b'7', b'z', b'X'],
            "compressed with xz: unpack it first, or pack it with zstd",
        ),
        (&pack::MAGIC, "packed twice: unpack it once"),
    ];
    if let Some((_, kind)) = OTHERS.iter().find(|(magic, _)| starts_with(file, magic)) {
        return Err(not_a_template(what, format!("it is {kind}")));
    }
    let reason = match probe(path)?.map(|found| found.kind).as_deref() {
        Some("ext4") => return Ok(()),
        Some(table) if table.contains("partition table") => format!(
            "it is a whole disk with {table}: extract its root partition, which must be ext4, into a file of its own"
        ),
        Some(kind) => format!("it holds {kind}: a template is a bare ext4 file system"),
        None => "it holds no file system: a template is a bare ext4 file system".to_owned(),
    };
    Err(not_a_template(what, reason))
}
