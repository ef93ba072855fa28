//! How large a new pool becomes: a pure function of what the host disk has free.

use crate::size::{Bytes, Gib, ParseSizeError};
use std::fmt;
use std::str::FromStr;

/// Share of the available space that a pool takes by default, in percent.
pub const SHARE_PERCENT: u64 = 80;
/// A pool sized by the rule is never smaller; what the rule gives below this is refused.
pub const SMALLEST: Gib = Gib::new(20);
/// A pool sized by the rule is never larger.
pub const LARGEST: Gib = Gib::new(4096);
/// What the host must have free for any pool: the smallest whose [`SHARE_PERCENT`] reaches
/// [`SMALLEST`].
pub const HOST_FLOOR: Gib = Gib::new(SMALLEST.as_u64() * 100 / SHARE_PERCENT);

/// A size the operator asked for (`STORAGE_SIZE`), with the text as it was written, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestedSize {
    text: String,
    bytes: Bytes,
}

/// Why a requested pool size is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestedSizeError {
    /// The text is no size.
    #[error(transparent)]
    Parse(#[from] ParseSizeError),
    /// btrfs wants some room, and a pool below one GiB could not hold a single disk.
    #[error("{0} is too small for a pool: the smallest is 1G, and 20G or more is sensible")]
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

/// As the operator wrote it.
impl fmt::Display for RequestedSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl RequestedSize {
    /// The size in bytes, at least one GiB.
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

/// As the operator wrote it, or in whole GiB: `400G`.
impl fmt::Display for PoolSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The host has too little free for any pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Insufficient disk space. Need at least {HOST_FLOOR}GB free, found {found}GB")]
pub struct TooLittleSpace {
    /// What was found, in whole GiB.
    pub found: Gib,
}

/// The size of a new pool on a file system that has `available` bytes free: `floor(available GiB ×
/// 0.8)`, at least [`SMALLEST`], at most [`LARGEST`], or exactly what was requested. The floor of
/// the host holds in both cases.
///
/// # Errors
/// [`TooLittleSpace`] when the host has less than [`HOST_FLOOR`] free.
pub fn pool_size(available: Bytes, requested: Option<&RequestedSize>) -> Result<PoolSize, TooLittleSpace> {
    let found = available.floor_gib();
    if found < HOST_FLOOR {
        return Err(TooLittleSpace { found });
    }
    if let Some(requested) = requested {
        return Ok(PoolSize {
            bytes: requested.bytes,
            text: requested.text.clone(),
        });
    }
    let share = Gib::new(found.as_u64() * SHARE_PERCENT / 100);
    let size = share.clamp(SMALLEST, LARGEST);
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
    fn the_pool_takes_eighty_percent_within_bounds() {
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
    fn too_little_space_is_refused_in_the_words_of_the_seed() {
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
    fn a_requested_size_is_taken_as_it_is_but_the_floor_of_the_host_holds() {
        let requested: RequestedSize = "100G".parse().unwrap();
        let size = pool_size(Gib::new(30).bytes(), Some(&requested)).unwrap();
        assert_eq!((size.bytes, size.to_string().as_str()), (Gib::new(100).bytes(), "100G"));
        assert!(pool_size(Gib::new(24).bytes(), Some(&requested)).is_err());
    }

    #[test]
    fn a_requested_size_that_holds_nothing_is_refused() {
        for text in ["512M", "1K", "0G", "ten", ""] {
            assert!(text.parse::<RequestedSize>().is_err(), "{text:?}");
        }
    }
}
