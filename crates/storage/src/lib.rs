//! An elastic pool of copy-on-write disks on btrfs or XFS.
//!
//! By default the pool is a btrfs file system inside a sparse image on a loop device. It can also
//! be a block device of its own, or a folder on an existing btrfs or XFS. Templates are read-only
//! ext4 images in the pool. A disk is a reflink clone of a template, grown to the requested size. A
//! disk is *admitted* before it is created: the pool and the host disk under it must have room for
//! it, with all concurrent requests counted.
//!
//! The crate does not deal with virtual machines, HTTP or networks. It is synchronous, prints
//! nothing and has no globals.
//!
//! # Layout
//!
//! The files in the root of the crate serve every kind of pool:
//!
//! | file | contents |
//! |---|---|
//! | `pool` | [`Pool`]: the handle on a mounted pool |
//! | `admission`, `space` | the decision that a disk fits, its ledger, and the numbers that it uses |
//! | `usage`, `measurement` | disk usage: the owner of each extent |
//! | `disk` | cloning, growing, deleting and sweeping disks |
//! | `delete` | deleting a disk and returning its blocks to the pool and the host disk |
//! | `template` | listing and deleting templates; resized base images |
//! | `record`, `publish` | the records of templates; publishing a template |
//! | `kernels` | the guests' kernels, by digest |
//! | `initramfs` | the initramfs that VMs boot: the kernel's and the daemon's |
//! | `upgrade` | upgrading pools of earlier releases |
//! | `import` | template import and export |
//! | `snapshot` | turning a disk into a template |
//! | `programs` | the outside programs that pools need |
//! | `simulated` (feature `simulated`) | pools for tests of other crates |
//!
//! `local` is the pool on this host: its file system, the devices under it, and the kernel's
//! reports about both.
//!
//! | file | contents |
//! |---|---|
//! | `sizing` | the size of a new pool, as a pure function |
//! | `init` | creating, mounting and registering the pool |
//! | `resize` | growing, shrinking and trimming the pool |
//! | `backing`, `pool_fs` | the image, device or existing file system under the pool; differences between btrfs and XFS |
//! | `fstab` | entries in `/etc/fstab` |
//! | `signature` | detecting the contents of a file or device |
//! | `space`, `btrfs`, `quota` | the writable space, as the kernel reports it |
//! | `extents`, `fiemap`, `tree_search` | the extents of files |
//! | `files`, `group_sync` | cloning, sparse copying, flushing; one flush shared by concurrent callers |
//!
//! `image` is work on one disk image:
//!
//! | file | contents |
//! |---|---|
//! | `images` | the operations that a pool needs |
//! | `e2fsprogs` | running programs of e2fsprogs, and judging their output |
//! | `ext4` | inspecting, checking, growing and zeroing the ext4 file system |
//! | `live_growth` | the check that a guest can grow its mounted file system |
//! | `defragment` | reducing the number of extents in a base image |
//! | `scrub` | removing files and lines from the file system |
//! | `pack`, `format` | compression with zstd; recognizing other formats |
//!
//! # Example
//!
//! ```no_run
//! use scalebox_storage::{Backing, Bounds, Pool};
//! use scalebox_units::Gib;
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
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
mod delete;
mod disk;
mod error;
mod image;
mod import;
mod initramfs;
mod kernels;
mod local;
mod measurement;
mod pool;
mod pool_size_error;
mod programs;
mod publish;
mod record;
#[cfg(feature = "simulated")]
mod simulated;
mod snapshot;
mod space;
mod template;
mod upgrade;
mod usage;

pub use admission::{Admission, Bounds, Commitments, Reservation};
pub use delete::UnlinkedDisk;
pub use disk::SweepResult;
pub use error::{DeviceRefusal, StorageError};
pub use image::scrub::{EditedFile, Scrub};
pub use import::{ConvertedImage, TemplateExport};
pub use initramfs::AppendedArchive;
pub use kernels::{Kernel, KernelFiles};
pub use local::backing::{ActualBacking, Backing};
pub use local::files::try_lock_exclusive;
pub use local::fstab::{FstabError, registered_source};
pub use local::group_sync::GroupSync;
pub use local::init::{InitOutcome, PoolPlan, ensure_direct_io, init, unmount};
pub use local::init_event::{InitEvent, InitWarning};
#[cfg(feature = "simulated")]
pub use local::simulated::SimulatedSpace;
pub use local::sizing::{
    DEFAULT_SHARE_PERCENT, MAX_DEFAULT_SIZE, MIN_DEFAULT_SIZE, MIN_HOST_FREE, PoolSize, RequestedSize,
    RequestedSizeError, TooLittleSpace, pool_size,
};
pub use pool::{Pool, jails_dir};
pub use pool_size_error::PoolSizeError;
pub use programs::{PROGRAMS, require_programs};
pub use record::{PulledImage, TemplateSource};
pub use snapshot::PendingSnapshot;
pub use space::Space;
pub use template::Template;
pub use usage::{PoolUsage, Usage};
