//! Folders: opening, making, flushing.

use crate::accounts::Owner;
use crate::files::names::encode;
use crate::server::Failure;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid, fchmod, fchown, fsync, mkdirat, openat};
use rustix::io::{self, Errno};
use scalebox_agent_api::FailureCode;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// The permissions of directories that are made without a mode.
pub(crate) const DEFAULT_MODE: u32 = 0o755;

/// Opens a folder.
pub(crate) fn open(path: &Path) -> io::Result<OwnedFd> {
    open_at(CWD, path.as_os_str(), OFlags::empty())
}

/// Opens a folder in another one, with more flags.
pub(crate) fn open_at(folder: impl AsFd, name: &OsStr, more: OFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    openat(folder, name, flags | more, Mode::empty())
}

/// Splits a path into its folder and its name.
///
/// # Errors
/// [`FailureCode::Invalid`] for `/`.
pub(crate) fn split(path: &Path) -> Result<(&Path, &OsStr), Failure> {
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) => Ok((folder, name)),
        _ => Err(Failure::new(
            FailureCode::Invalid,
            "the root directory cannot be made, renamed or deleted",
        )),
    }
}

/// Makes a folder and flushes it.
///
/// # Errors
/// Those of the file system, such as [`Errno::EXIST`]. A folder whose owner cannot be set stays.
pub(crate) fn make_at(parent: impl AsFd, name: &OsStr, mode: u32, owner: Option<Owner>) -> io::Result<()> {
    mkdirat(&parent, name, Mode::RWXU)?;
    let folder = open_at(&parent, name, OFlags::NOFOLLOW)?;
    set_owner_and_mode(&folder, owner, mode)?;
    fsync(&parent)
}

/// Sets the owner of an open file, then its permissions: a new owner clears the bits setuid and
/// setgid.
pub(crate) fn set_owner_and_mode(file: impl AsFd, owner: Option<Owner>, mode: u32) -> io::Result<()> {
    if let Some(Owner { uid, gid }) = owner {
        fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    fchmod(&file, Mode::from_raw_mode(mode))
}

/// Makes a folder and all folders above it that do not exist. All belong to `owner`.
///
/// # Errors
/// Those of the file system; [`FailureCode::WrongKind`] if something else has the name.
pub(crate) fn make_all(path: &Path, mode: u32, owner: Option<Owner>) -> Result<(), Failure> {
    let mut missing: Vec<&Path> = Vec::new();
    let mut nearest = None;
    for ancestor in path.ancestors() {
        match open(ancestor) {
            Ok(folder) => {
                nearest = Some(folder);
                break;
            }
            Err(Errno::NOENT) => missing.push(ancestor),
            Err(error) => return Err(Failure::io(format!("open {}", encode(ancestor)))(error)),
        }
    }
    for (index, folder) in missing.iter().enumerate().rev() {
        let failed = || Failure::io(format!("make {}", encode(folder)));
        let (Some(parent), Some(name)) = (nearest.take(), folder.file_name()) else {
            return Err(failed()(Errno::NOENT));
        };
        let mode = if index == 0 { mode } else { DEFAULT_MODE };
        match make_at(&parent, name, mode, owner) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed()(error)),
        }
        nearest = Some(open_at(&parent, name, OFlags::empty()).map_err(failed())?);
    }
    Ok(())
}

/// Makes one folder.
///
/// # Errors
/// Those of the file system; [`FailureCode::Exists`] if anything has the name.
pub(crate) fn make(path: &PathBuf, mode: u32, owner: Option<Owner>) -> Result<(), Failure> {
    let (parent, name) = split(path)?;
    let made = open(parent).and_then(|parent| make_at(parent, name, mode, owner));
    made.map_err(Failure::io(format!("make {}", encode(path))))
}
