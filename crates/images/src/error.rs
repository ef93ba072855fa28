//! The errors of building a template.

use scalebox_programs::ProgramError;
use std::io;
use std::path::{Path, PathBuf};

/// The reason why building a template failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An outside program is missing or failed; includes its output.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A field of a recipe cannot be passed to the programs of the build.
    #[error("the recipe's {field} {value:?} is invalid: {reason}")]
    Recipe {
        /// The field.
        field: &'static str,
        /// The value of the field.
        value: String,
        /// The valid values.
        reason: &'static str,
    },
    /// The archive's kernel package lacks expected content.
    #[error("cannot use the archive's kernel package: {0}")]
    Kernel(String),
    /// A file system is still mounted in a scratch directory, which is therefore not removed.
    #[error("{} is still mounted", .0.display())]
    StillMounted(PathBuf),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { action, path, source }
    }
}
