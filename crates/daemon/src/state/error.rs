//! The errors of the state file.

use rusqlite::ErrorCode;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The reason why the state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// SQLite or the disk failed.
    #[error("the state file {}: {source}", path.display())]
    Database {
        /// The path of the state file.
        path: PathBuf,
        /// The error from SQLite.
        source: Arc<rusqlite::Error>,
    },
    /// One failure of several changes that were committed together.
    #[error(transparent)]
    Shared(Arc<StateError>),
    /// A thread that was working on the state file panicked.
    #[error("internal error: a thread panicked while changing the state file")]
    Panicked,
    /// The disk of `STATE_DIR` is full.
    #[error("the disk of STATE_DIR ({}) is full: free some space there, then try again", .0.display())]
    Full(PathBuf),
    /// The file system of `STATE_DIR` was read-only when the daemon started.
    #[error(
        "STATE_DIR ({}) was read-only when scaleboxd started: make it writable and restart scaleboxd; nothing can be changed until then",
        .0.display()
    )]
    ReadOnly(PathBuf),
    /// The VM to be changed is not in the state file.
    #[error("the state file {} has no VM {id}: nothing was changed", path.display())]
    NoSuchVm {
        /// The path of the state file.
        path: PathBuf,
        /// The id of the VM.
        id: String,
    },
    /// The state folder or its lock cannot be used.
    #[error("cannot use the state folder {}: {source}", path.display())]
    Folder {
        /// The path of the folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another daemon uses the state.
    #[error("another scaleboxd uses {}: stop it first, or set STATE_DIR to another folder", .0.display())]
    Locked(PathBuf),
    /// The state was written by a later release.
    #[error("{} was written by a later release (schema {found}, but this release supports up to {known}): install that release again", path.display())]
    LaterSchema {
        /// The path of the state file.
        path: PathBuf,
        /// The schema of the file.
        found: usize,
        /// The latest supported schema.
        known: usize,
    },
}

impl StateError {
    /// Returns the underlying error of a shared one.
    pub(crate) fn root(&self) -> &StateError {
        match self {
            StateError::Shared(shared) => shared.root(),
            other => other,
        }
    }
}

pub(super) fn failed(path: &Path, source: Arc<rusqlite::Error>) -> StateError {
    if source.sqlite_error_code() == Some(ErrorCode::DiskFull) {
        return StateError::Full(path.parent().unwrap_or(path).to_owned());
    }
    StateError::Database {
        path: path.to_owned(),
        source,
    }
}
