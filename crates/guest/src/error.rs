//! What can go wrong when a template or a seed drive is made.

use crate::command::CommandError;
use std::io;
use std::path::{Path, PathBuf};

/// An error of the guest room. Messages name the thing, what is wrong with it, and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An outside program is missing or failed; holds all it wrote.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A field of a recipe cannot be passed to the programs that cook it.
    #[error("the recipe's {field} {value:?} cannot be used: {reason}")]
    Recipe {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        reason: &'static str,
    },
    /// A field of a seed drive cannot be written so that every reader reads the same.
    #[error("the seed drive's {field} {value:?} cannot be used: {reason}")]
    Seed {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        reason: &'static str,
    },
    /// The archive's packages do not hold what the guest is made of.
    #[error("the archive's kernel package cannot be used: {0}; build with the suite bookworm, or report it")]
    Kernel(String),
    /// A file system is still mounted in a scratch directory, so it is not removed.
    #[error("{} is still mounted: unmount it (umount {}) and run the build again", .0.display(), .0.display())]
    StillMounted(PathBuf),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { action, path, source }
    }
}
