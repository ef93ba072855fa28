//! What can go wrong with a pool, its templates and its disks.

use crate::command::CommandError;
use crate::fstab::FstabError;
use crate::size::Gib;
use crate::sizing::TooLittleSpace;
use std::fmt::Display;
use std::io;
use std::path::PathBuf;

/// An error of the storage room. Messages name the thing, what is wrong with it, and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// Admission said no: nothing was made. `need` is the size asked for plus the buffer.
    #[error("Insufficient storage: {available}GB available, need {need}GB")]
    Insufficient {
        /// What could still be admitted, rounded down.
        available: Gib,
        /// What was asked for, rounded up.
        need: Gib,
    },
    /// The host disk is too small for a pool.
    #[error("{source}. POOL_IMAGE is to lie in {}: set it to a path on a larger disk, or make room there", folder.display())]
    TooLittleSpace {
        /// What was found, in the words of the seed.
        source: TooLittleSpace,
        /// The folder that the image is to lie in.
        folder: PathBuf,
    },
    /// No such template.
    #[error("there is no template {0:?}")]
    NoTemplate(String),
    /// A template of that name is there already.
    #[error(
        "a template {0} exists already: delete it first, or choose another name; an import can also replace it (--replace)"
    )]
    TemplateExists(String),
    /// A template of that name is being made at this moment.
    #[error("a template {0} is being made right now: wait for it, or choose another name")]
    TemplateBeingMade(String),
    /// A disk cannot become a template.
    #[error("the disk cannot become a template: {0}")]
    Unfit(String),
    /// The file system in an image cannot be worked with. Reads on from "its file system".
    #[error("its file system {0}")]
    FileSystem(String),
    /// A program could not read or write an image: a fault of the host. The image may be sound.
    #[error("the host cannot {doing}: {reason}")]
    Host {
        /// What was being done, such as "check a file system".
        doing: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// The file system of a template or disk cannot be grown to a size, whatever the host does.
    #[error("disk_size_gib cannot be {size}: the file system of {what} cannot grow to {size} GiB ({reason})")]
    CannotGrow {
        /// The template, or the disk.
        what: String,
        /// The size that was asked for, rounded up.
        size: Gib,
        /// What is in the way.
        reason: String,
    },
    /// A template cannot be made larger.
    #[error("no larger disk can be made from the template {template}: its file system {reason}. Import it again")]
    DamagedTemplate {
        /// The template.
        template: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A disk was asked for that its template does not fit on.
    #[error("disk_size_gib must be at least {template_size}: the template {template} is {template_size} GiB large")]
    SmallerThanTemplate {
        /// The template.
        template: String,
        /// Its size, rounded up.
        template_size: Gib,
    },
    /// What was given as a template is none.
    #[error("{what} cannot become a template: {reason}")]
    NotATemplate {
        /// The file, or what else it came from.
        what: String,
        /// What it is instead, and what to do.
        reason: String,
    },
    /// A name that would leave its folder or is no file name.
    #[error(
        "{0:?} is not a name: use letters, digits, dots, dashes and underscores, at most 63, beginning with a letter or digit"
    )]
    Name(String),
    /// The pool is not there.
    #[error("no pool is mounted at {}: run `scaleboxd pool init`", .0.display())]
    NotMounted(PathBuf),
    /// A new pool would take the place of one that is missing.
    #[error(
        "no pool is there, and {disks} disks of VMs should be in it: bring back what {} lies on, and mount it. A new pool would be empty; \
         to give these VMs up for good, move STATE_DIR away first", image.display()
    )]
    Expected {
        /// Where the pool should be.
        image: PathBuf,
        /// How many disks should be in it.
        disks: u64,
    },
    /// The kernel does not show the pool's counters.
    #[error(
        "the kernel shows nothing of the btrfs at {} below /sys/fs/btrfs: mount sysfs there (mount -t sysfs sysfs /sys), or give a container \
         the host's /sys/fs/btrfs, read-only", .0.display()
    )]
    NoSysfs(PathBuf),
    /// What the pool's folder lies on cannot hold disks.
    #[error(
        "{} lies on a {fs_type} file system, which cannot clone files: a pool is btrfs, or XFS made with reflink=1; set DATA_DIR to a folder on \
         one, or POOL_IMAGE to the path of an image to be made", path.display()
    )]
    NotAPool {
        /// The folder.
        path: PathBuf,
        /// The type of what it lies on.
        fs_type: String,
    },
    /// Something else is mounted at the pool's place.
    #[error("{} is mounted from {}, and POOL_DEVICE is {}: unmount it, or set DATA_DIR to another folder", path.display(), found.display(), device.display())]
    OtherDevice {
        /// The mount point.
        path: PathBuf,
        /// What should be mounted there.
        device: PathBuf,
        /// What is.
        found: PathBuf,
    },
    /// The device asked for cannot become a pool.
    #[error("{} cannot become a pool: {reason}; it was not touched", device.display())]
    UnfitDevice {
        /// The device.
        device: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The folder to mount at is in use.
    #[error("{} is not empty, and mounting the pool would hide what is in it: move it away or set DATA_DIR to another folder", .0.display())]
    NotEmpty(PathBuf),
    /// The folder that is to be a pool is something else.
    #[error("{} holds files and is no pool: set DATA_DIR to an empty folder, or one to be made", .0.display())]
    OtherFolder(PathBuf),
    /// The pool image holds something else.
    #[error("{} holds {found}, not a pool: move it away or set POOL_IMAGE to another path; it was not touched", path.display())]
    ForeignImage {
        /// The image.
        path: PathBuf,
        /// What it holds.
        found: String,
    },
    /// The pool image is in use at another place.
    #[error("{} is mounted at {} already: set DATA_DIR to that folder, or unmount it there first", image.display(), at.display())]
    MountedElsewhere {
        /// The image.
        image: PathBuf,
        /// Where it is mounted.
        at: PathBuf,
    },
    /// The pool cannot have that size.
    #[error("{0}")]
    PoolSize(String),
    /// The pool's size is not its own.
    #[error(
        "the pool at {} lies on a file system that was there before it: make that larger or smaller with its own tools", .0.display()
    )]
    Given(PathBuf),
    /// Another program is at work on the same pool.
    #[error("another scaleboxd is at work on {}: wait for it to finish", .0.display())]
    Busy(PathBuf),
    /// The table of mounts could not be written.
    #[error(transparent)]
    Fstab(#[from] FstabError),
    /// An outside program failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A file could not be read or written.
    #[error("cannot {doing} {what}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What it was done to.
        what: String,
        /// Why it failed.
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

    /// The error that a test has a step return.
    pub(crate) fn step(error: io::Error) -> Self {
        StorageError::io("finish", "a step", error)
    }
}
