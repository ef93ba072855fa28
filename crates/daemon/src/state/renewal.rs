//! Replaces the state file by a copy of itself.
//!
//! After a failed write, the kernel may keep the page, consider it clean, and lose it later; and
//! ext4 may lose later writes to the same blocks although it reports success. Therefore a file with
//! a failed write is abandoned: its committed content is copied to a new file, which is flushed and
//! takes its place, without a log.
//!
//! The copy is valid from the moment it is named [`REPLACEMENT`]. After a crash from then on, the
//! next start completes the replacement with [`finish`].

use crate::state::connection::connect;
use crate::state::error::{StateError, failed};
use rusqlite::Connection;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;

const COPY: &str = "state.copy";
/// A complete, flushed copy that replaces the state file and its log.
const REPLACEMENT: &str = "state.replacement";

/// Copies the committed content of `connection`'s file to a new file that takes its place. The
/// connection must not be used afterwards.
///
/// # Errors
/// If writing to the disk still fails. Either the old file is unchanged, or [`finish`] has to be
/// called.
pub(super) fn renew(folder: &Path, connection: &Connection) -> Result<(), StateError> {
    let copy = folder.join(COPY);
    let in_folder = in_folder(folder);
    remove(&copy).map_err(in_folder)?;
    connection
        .execute("VACUUM INTO ?", [copy.to_string_lossy()])
        .map_err(|error| failed(&copy, Arc::new(error)))?;
    File::open(&copy)
        .and_then(|copy| copy.sync_all())
        .and_then(|()| fs::rename(&copy, folder.join(REPLACEMENT)))
        .and_then(|()| sync(folder))
        .map_err(in_folder)
}

/// Moves a complete copy into place, if there is one.
///
/// # Errors
/// [`StateError::Folder`]; can be called again.
pub(super) fn finish(folder: &Path) -> Result<(), StateError> {
    let replacement = folder.join(REPLACEMENT);
    let finished = match fs::symlink_metadata(&replacement) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        // The log is removed first: it must never be next to a file that it does not belong to.
        Ok(_) => remove(&folder.join("state.db-wal"))
            .and_then(|()| remove(&folder.join("state.db-shm")))
            .and_then(|()| sync(folder))
            .and_then(|()| fs::rename(&replacement, folder.join("state.db")))
            .and_then(|()| sync(folder)),
    };
    finished.map_err(in_folder(folder))
}

/// Returns whether an earlier process ended without closing the state file.
pub(super) fn was_not_closed(folder: &Path) -> bool {
    fs::metadata(folder.join("state.db-wal")).is_ok_and(|log| log.len() > 0)
}

/// Opens the state file. Replaces it by a copy if it was not closed, because a write may have
/// failed.
pub(super) fn open(folder: &Path) -> Result<Connection, StateError> {
    finish(folder)?;
    let path = folder.join("state.db");
    let not_closed = was_not_closed(folder);
    let connection = connect(&path)?;
    if !not_closed {
        return Ok(connection);
    }
    if let Err(error) = renew(folder, &connection) {
        tracing::warn!(%error, "the state file was not closed, and cannot be replaced by a copy");
        return Ok(connection);
    }
    close(connection);
    finish(folder)?;
    connect(&path)
}

/// Closes a replaced file without writing to it again.
pub(super) fn close(connection: Connection) {
    let config = rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
    if let Err(error) = connection.set_db_config(config, true) {
        tracing::debug!(%error, "cannot prevent a last write to the old state file");
    }
    drop(connection);
}

fn in_folder(folder: &Path) -> impl Fn(io::Error) -> StateError + Copy {
    move |source| StateError::Folder {
        path: folder.to_owned(),
        source,
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
