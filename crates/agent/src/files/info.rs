//! Properties of files.

use crate::files::kind;
use crate::files::names::encode;
use crate::server::Failure;
use rustix::fs::{AtFlags, CWD, FileType, Stat, readlinkat, statat};
use rustix::{fd::AsFd, io};
use scalebox_agent_api::{FileInfo, FileKind};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

/// Returns the properties of the file at `path`, which is not followed if it is a symbolic link.
///
/// # Errors
/// Those of the file system.
pub(crate) fn info(path: &Path) -> Result<FileInfo, Failure> {
    info_at(CWD, path.as_os_str()).map_err(Failure::io(format!("read {}", encode(path))))
}

/// Returns the properties of the file `name` in a folder.
pub(crate) fn info_at(folder: impl AsFd, name: &OsStr) -> io::Result<FileInfo> {
    let stat = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = match kind::of(&stat) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        _ => FileKind::Other,
    };
    let target = match kind {
        FileKind::Symlink => {
            let target = readlinkat(&folder, name, Vec::new())?;
            Some(encode(OsString::from_vec(target.into_bytes())))
        }
        _ => None,
    };
    Ok(FileInfo {
        name: encode(name),
        kind,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_ms: modified_ms(&stat),
        target,
    })
}

/// Returns the time of the last change of the content, in milliseconds since 1970.
pub(crate) fn modified_ms(stat: &Stat) -> i64 {
    let milliseconds = i64::try_from(stat.st_mtime_nsec / 1_000_000).unwrap_or(0);
    stat.st_mtime.saturating_mul(1000).saturating_add(milliseconds)
}
