//! The reason why the pool cannot have a requested size.

use scalebox_units::{Bytes, Gib};
use std::path::PathBuf;

/// The reason why the pool cannot have a requested size. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolSizeError {
    /// A growth to a size that the pool on an image already has.
    #[error("{size} GiB is not larger than the pool, which has {current}")]
    NotLarger {
        /// The requested size, or the default size of today.
        size: Gib,
        /// The size of the pool.
        current: Bytes,
    },
    /// A growth to a size that the pool on a device already has.
    #[error(
        "{size} is not larger than the pool, which has {current} of the {device_size} of {}",
        device.display()
    )]
    NotLargerOnDevice {
        /// The requested size, or the size of the device.
        size: Bytes,
        /// The size of the pool.
        current: Bytes,
        /// The size of the device.
        device_size: Bytes,
        /// The device.
        device: PathBuf,
    },
    /// A growth beyond the capacity of the host disk.
    #[error(
        "{size} GiB is too large: the host disk can hold a pool of at most {max} GiB and keep {kept_free} GiB free"
    )]
    OverHostDisk {
        /// The requested size.
        size: Gib,
        /// The largest size that the host disk can hold.
        max: Gib,
        /// Space that must stay free on the host disk.
        kept_free: Gib,
    },
    /// A growth beyond the end of the device.
    #[error("{size} does not fit on {}, which has {device_size}", device.display())]
    OverDevice {
        /// The requested size.
        size: Bytes,
        /// The size of the device.
        device_size: Bytes,
        /// The device.
        device: PathBuf,
    },
    /// A shrink to the pool's size or more.
    #[error("{size} GiB is not smaller than the pool, which has {current}")]
    NotSmaller {
        /// The requested size.
        size: Gib,
        /// The size of the pool.
        current: Bytes,
    },
    /// A shrink to a size that can commit less than is committed.
    #[error("{promised} are committed to VMs, but a pool of {size} can commit at most {limit}")]
    Overcommitted {
        /// The sum of committed and reserved space.
        promised: Bytes,
        /// The requested size.
        size: Bytes,
        /// Space that a pool of this size can commit.
        limit: Bytes,
    },
    /// A shrink to a size that cannot hold the data.
    #[error(
        "a pool of {size} cannot hold the used data and the committed disks and keep {kept_free} GiB free: at least \
         {needed} GiB are needed"
    )]
    UnderData {
        /// The requested size.
        size: Bytes,
        /// Space that must stay free in the pool.
        kept_free: Gib,
        /// The smallest possible size.
        needed: Gib,
    },
}
