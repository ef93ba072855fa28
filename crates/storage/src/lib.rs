//! Elastic storage: see the Layout section once the rooms stand.
pub mod size;
pub use size::{Bytes, Gib, ParseSizeError};

/// Where a disk is, without promising that it is a file: a hypervisor driver matches on it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskLocation {
    /// A raw image file on the host.
    File(std::path::PathBuf),
}
