//! The location of a disk.

use std::path::PathBuf;

/// The location of a disk. Hypervisor drivers match on the variant.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskLocation {
    /// A raw image file on the host.
    File(PathBuf),
}
