//! Errors of pools, templates and disks.

use crate::local::fstab::FstabError;
use crate::local::sizing::{MIN_DEFAULT_SIZE, TooLittleSpace};
use crate::pool_size_error::PoolSizeError;
use scalebox_programs::ProgramError;
use scalebox_units::{Bytes, Gib};
use std::fmt::Display;
use std::io;
use std::path::PathBuf;

/// An error of this crate. Messages name the object and the cause; remedies are the caller's.
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
    #[error("{source}")]
    TooLittleSpace {
        /// The free space, in the seed's message.
        source: TooLittleSpace,
        /// The folder in which the image would be.
        folder: PathBuf,
    },
    /// The template does not exist.
    #[error("template {0:?} does not exist")]
    NoTemplate(String),
    /// The name of a new template is in use.
    #[error("template {0} exists already")]
    TemplateExists(String),
    /// Another operation is making a template of that name.
    #[error("template {0} is being created by another operation")]
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
    #[error("cannot grow a disk from template {template}: its file system {reason}")]
    DamagedTemplate {
        /// The template.
        template: String,
        /// The damage.
        reason: String,
    },
    /// The record of a template is unreadable.
    #[error("the record of template {template}, {}, is damaged: {reason}", path.display())]
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
        /// The cause.
        reason: String,
    },
    /// No pool is mounted.
    #[error("no pool is mounted at {}", .0.display())]
    NotMounted(PathBuf),
    /// The pool is missing, and a new one must not take its place.
    #[error("the pool is missing, and {disks} VM disks should be in it")]
    PoolMissing {
        /// The expected location of the pool.
        image: PathBuf,
        /// The number of expected disks.
        disks: u64,
    },
    /// The kernel does not show the pool's counters in sysfs.
    #[error("/sys/fs/btrfs has no entry for the btrfs at {}", .0.display())]
    NoSysfs(PathBuf),
    /// The file system of the pool's folder cannot clone files.
    #[error(
        "{} is on a {fs_type} file system, which cannot clone files: a pool needs btrfs, or XFS made with \
         reflink=1", path.display()
    )]
    NotAPool {
        /// The folder.
        path: PathBuf,
        /// The type of the folder's file system.
        fs_type: String,
    },
    /// Another device is mounted at the pool's folder.
    #[error("{} is mounted from {}, not from {}", path.display(), found.display(), device.display())]
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
        /// The cause.
        reason: DeviceRefusal,
    },
    /// The mount point has other contents.
    #[error("{} is not empty, and mounting the pool would hide its contents", .0.display())]
    NotEmpty(PathBuf),
    /// The pool's folder has other contents.
    #[error("{} contains files and is not a pool", .0.display())]
    OtherFolder(PathBuf),
    /// The pool image has other contents.
    #[error("{} contains {found}, not a pool; it was not changed", path.display())]
    ForeignImage {
        /// The image.
        path: PathBuf,
        /// The contents of the image.
        found: String,
    },
    /// The path of the pool image is a symbolic link. The rename of a new image would replace it,
    /// and the line in fstab must stay valid as long as the image exists.
    #[error("{} is a symbolic link to {target}, not a pool; it was not changed", path.display())]
    LinkedImage {
        /// The link.
        path: PathBuf,
        /// The target of the link, or the reason why it is unknown.
        target: String,
    },
    /// The pool image is already mounted elsewhere.
    #[error("{} is already mounted at {}", image.display(), at.display())]
    MountedElsewhere {
        /// The image.
        image: PathBuf,
        /// The mount point.
        at: PathBuf,
    },
    /// The pool cannot have the requested size.
    #[error(transparent)]
    PoolSize(#[from] PoolSizeError),
    /// The pool is part of a file system that Scalebox does not resize.
    #[error("the pool at {} is on an existing file system, which Scalebox does not resize", .0.display())]
    ExistingFileSystem(PathBuf),
    /// Another program is using the pool or the file.
    #[error("{} is in use by another scaleboxd", .0.display())]
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

/// The reason why a device cannot become a pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceRefusal {
    /// The path is a file or a folder.
    #[error("it is not a block device")]
    NotABlockDevice,
    /// The device has the signatures of several owners.
    #[error("it contains {0}, so the owner of its data is unclear")]
    Ambiguous(String),
    /// The device has other contents.
    #[error("it contains {0}")]
    ForeignContents(String),
    /// The device is smaller than any pool.
    #[error("it has {0}, and a pool needs at least {MIN_DEFAULT_SIZE} GiB")]
    TooSmall(Bytes),
    /// The device is smaller than the requested size.
    #[error("it has {found}, less than the requested {requested}")]
    SmallerThanRequested {
        /// The size of the device.
        found: Bytes,
        /// The requested size, as the operator wrote it.
        requested: String,
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
