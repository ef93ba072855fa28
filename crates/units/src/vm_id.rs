//! The id of a VM, which is also the id of its machine and its disk.

use crate::format::{InvalidFormat, text_newtype};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A VM's id: `vm-` and twelve lower-case hex digits.
///
/// It is safe in paths, arguments and the names of processes and network interfaces. The VM's
/// machine and disk have the same id.
///
/// ```
/// use scalebox_units::VmId;
/// let id: VmId = "vm-0123456789ab".parse().unwrap();
/// assert_eq!(id.digits(), "0123456789ab");
/// assert!("vm-0123456789AB".parse::<VmId>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(String);

const PREFIX: &str = "vm-";

text_newtype!(VmId);

impl VmId {
    /// Returns the digits, without `vm-`.
    pub fn digits(&self) -> &str {
        self.0.strip_prefix(PREFIX).unwrap_or_default()
    }

    /// Returns whether `text` has the form of the digits of an id.
    pub fn are_digits(text: &str) -> bool {
        text.len() == 12 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }
}

impl FromStr for VmId {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        if text.strip_prefix(PREFIX).is_some_and(VmId::are_digits) {
            Ok(VmId(text.to_owned()))
        } else {
            Err(InvalidFormat::new("must be vm- and 12 lower-case hex digits"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_be_something_else_are_rejected() {
        assert_eq!(
            "vm-0123456789ab".parse::<VmId>().unwrap().to_string(),
            "vm-0123456789ab"
        );
        for text in [
            "",
            "vm-",
            "vm-0123456789a",
            "vm-0123456789abc",
            "vm-0123456789AB",
            "vm-0123456789g0",
            "vm-01234567 9ab",
            "vm-vm-0123456789ab",
            "0123456789ab",
            "VM-0123456789ab",
            "vm-0123456789ab\n",
            "../../etc/pass",
            "vm-0123456/89ab",
        ] {
            assert!(text.parse::<VmId>().is_err(), "{text:?}");
        }
    }
}
