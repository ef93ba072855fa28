//! An elastic pool of copy-on-write disks on btrfs.
//!
//! The pool is a btrfs file system, by default inside a sparse image on a loop device; or a device
//! of its own; or a folder on a btrfs or XFS that is there already. Templates are golden ext4
//! images in it; disks are reflink clones of them, grown to the size that was asked for. Before a
//! disk is made it is *admitted*: the pool and the host disk under it must really be able to take
//! it, with every other request under way counted.
//!
//! The crate knows nothing of virtual machines, HTTP or networks. It is synchronous, prints nothing
//! and has no globals.
//!
//! # Layout
//!
//! | file | job |
//! |---|---|
//! | `size` | [`Bytes`] and [`Gib`]: sizes as types, and how they round |
//! | `sizing` | how large a new pool becomes: a pure function |
//! | `init` | making, mounting and registering the pool |
//! | `backing` | what the pool lies on, and what differs by the kind of its file system |
//! | `fstab`, `mounts` | the table of mounts, and what is mounted |
//! | `signature` | what a file or a device holds |
//! | `pool` | [`Pool`]: the handle on a mounted pool |
//! | `resize` | growing, shrinking and trimming the pool |
//! | `space`, `btrfs`, `quota` | what can really be written, from the kernel |
//! | `admission` | the decision that a disk fits, and the books behind it |
//! | `usage`, `extents`, `fiemap`, `tree_search` | whose each block is |
//! | `template` | listing and deleting templates; the grown clones kept of them |
//! | `import`, `pack`, `format` | templates from elsewhere and to elsewhere, packed with zstd |
//! | `snapshot` | a template made of a disk |
//! | `scrub` | taking out of an image what belongs to one machine only |
//! | `disk` | cloning, deleting, sweeping disks |
//! | `defragment` | fewer extents in an image of which many clones are made |
//! | `ext4` | a file system in an image: looked at, checked, grown, emptied of what it does not use |
//! | `live_growth` | whether a guest can grow its file system while it is mounted |
//! | `delete` | a disk's blocks, back to the pool and to the host disk |
//! | `files` | clone, sparse copy, flush |
//! | `group_sync` | one flush for all who wait for it |
//! | `command` | the one door to outside programs |
//!
//! # Example
//!
//! ```no_run
//! use scalebox_storage::{Backing, Bounds, Gib, Pool};
//! # fn main() -> Result<(), scalebox_storage::StorageError> {
//! let bounds = Bounds { buffer: Gib::new(2), overcommit_ratio: 4.0 };
//! let image = Backing::Image("/var/lib/scalebox.img".into());
//! let pool = Pool::open("/var/lib/scalebox".as_ref(), &image, bounds)?;
//! let template = pool.template(&"debian-base".parse()?)?;
//! let admitted = pool.admit(Gib::new(10).bytes())?;
//! pool.create_disk(&"vm-0123456789ab".parse()?, &template.name, &admitted)?;
//! admitted.commit();
//! # Ok(())
//! # }
//! ```

mod admission;
mod backing;
mod btrfs;
mod command;
mod defragment;
mod delete;
mod disk;
mod error;
mod ext4;
mod extents;
mod fiemap;
mod files;
mod format;
mod fstab;
mod group_sync;
mod import;
mod init;
mod live_growth;
mod mounts;
mod name;
mod pack;
mod pool;
mod quota;
mod resize;
mod scrub;
mod signature;
mod size;
mod sizing;
mod snapshot;
mod space;
mod template;
mod tree_search;
mod usage;

pub use admission::{Admission, Bounds, Promises, Reservation};
pub use backing::{Backing, Ground};
pub use command::{CommandError, Program, require_programs};
pub use delete::Unlinked;
pub use disk::Swept;
pub use error::StorageError;
pub use files::lock_for_one_program;
pub use fstab::{FstabError, registered_source};
pub use group_sync::GroupSync;
pub use import::Packing;
pub use init::{InitEvent, InitOutcome, PoolPlan, ensure_direct_io, init, unmount};
pub use name::Name;
pub use pool::{Pool, jails_dir};
pub use scrub::Identity;
pub use size::{Bytes, Gib, ParseSizeError};
pub use sizing::{
    HOST_FLOOR, LARGEST, PoolSize, RequestedSize, RequestedSizeError, SHARE_PERCENT, SMALLEST, TooLittleSpace,
    pool_size,
};
pub use snapshot::Snapshot;
pub use space::Space;
pub use template::Template;
pub use usage::{Accounts, Usage};

use std::path::PathBuf;

/// Where a disk is, without promising that it is a file: a hypervisor driver matches on it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskLocation {
    /// A raw image file on the host.
    File(PathBuf),
}
