//! The id of an exec: one command that runs in a VM.

use crate::format::{InvalidFormat, text_newtype};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An exec's id: `exec-` and twelve lower-case hex digits, or `main` for the main process of a VM.
/// It is safe in paths and arguments.
///
/// ```
/// use scalebox_units::ExecId;
/// assert!("exec-0123456789ab".parse::<ExecId>().is_ok());
/// assert_eq!("main".parse::<ExecId>(), Ok(ExecId::main()));
/// assert!("vm-0123456789ab".parse::<ExecId>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ExecId(String);

const PREFIX: &str = "exec-";
const MAIN: &str = "main";

text_newtype!(ExecId);

impl ExecId {
    /// Returns the id of the main process.
    pub fn main() -> Self {
        ExecId(MAIN.to_owned())
    }

    /// Creates an id from a number, of which it uses the lower 48 bits.
    pub fn from_number(number: u64) -> Self {
        ExecId(format!("{PREFIX}{:012x}", number & ((1 << 48) - 1)))
    }
}

impl FromStr for ExecId {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        match text.strip_prefix(PREFIX) {
            None if text == MAIN => Ok(ExecId::main()),
            Some(digits) if digits.len() == 12 && digits.bytes().all(is_digit) => Ok(ExecId(text.to_owned())),
            _ => Err(InvalidFormat::new(
                "must be main, or exec- and 12 lower-case hex digits",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_other_forms_are_rejected() {
        for text in [
            "",
            "exec-",
            "exec-0123456789a",
            "exec-0123456789abc",
            "exec-0123456789AB",
            "exec-0123456789ab\n",
            "vm-0123456789ab",
            "exec-01234567/9ab",
        ] {
            assert!(text.parse::<ExecId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn any_number_becomes_a_valid_id() {
        for (number, id) in [
            (0, "exec-000000000000"),
            (0xab, "exec-0000000000ab"),
            (u64::MAX, "exec-ffffffffffff"),
        ] {
            assert_eq!(ExecId::from_number(number), id.parse().unwrap());
        }
    }
}
