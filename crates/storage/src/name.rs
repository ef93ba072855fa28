//! Names of templates and disks. They become file names, so their form is checked before a path is
//! built.

use crate::error::StorageError;
use std::fmt;
use std::str::FromStr;

/// Maximum length of a name, in bytes.
pub const MAX_LENGTH: usize = 63;

/// The name of a template or a disk. It has at most [`MAX_LENGTH`] letters, digits, dots, dashes
/// and underscores, and begins with a letter or digit. It can neither leave its folder nor be
/// hidden.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = StorageError;

    fn from_str(text: &str) -> Result<Name, StorageError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        let begins_well = text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric());
        if begins_well && text.len() <= MAX_LENGTH && text.bytes().all(allowed) {
            Ok(Name(text.to_owned()))
        } else {
            Err(StorageError::Name(text.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_folder() {
        for text in ["debian-base", "vm-0123456789ab", "node_20.1", "a"] {
            assert_eq!(text.parse::<Name>().unwrap().as_str(), text);
        }
        let too_long = "a".repeat(MAX_LENGTH + 1);
        for text in [
            "", ".", "..", "../x", "a/b", ".hidden", "-x", "a b", "a\0b", "ä", "a\n", &too_long,
        ] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
    }
}
