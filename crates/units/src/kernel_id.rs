//! The id of a guest kernel.

use crate::format::{InvalidFormat, text_newtype};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The id of a guest kernel: 16 lower-case hex digits, the first 64 bits of the digest of its
/// files. The kernel's folder in the pool has this name.
///
/// ```
/// use scalebox_units::KernelId;
/// assert!("0123456789abcdef".parse::<KernelId>().is_ok());
/// assert!("../0123456789abc".parse::<KernelId>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KernelId(String);

text_newtype!(KernelId);

impl KernelId {
    /// Returns the id of a kernel whose files have this digest.
    pub fn of_digest(digest: &[u8; 32]) -> KernelId {
        KernelId(digest[..8].iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl FromStr for KernelId {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        if text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(KernelId(text.to_owned()))
        } else {
            Err(InvalidFormat::new("must be 16 lower-case hex digits"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_eight_bytes_of_a_digest_are_the_id() {
        let mut digest = [0; 32];
        digest[0] = 0xab;
        digest[7] = 1;
        let id = KernelId::of_digest(&digest);
        assert_eq!(id.as_str(), "ab00000000000001");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn ids_that_could_be_other_paths_are_rejected() {
        for text in [
            "",
            "0123456789ABCDEF",
            "0123456789abcde",
            "0123456789abcdef0",
            "0123456789abcde/",
            ".123456789abcdef",
        ] {
            assert!(text.parse::<KernelId>().is_err(), "{text:?}");
        }
    }
}
