//! The pool's file system, for operations that differ between btrfs and XFS.

use crate::local::backing::FsKind;
use crate::local::btrfs::{self, PendingWrites};
use crate::local::files;
use crate::local::quota::Quota;
#[cfg(feature = "simulated")]
use crate::local::simulated::SimulatedSpace;
use std::fs::File;
use std::io;

/// The pool's file system, for operations that differ between btrfs and XFS.
#[derive(Debug)]
pub(crate) enum PoolFs {
    /// btrfs, with the counters of uncommitted writes, and the quotas that apply to the pool's
    /// folder.
    Btrfs(PendingWrites, Quota),
    Xfs,
    #[cfg(feature = "simulated")]
    Simulated(SimulatedSpace),
}

impl PoolFs {
    pub(crate) fn open(kind: FsKind, dir: &File) -> io::Result<PoolFs> {
        match kind {
            FsKind::Btrfs => {
                let quota = Quota::of(dir)?.ok_or_else(|| io::Error::other("not a btrfs file system anymore"))?;
                Ok(PoolFs::Btrfs(PendingWrites::open(dir)?, quota))
            }
            FsKind::Xfs => Ok(PoolFs::Xfs),
        }
    }

    /// Returns the kernel's name of the file system.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            PoolFs::Btrfs(..) => FsKind::Btrfs.name(),
            PoolFs::Xfs => FsKind::Xfs.name(),
            #[cfg(feature = "simulated")]
            PoolFs::Simulated(_) => "simulated",
        }
    }

    /// Clones the contents of `source` into the empty file `target`. The two files share their
    /// blocks.
    ///
    /// # Errors
    /// Those of [`files::reflink`].
    pub(crate) fn clone_file(&self, source: &File, target: &File) -> io::Result<()> {
        match self {
            PoolFs::Btrfs(..) | PoolFs::Xfs => files::reflink(source, target),
            #[cfg(feature = "simulated")]
            PoolFs::Simulated(_) => files::copy_sparse(source, target),
        }
    }

    /// Returns whether flushing a new file also makes its name durable.
    pub(crate) fn fsync_keeps_name(&self) -> bool {
        matches!(self, PoolFs::Btrfs(..))
    }

    /// Makes freed space writable. btrfs does so when it commits its transaction, XFS immediately.
    pub(crate) fn commit(&self, dir: &File) -> rustix::io::Result<()> {
        match self {
            PoolFs::Btrfs(..) => btrfs::commit(dir),
            PoolFs::Xfs => Ok(()),
            #[cfg(feature = "simulated")]
            PoolFs::Simulated(_) => Ok(()),
        }
    }

    /// Frees the blocks of an unlinked file. When the file is only closed, XFS frees them later, in
    /// the background.
    pub(crate) fn free(&self, file: File) -> io::Result<()> {
        match self {
            PoolFs::Btrfs(..) => Ok(()),
            PoolFs::Xfs => file.set_len(0),
            #[cfg(feature = "simulated")]
            PoolFs::Simulated(_) => Ok(()),
        }
    }
}
