//! Idempotency keys, which make it safe to repeat a request.

use scalebox_units::InvalidFormat;
use std::fmt;
use std::str::FromStr;

/// The value of the header `Idempotency-Key`: 1 to 255 printable ASCII characters without spaces.
///
/// Clients use a new key, such as a UUID, for each VM. The quotes around it, which
/// draft-ietf-httpapi-idempotency-key-header requires, belong to the header and not to the key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// Returns the key without quotes.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for IdempotencyKey {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        let text = text.trim();
        let key = text
            .strip_prefix('"')
            .and_then(|rest| rest.strip_suffix('"'))
            .unwrap_or(text);
        let is_allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\');
        if (1..=255).contains(&key.len()) && key.bytes().all(is_allowed) {
            Ok(IdempotencyKey(key.to_owned()))
        } else {
            let form =
                "must be 1 to 255 printable ASCII characters without spaces, quotes and backslashes, such as a UUID";
            Err(InvalidFormat::new(form))
        }
    }
}

impl fmt::Display for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_equal_with_and_without_quotes() {
        for text in ["job-17", "\"job-17\"", " job-17 "] {
            assert_eq!(text.parse::<IdempotencyKey>().unwrap().as_str(), "job-17");
        }
        for text in [
            "",
            "\"\"",
            "two words",
            "a\"b",
            "a\\b",
            "naïve",
            "a\nb",
            &"x".repeat(256),
        ] {
            assert!(text.parse::<IdempotencyKey>().is_err(), "{text:?}");
        }
    }
}
