//! The common parts of all parsers: their error, and the conversions of a checked text.

/// A text has the wrong form. The message continues after the name of the field: `must be …`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidFormat(String);

impl InvalidFormat {
    /// Creates the error. `form` describes the right form and continues after the name of the
    /// field: `must be …`.
    pub fn new(form: impl Into<String>) -> Self {
        InvalidFormat(form.into())
    }
}

/// Implements the conversions of a type that wraps a checked `String`.
macro_rules! text_newtype {
    ($name:ident) => {
        impl $name {
            /// Returns the text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        /// The order and the hash are those of the text.
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidFormat;

            fn try_from(text: String) -> Result<Self, InvalidFormat> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }
    };
}
pub(crate) use text_newtype;
