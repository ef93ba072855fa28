//! The size of a new pool: a pure function of the host disk's free space.

use scalebox_units::{Bytes, Gib, ParseSizeError};
use std::fmt;
use std::str::FromStr;

/// Share of the available space that a pool takes by default, in percent.
pub const DEFAULT_SHARE_PERCENT: u64 = 80;
/// Minimum size of a pool sized by default.
pub const MIN_DEFAULT_SIZE: Gib = Gib::new(20);
/// Maximum size of a pool sized by default.
pub const MAX_DEFAULT_SIZE: Gib = Gib::new(4096);
/// Minimum free space on the host for any pool: the smallest whose [`DEFAULT_SHARE_PERCENT`] is
/// [`MIN_DEFAULT_SIZE`].
pub const MIN_HOST_FREE: Gib = Gib::new(MIN_DEFAULT_SIZE.as_u64() * 100 / DEFAULT_SHARE_PERCENT);

/// A pool size requested by the operator (`STORAGE_SIZE`); keeps the original text for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestedSize {
    text: String,
    bytes: Bytes,
}

/// The reason why a requested pool size is rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestedSizeError {
    /// The text is not a size.
    #[error(transparent)]
    Parse(#[from] ParseSizeError),
    /// Below one GiB, btrfs leaves no room for even one disk.
    #[error("{0} is too small for a pool: the minimum is 1G; 20G or more is recommended")]
    TooSmall(String),
}

impl FromStr for RequestedSize {
    type Err = RequestedSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes: Bytes = text.parse()?;
        if bytes < Gib::new(1).bytes() {
            return Err(RequestedSizeError::TooSmall(text.to_owned()));
        }
        Ok(RequestedSize {
            text: text.to_owned(),
            bytes,
        })
    }
}

/// Displays the size as the operator wrote it.
impl fmt::Display for RequestedSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl RequestedSize {
    /// Returns the size in bytes, at least one GiB.
    pub fn bytes(&self) -> Bytes {
        self.bytes
    }
}

/// The size of the pool to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSize {
    /// The size of the image.
    pub bytes: Bytes,
    text: String,
}

/// Displays the size as the operator wrote it, or in whole GiB: `400G`.
impl fmt::Display for PoolSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The host has too little free space for any pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Insufficient disk space. Need at least {MIN_HOST_FREE}GB free, found {found}GB")]
pub struct TooLittleSpace {
    /// The free space found, in whole GiB.
    pub found: Gib,
}

/// Returns the size of a new pool on a file system with `available` bytes free. By default it is
/// `floor(available GiB × 0.8)`, at least [`MIN_DEFAULT_SIZE`] and at most [`MAX_DEFAULT_SIZE`];
/// otherwise it is exactly `requested`.
///
/// # Errors
/// [`TooLittleSpace`] when the host has less than [`MIN_HOST_FREE`] free, also with `requested`.
pub fn pool_size(available: Bytes, requested: Option<&RequestedSize>) -> Result<PoolSize, TooLittleSpace> {
    let found = available.floor_gib();
    if found < MIN_HOST_FREE {
        return Err(TooLittleSpace { found });
    }
    if let Some(requested) = requested {
        return Ok(PoolSize {
            bytes: requested.bytes,
            text: requested.text.clone(),
        });
    }
    let share = Gib::new(found.as_u64() * DEFAULT_SHARE_PERCENT / 100);
    let size = share.clamp(MIN_DEFAULT_SIZE, MAX_DEFAULT_SIZE);
    Ok(PoolSize {
        bytes: size.bytes(),
        text: format!("{size}G"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_for(available_gib: u64) -> Result<u64, String> {
        pool_size(Gib::new(available_gib).bytes(), None)
            .map(|size| size.bytes.floor_gib().as_u64())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_default_pool_takes_eighty_percent_within_limits() {
        for (available, expected) in [
            (25, 20),
            (26, 20),
            (27, 21),
            (31, 24),
            (100, 80),
            (500, 400),
            (5000, 4000),
            (5120, 4096),
            (5121, 4096),
            (10000, 4096),
        ] {
            assert_eq!(size_for(available), Ok(expected), "{available} GiB available");
        }
    }

    #[test]
    fn too_little_space_is_rejected_with_the_message_of_the_seed() {
        for available in [0, 1, 20, 24] {
            let words = format!("Insufficient disk space. Need at least 25GB free, found {available}GB");
            assert_eq!(size_for(available), Err(words));
        }
        let a_byte_short = Bytes::new((25 << 30) - 1);
        assert_eq!(
            pool_size(a_byte_short, None),
            Err(TooLittleSpace { found: Gib::new(24) })
        );
    }

    #[test]
    fn a_requested_size_is_used_exactly_but_the_host_minimum_applies() {
        let requested: RequestedSize = "100G".parse().unwrap();
        let size = pool_size(Gib::new(30).bytes(), Some(&requested)).unwrap();
        assert_eq!((size.bytes, size.to_string().as_str()), (Gib::new(100).bytes(), "100G"));
        assert!(pool_size(Gib::new(24).bytes(), Some(&requested)).is_err());
    }

    #[test]
    fn requested_sizes_too_small_for_a_pool_are_rejected() {
        for text in ["512M", "1K", "0G", "ten", ""] {
            assert!(text.parse::<RequestedSize>().is_err(), "{text:?}");
        }
    }
}
