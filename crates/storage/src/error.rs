//! Errors of pools, templates and disks.

use crate::local::fstab::FstabError;
use crate::local::sizing::TooLittleSpace;
use scalebox_programs::ProgramError;
use scalebox_units::Gib;
use std::fmt::Display;
use std::io;
use std::path::PathBuf;

/// An error of this crate. Messages name the object, the cause and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// Admission refused the request, and nothing was created. `need` is the requested size plus
    /// the buffer.
    #[error("Insufficient storage: {available}GB available, need {need}GB")]
    Insufficient {
        /// Space that could still be admitted, rounded down.
        available: Gib,
        /// Space that was requested, rounded up.
        need: Gib,
    },
    /// The host disk is too small for a pool.
    #[error("{source}. POOL_IMAGE would be in {}: set it to a path on a larger disk, or free space there", folder.display())]
    TooLittleSpace {
        /// The free space, in the seed's message.
        source: TooLittleSpace,
        /// The folder of the image.
        folder: PathBuf,
    },
    /// The template does not exist.
    #[error("template {0:?} does not exist")]
    NoTemplate(String),
    /// The name of a new template is in use.
    #[error(
        "template {0} exists already: delete it first, or choose another name; an import can also replace it (--replace)"
    )]
    TemplateExists(String),
    /// Another operation is making a template of that name.
    #[error("template {0} is being created by another operation: wait for it, or choose another name")]
    TemplateBeingMade(String),
    /// The disk cannot become a template.
    #[error("the disk cannot become a template: {0}")]
    UnfitDisk(String),
    /// The file system in an image is unusable. The reason continues the sentence "its file system
    /// …".
    #[error("its file system {0}")]
    FileSystem(String),
    /// An outside program could not read or write an image, for a reason on the host. The image may
    /// be sound.
    #[error("the host cannot {doing}: {reason}")]
    Host {
        /// The operation, such as "check a file system".
        doing: &'static str,
        /// The cause.
        reason: String,
    },
    /// The file system of a template or disk cannot grow to a size, on any host.
    #[error("disk_size_gib cannot be {size}: the file system of {what} cannot grow to {size} GiB ({reason})")]
    CannotGrow {
        /// The template or the disk.
        what: String,
        /// The requested size, rounded up.
        size: Gib,
        /// The cause.
        reason: String,
    },
    /// The template's file system is damaged and cannot be grown.
    #[error("cannot grow a disk from template {template}: its file system {reason}. Import the template again")]
    DamagedTemplate {
        /// The template.
        template: String,
        /// The damage.
        reason: String,
    },
    /// The record of a template is unreadable.
    #[error("the record of template {template}, {}, is damaged: {reason}. Delete the template and import it again", path.display())]
    DamagedRecord {
        /// The template.
        template: String,
        /// The record.
        path: PathBuf,
        /// The damage.
        reason: String,
    },
    /// The requested disk is smaller than its template.
    #[error("disk_size_gib must be at least {template_size}: the template {template} has {template_size} GiB")]
    SmallerThanTemplate {
        /// The template.
        template: String,
        /// The size of the template, rounded up.
        template_size: Gib,
    },
    /// The imported file is not a template.
    #[error("{what} cannot become a template: {reason}")]
    NotATemplate {
        /// The file, or another description of the source.
        what: String,
        /// The cause and the remedy.
        reason: String,
    },
    /// No pool is mounted.
    #[error("no pool is mounted at {}: run `scaleboxd pool init`", .0.display())]
    NotMounted(PathBuf),
    /// The pool is missing, and a new one must not take its place.
    #[error(
        "the pool is missing, and {disks} VM disks should be in it: restore the storage under {} and mount it. A new pool would be empty; \
         to give up these VMs for good, move STATE_DIR away first", image.display()
    )]
    PoolMissing {
        /// The expected location of the pool.
        image: PathBuf,
        /// The number of expected disks.
        disks: u64,
    },
    /// The kernel does not show the pool's counters in sysfs.
    #[error(
        "/sys/fs/btrfs has no entry for the btrfs at {}: mount sysfs (mount -t sysfs sysfs /sys), or bind the host's \
         /sys/fs/btrfs read-only into the container", .0.display()
    )]
    NoSysfs(PathBuf),
    /// The file system of the pool's folder cannot clone files.
    #[error(
        "{} is on a {fs_type} file system, which cannot clone files: a pool needs btrfs, or XFS made with reflink=1; set DATA_DIR to a folder on \
         one, or POOL_IMAGE to the path of a new image", path.display()
    )]
    NotAPool {
        /// The folder.
        path: PathBuf,
        /// The type of the folder's file system.
        fs_type: String,
    },
    /// Another device is mounted at the pool's folder.
    #[error("{} is mounted from {}, and POOL_DEVICE is {}: unmount it, or set DATA_DIR to another folder", path.display(), found.display(), device.display())]
    OtherDevice {
        /// The mount point.
        path: PathBuf,
        /// The expected device.
        device: PathBuf,
        /// The mounted device.
        found: PathBuf,
    },
    /// The device cannot become a pool.
    #[error("{} cannot become a pool: {reason}; it was not changed", device.display())]
    UnfitDevice {
        /// The device.
        device: PathBuf,
        /// The cause and the remedy.
        reason: String,
    },
    /// The mount point has other contents.
    #[error("{} is not empty, and mounting the pool would hide its contents: move them away, or set DATA_DIR to another folder", .0.display())]
    NotEmpty(PathBuf),
    /// The pool's folder has other contents.
    #[error("{} contains files and is not a pool: set DATA_DIR to an empty or new folder", .0.display())]
    OtherFolder(PathBuf),
    /// The pool image has other contents.
    #[error("{} contains {found}, not a pool: move it away, or set POOL_IMAGE to another path; it was not changed", path.display())]
    ForeignImage {
        /// The image.
        path: PathBuf,
        /// The contents of the image.
        found: String,
    },
    /// The pool image is already mounted elsewhere.
    #[error("{} is already mounted at {}: set DATA_DIR to that folder, or unmount it there first", image.display(), at.display())]
    MountedElsewhere {
        /// The image.
        image: PathBuf,
        /// Where it is mounted.
        at: PathBuf,
    },
    /// The pool cannot have the requested size.
    #[error("{0}")]
    PoolSize(String),
    /// The pool is part of a file system that Scalebox does not resize.
    #[error(
        "the pool at {} is on an existing file system: resize that file system with its own tools", .0.display()
    )]
    ExistingFileSystem(PathBuf),
    /// Another program is using the pool or the file.
    #[error("{} is in use by another scaleboxd: wait for it to finish", .0.display())]
    Busy(PathBuf),
    /// `/etc/fstab` could not be written.
    #[error(transparent)]
    Fstab(#[from] FstabError),
    /// An outside program failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file could not be read or written.
    #[error("cannot {doing} {what}: {source}")]
    Io {
        /// The operation.
        doing: &'static str,
        /// The object of the operation.
        what: String,
        /// The cause.
        source: io::Error,
    },
}

impl StorageError {
    pub(crate) fn io(doing: &'static str, what: impl Display, source: io::Error) -> Self {
        StorageError::Io {
            doing,
            what: what.to_string(),
            source,
        }
    }

    pub(crate) fn not_a_template(what: &str, reason: impl ToString) -> Self {
        StorageError::NotATemplate {
            what: what.to_owned(),
            reason: reason.to_string(),
        }
    }

    /// Returns the error of a step that a test makes fail.
    pub(crate) fn step(error: io::Error) -> Self {
        StorageError::io("finish", "a step", error)
    }
}
