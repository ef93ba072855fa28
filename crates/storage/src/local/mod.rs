//! The pool on this host: its file system, the devices under it, and the kernel's reports about
//! both.

pub(crate) mod backing;
pub(crate) mod btrfs;
pub(crate) mod extents;
pub(crate) mod fiemap;
pub(crate) mod files;
pub(crate) mod fstab;
pub(crate) mod group_sync;
pub(crate) mod init;
pub(crate) mod init_event;
pub(crate) mod pool_fs;
pub(crate) mod quota;
pub(crate) mod resize;
pub(crate) mod signature;
#[cfg(feature = "simulated")]
pub(crate) mod simulated;
pub(crate) mod sizing;
pub(crate) mod space;
pub(crate) mod tree_search;
