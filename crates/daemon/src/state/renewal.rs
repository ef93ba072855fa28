//! Replacing the state file by a fresh copy of itself.
//!
//! When a disk refuses a write, the kernel may keep the page, call it clean, and lose it later; and
//! ext4 may lose what is written to the same blocks afterwards, although it reports success. So a
//! file that has seen a failed write is given up: its committed content is copied to a new file,
//! which is flushed and takes its place, without a log.
//!
//! The copy counts from the moment in which it has the name [`REPLACEMENT`]. A crash behind that is
//! finished by [`finish`] at the next start.

use super::{StateError, connect, failed};
use rusqlite::Connection;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;

const COPY: &str = "state.copy";
/// A whole and flushed copy, which counts in place of the state file and its log.
const REPLACEMENT: &str = "state.replacement";

/// Copies what is committed in `connection`'s file to a new file that takes its place. The
/// connection is of no use then.
///
/// # Errors
/// When the disk still refuses to be written. The old file is as it was, or [`finish`] has to be
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

/// Puts a copy that counts in place, if there is one.
///
/// # Errors
/// [`StateError::Folder`]; it may be called again.
pub(super) fn finish(folder: &Path) -> Result<(), StateError> {
    let replacement = folder.join(REPLACEMENT);
    let finished = match fs::symlink_metadata(&replacement) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        // The log first: it must never lie beside a file to which it does not belong.
        Ok(_) => remove(&folder.join("state.db-wal"))
            .and_then(|()| remove(&folder.join("state.db-shm")))
            .and_then(|()| sync(folder))
            .and_then(|()| fs::rename(&replacement, folder.join("state.db")))
            .and_then(|()| sync(folder)),
    };
    finished.map_err(in_folder(folder))
}

/// Whether an earlier program ended without closing the state file.
pub(super) fn was_left_open(folder: &Path) -> bool {
    fs::metadata(folder.join("state.db-wal")).is_ok_and(|log| log.len() > 0)
}

/// Opens the state file, replaced by a fresh copy if an earlier program left it open: a write of it
/// may have failed.
pub(super) fn open(folder: &Path) -> Result<Connection, StateError> {
    finish(folder)?;
    let path = folder.join("state.db");
    let left_open = was_left_open(folder);
    let connection = connect(&path)?;
    if !left_open {
        return Ok(connection);
    }
    if let Err(error) = renew(folder, &connection) {
        tracing::warn!(%error, "the state file was not closed, and cannot be copied to a fresh one");
        return Ok(connection);
    }
    close(connection);
    finish(folder)?;
    connect(&path)
}

/// Closes a file that was replaced, without writing to it any more.
pub(super) fn close(connection: Connection) {
    let config = rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
    if let Err(error) = connection.set_db_config(config, true) {
        tracing::debug!(%error, "the old state file is written to once more");
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
