//! Files of guests, through their agents.

use crate::host::error::ServiceError;
use crate::host::{Host, rfc3339};
use crate::vm::guest::{self, Guest};
use scalebox_agent_api as wire;
use scalebox_api::{FileEntry, FileKind, FileList, FileMode};
use scalebox_guest::{AgentError, Download, FileHead, PutFile, Upload};

/// A file or an archive that is being read, with its VM.
pub(crate) struct Reading {
    /// The VM.
    pub(crate) guest: Guest,
    /// The content.
    pub(crate) content: Download,
}

/// Opens a regular file.
///
/// # Errors
/// 404; 403 if the guest's kernel denies it; 409 if it is not a regular file, or the VM does not
/// run; 503.
pub(crate) async fn read(host: &Host, reference: &str, path: &[u8]) -> Result<(FileHead, Reading), ServiceError> {
    let guest = guest::reach(host, reference).await?;
    let opened = guest.agent.read_file(path).await;
    let (head, content) = opened.map_err(|error| guest.failed(&error))?;
    Ok((head, Reading { guest, content }))
}

/// Opens a file or directory as a tar archive.
///
/// # Errors
/// 404, 403, 409, 503.
pub(crate) async fn read_tar(host: &Host, reference: &str, path: &[u8]) -> Result<Reading, ServiceError> {
    let guest = guest::reach(host, reference).await?;
    let opened = guest.agent.read_tar(path).await;
    let content = opened.map_err(|error| guest.failed(&error))?;
    Ok(Reading { guest, content })
}

/// Replaces or creates a file, atomically.
///
/// # Errors
/// 404 if a directory is missing; 403; 409; 507 if the guest's disk is full; 503. The file is
/// unchanged then.
pub(crate) async fn write(
    guest: &Guest,
    path: &[u8],
    put: &PutFile,
    content: Upload,
) -> Result<FileEntry, ServiceError> {
    let written = guest.agent.write_file(path, put, content).await;
    entry(guest, written)
}

/// Unpacks a tar archive into a directory. Returns the directory.
///
/// # Errors
/// Those of [`write`], and 400 for an invalid archive. Files that were unpacked before the error
/// stay.
pub(crate) async fn write_tar(guest: &Guest, path: &[u8], archive: Upload) -> Result<FileEntry, ServiceError> {
    let unpacked = guest.agent.write_tar(path, archive).await;
    unpacked.map_err(|error| guest.failed(&error))?;
    entry(guest, guest.agent.file_info(path).await)
}

/// Removes a file or directory.
///
/// # Errors
/// 404; 403; 409 for a directory that is not empty, unless `recursive`; 503.
pub(crate) async fn remove(host: &Host, reference: &str, path: &[u8], recursive: bool) -> Result<(), ServiceError> {
    let guest = guest::reach(host, reference).await?;
    let removed = guest.agent.remove(path, recursive).await;
    removed.map_err(|error| guest.failed(&error))
}

/// Returns the properties of a file; of a symbolic link, not of its target.
///
/// # Errors
/// 404, 403, 409, 503.
pub(crate) async fn info(host: &Host, reference: &str, path: &[u8]) -> Result<FileEntry, ServiceError> {
    let guest = guest::reach(host, reference).await?;
    let info = guest.agent.file_info(path).await;
    entry(&guest, info)
}

/// Lists a directory.
///
/// # Errors
/// 404, 403, 409, 503.
pub(crate) async fn list(host: &Host, reference: &str, path: &[u8]) -> Result<FileList, ServiceError> {
    let guest = guest::reach(host, reference).await?;
    let listing = guest.agent.list(path).await.map_err(|error| guest.failed(&error))?;
    Ok(FileList {
        entries: listing.entries.into_iter().map(describe).collect(),
        truncated: listing.truncated,
    })
}

/// Creates a directory.
///
/// # Errors
/// 404 if its parent is missing; 403; 409 if it exists; 507; 503.
pub(crate) async fn make_directory(
    host: &Host,
    reference: &str,
    path: &[u8],
    put: &PutFile,
) -> Result<FileEntry, ServiceError> {
    let guest = guest::reach(host, reference).await?;
    let made = guest.agent.make_directory(path, put).await;
    entry(&guest, made)
}

/// Renames a file or directory.
///
/// # Errors
/// 404; 403; 409; 503.
pub(crate) async fn rename(host: &Host, reference: &str, path: &[u8], to: &[u8]) -> Result<FileEntry, ServiceError> {
    let guest = guest::reach(host, reference).await?;
    let renamed = guest.agent.rename(path, to).await;
    entry(&guest, renamed)
}

fn entry(guest: &Guest, info: Result<wire::FileInfo, AgentError>) -> Result<FileEntry, ServiceError> {
    info.map(describe).map_err(|error| guest.failed(&error))
}

fn describe(info: wire::FileInfo) -> FileEntry {
    // A file's time may be any number. A time that no date can express is shown as the nearest
    // date.
    let modified = jiff::Timestamp::from_millisecond(info.modified_ms).unwrap_or(match info.modified_ms {
        ..0 => jiff::Timestamp::MIN,
        _ => jiff::Timestamp::MAX,
    });
    FileEntry {
        name: info.name,
        kind: match info.kind {
            wire::FileKind::File => FileKind::File,
            wire::FileKind::Directory => FileKind::Directory,
            wire::FileKind::Symlink => FileKind::Symlink,
            wire::FileKind::Other => FileKind::Other,
        },
        size: info.size,
        mode: FileMode::of_bits(info.mode),
        uid: info.uid,
        gid: info.gid,
        modified_at: rfc3339(modified),
        target: info.target,
    }
}
