//! The errors of writing a seed drive.

use std::io;
use std::path::{Path, PathBuf};

/// The error of writing a seed drive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SeedError {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation.
        action: &'static str,
        /// The path of the file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A field cannot be written unambiguously.
    #[error("the seed drive's {field} {value:?} is invalid: {reason}")]
    Field {
        /// The name of the field.
        field: &'static str,
        /// The value of the field.
        value: String,
        /// The valid values.
        reason: &'static str,
    },
}

impl SeedError {
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> SeedError {
        let path = path.as_ref().to_owned();
        move |source| SeedError::Io { action, path, source }
    }
}
