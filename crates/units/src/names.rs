//! Names of templates and VMs. Both become parts of file names, and a VM's name is also its guest's
//! host name. The types here are checked on creation, so their users need no further checks.

use crate::format::{InvalidFormat, text_newtype};
use crate::vm_id::VmId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A template's name: 1 to 63 ASCII letters, digits, dashes, dots and underscores, beginning with a
/// letter or a digit. File names in the pool have the same form, so every template can be requested
/// by its name.
///
/// ```
/// use scalebox_units::TemplateName;
/// assert!("debian-12.1_minimal".parse::<TemplateName>().is_ok());
/// assert!("../x".parse::<TemplateName>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TemplateName(String);

/// A VM's name: a host name that does not look like a VM id. It has 1 to 63 lower-case letters,
/// digits and dashes, without a dash at either end (RFC 1123, section 2.1).
///
/// ```
/// use scalebox_units::VmName;
/// assert!("build-7".parse::<VmName>().is_ok());
/// assert!("vm-0123456789ab".parse::<VmName>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// Maximum length of a label of a host name (RFC 1035, section 2.3.4).
pub(crate) const MAX_LENGTH: usize = 63;

const TEMPLATE_FORM: &str =
    "must be 1 to 63 letters, digits, dashes, dots or underscores and begin with a letter or a digit";
const VM_FORM: &str = "must be 1 to 63 lower-case letters, digits or dashes and neither begin nor end with a dash";
const VM_NOT_ID: &str = "must not have the form of a VM's id (vm- and 12 hex digits)";

impl FromStr for TemplateName {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        let letters = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        let begins = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if letters && begins && text.len() <= MAX_LENGTH {
            Ok(TemplateName(text.to_owned()))
        } else {
            Err(InvalidFormat::new(TEMPLATE_FORM))
        }
    }
}

impl FromStr for VmName {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        let letters = text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        let ends = !text.starts_with('-') && !text.ends_with('-');
        if !(letters && ends && (1..=MAX_LENGTH).contains(&text.len())) {
            Err(InvalidFormat::new(VM_FORM))
        } else if text.parse::<VmId>().is_ok() {
            Err(InvalidFormat::new(VM_NOT_ID))
        } else {
            Ok(VmName(text.to_owned()))
        }
    }
}

text_newtype!(TemplateName);
text_newtype!(VmName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_names_cannot_leave_their_folder() {
        for text in ["debian-base", "a", "0", "Ubuntu_24.04", "a..b", &"a".repeat(63)] {
            assert_eq!(text.parse::<TemplateName>().expect(text).as_str(), text);
        }
        let bad = [
            "",
            ".",
            "..",
            "../x",
            "/etc",
            "a/b",
            "a\\b",
            "-a",
            "_a",
            ".a",
            "a b",
            "a\n",
            "a\0",
            "é",
            "a%2f",
            &"a".repeat(64),
        ];
        for text in bad {
            assert_eq!(
                text.parse::<TemplateName>(),
                Err(InvalidFormat::new(TEMPLATE_FORM)),
                "{text:?}"
            );
        }
    }

    #[test]
    fn vm_names_are_host_names() {
        for text in [
            "very-silly-penguin",
            "a",
            "7",
            "vm-1",
            "vm-0123456789a",
            "vm-0123456789xy",
            &"a".repeat(63),
        ] {
            assert_eq!(text.parse::<VmName>().expect(text).as_str(), text);
        }
        let bad = [
            "",
            "-a",
            "a-",
            "-",
            "A",
            "a.b",
            "a_b",
            "a b",
            "a\n",
            "../x",
            "é",
            &"a".repeat(64),
        ];
        for text in bad {
            assert_eq!(text.parse::<VmName>(), Err(InvalidFormat::new(VM_FORM)), "{text:?}");
        }
    }

    #[test]
    fn vm_names_never_look_like_ids() {
        assert_eq!("vm-0123456789ab".parse::<VmName>(), Err(InvalidFormat::new(VM_NOT_ID)));
    }
}
