//! The reports of `pool init` while it runs.

use crate::local::fstab::FstabError;
use crate::local::sizing::{PoolSize, RequestedSize};
use scalebox_programs::ProgramError;
use scalebox_units::{Bytes, Gib};
use std::path::PathBuf;

/// A message of `pool init` to its operator.
#[derive(Debug)]
pub enum InitEvent {
    /// A step that is being done, with the seed's message where it has one.
    Step(String),
    /// A problem that does not keep the pool from working.
    Warning(InitWarning),
}

/// A problem of a pool that works nevertheless.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitWarning {
    /// The requested size differs from that of the existing pool, which does not change.
    #[error("The requested size {requested} has no effect: the pool already exists with {found}")]
    OtherSize {
        /// The requested size.
        requested: RequestedSize,
        /// The size of the pool.
        found: Bytes,
    },
    /// A size was requested of a pool on an existing file system.
    #[error("The requested size {0} has no effect: the pool is on an existing file system")]
    SizeOfExisting(RequestedSize),
    /// The mount could not be registered in fstab.
    #[error("{error}. The pool is mounted now, but will not be after a reboot")]
    NotRegistered {
        /// The cause.
        error: FstabError,
        /// The missing line.
        line: String,
    },
    /// The loop device refuses direct I/O, or must be replaced for it while the pool is in use.
    #[error("The pool's loop device does not use direct I/O, which makes the pool slower: {0}")]
    NoDirectIo(ProgramError),
    /// The loop device of the mounted pool refuses direct I/O; `pool init` can replace it.
    #[error("The pool's loop device does not use direct I/O, which makes the pool slower: {0}")]
    NoDirectIoWhileMounted(ProgramError),
    /// The requested size is larger than the free space of the host disk.
    #[error(
        "The pool ({size}) is larger than the free space on its host disk ({available}GB): it is created sparse, and new \
         VMs will be refused once about {usable}GB are written to it, or earlier if other data fills the host disk."
    )]
    LargerThanHostDisk {
        /// The size of the pool.
        size: PoolSize,
        /// The free space of the host disk, rounded down.
        available: Gib,
        /// The same without the space that admission keeps free.
        usable: Gib,
    },
    /// The file system of the image can clone files itself.
    #[error("{} is on a file system that can clone files itself", .0.display())]
    UnnecessaryImage(PathBuf),
    /// A folder of the pool had files before its new files were made NOCOW.
    #[error(
        "{} had files before NOCOW was set on it: they stay copy-on-write and slower, and cannot be cloned to new disks \
         until they are copied", .0.display()
    )]
    CopyOnWriteFiles(PathBuf),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::sizing::pool_size;

    #[test]
    fn the_warning_states_when_creations_will_be_refused() {
        let size = pool_size(Gib::new(60).bytes(), Some(&"100G".parse().unwrap())).unwrap();
        let warning = InitWarning::LargerThanHostDisk {
            size,
            available: Gib::new(60),
            usable: Gib::new(58),
        };
        let warning = warning.to_string();
        assert!(
            warning.contains("(100G)") && warning.contains("(60GB)") && warning.contains("about 58GB"),
            "{warning}"
        );
    }
}
