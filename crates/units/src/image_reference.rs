//! References of images in container registries.

use crate::format::{InvalidFormat, text_newtype};
use crate::names::{MAX_LENGTH, TemplateName};
use std::fmt;
use std::str::FromStr;

/// A reference of an image in a registry: `[REGISTRY/]NAME[:TAG][@sha256:DIGEST]`.
///
/// It has 1 to 4096 visible ASCII characters. The pull checks its grammar, which depends on the
/// registry's rules.
///
/// ```
/// use scalebox_units::ImageReference;
/// assert!("ghcr.io/owner/tool:1".parse::<ImageReference>().is_ok());
/// assert!("a b".parse::<ImageReference>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(into = "String")]
pub struct ImageReference(String);

/// Maximum length of a reference, in bytes.
const MAX_REFERENCE: usize = 4096;

impl ImageReference {
    /// Derives the name of the template that the image becomes: `ghcr.io/a/python:3.12-slim`
    /// becomes `python-3.12-slim`, and `nginx:latest` becomes `nginx`. A digest has no part in it.
    ///
    /// # Errors
    /// If the result is not a valid name.
    pub fn template_name(&self) -> Result<TemplateName, InvalidFormat> {
        let (tagged, _digest) = self.0.split_once('@').unwrap_or((&self.0, ""));
        let last = tagged.rsplit('/').next().unwrap_or(tagged);
        let name = last.strip_suffix(":latest").unwrap_or(last).replace(':', "-");
        name.chars().take(MAX_LENGTH).collect::<String>().parse()
    }
}

impl FromStr for ImageReference {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        match (1..=MAX_REFERENCE).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Ok(ImageReference(text.to_owned())),
            false => Err(InvalidFormat::new("must be 1 to 4096 ASCII characters without spaces")),
        }
    }
}

text_newtype!(ImageReference);

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of(reference: &str) -> Result<TemplateName, InvalidFormat> {
        reference.parse::<ImageReference>()?.template_name()
    }

    #[test]
    fn the_name_of_a_template_comes_from_the_image() {
        for (reference, name) in [
            ("nginx", "nginx"),
            ("nginx:latest", "nginx"),
            ("python:3.12-slim", "python-3.12-slim"),
            ("localhost:5000/a/b:1@sha256:00", "b-1"),
            ("ghcr.io/owner/tool@sha256:00", "tool"),
            (&format!("a/{}:1", "x".repeat(70)), &"x".repeat(63)),
        ] {
            assert_eq!(name_of(reference).unwrap().as_str(), name);
        }
        for reference in ["a/", "@sha256:00", "a/_b", ":latest"] {
            assert!(name_of(reference).is_err(), "{reference}");
        }
    }

    #[test]
    fn references_are_visible_ascii() {
        for text in ["", "a b", "a\n", "é", "a\0", &"a".repeat(4097)] {
            assert!(text.parse::<ImageReference>().is_err(), "{text:?}");
        }
        assert!("a".repeat(4096).parse::<ImageReference>().is_ok());
    }
}
