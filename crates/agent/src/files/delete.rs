//! Deletes files and directories.

use crate::files::folder;
use crate::files::names::encode;
use crate::server::Failure;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, fstat, fsync, openat2, statat, unlinkat};
use rustix::io::{self, Errno};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// Deletes a file or a directory; with `recursive` also a directory that is not empty. Does not
/// follow symbolic links, and does not enter other mounts.
///
/// # Errors
/// [`FailureCode::Invalid`](scalebox_agent_api::FailureCode::Invalid) for the root directory.
/// [`FailureCode::Busy`](scalebox_agent_api::FailureCode::Busy) at a mount point. Those of the file
/// system; a part may be deleted by then.
pub(crate) fn delete(path: &Path, recursive: bool) -> Result<(), Failure> {
    let (parent, name) = folder::split(path)?;
    let deleted = folder::open(parent).and_then(|parent| {
        match FileType::from_raw_mode(statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode) {
            FileType::Directory if recursive => delete_tree(parent.try_clone().map_err(errno)?, name)?,
            FileType::Directory => unlinkat(&parent, name, AtFlags::REMOVEDIR)?,
            _ => unlinkat(&parent, name, AtFlags::empty())?,
        }
        fsync(&parent)
    });
    deleted.map_err(Failure::io(format!("delete {}", encode(path))))
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// Deletes a directory and all below it. Holds two file descriptors at any depth: it goes back up
/// through `..`, and checks that this is where it came from.
fn delete_tree(parent: OwnedFd, name: &OsStr) -> io::Result<()> {
    let mut above = vec![(identity(&parent)?, name.to_owned())];
    let mut here = enter(&parent, name)?;
    drop(parent);
    while let Some((parent, name)) = above.pop() {
        if let Some(child) = empty(&here)? {
            let below = enter(&here, &child)?;
            above.push((parent, name));
            above.push((identity(&here)?, child));
            here = below;
            continue;
        }
        let up = folder::open_at(&here, OsStr::new(".."), OFlags::empty())?;
        if identity(&up)? != parent {
            // Another program moved the directory.
            return Err(Errno::BUSY);
        }
        match unlinkat(&up, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        here = up;
    }
    Ok(())
}

fn identity(folder: &OwnedFd) -> io::Result<(u64, u64)> {
    let stat = fstat(folder)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Opens a directory that is about to be deleted.
fn enter(folder: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    match openat2(folder, name, flags, Mode::empty(), resolve) {
        Err(Errno::XDEV) => Err(Errno::BUSY),
        opened => opened,
    }
}

/// Deletes entries of a directory up to the first subdirectory, and returns its name; `None` if the
/// directory is empty.
fn empty(folder: &OwnedFd) -> io::Result<Option<OsString>> {
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        match unlinkat(folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            // POSIX has EPERM for directories, Linux EISDIR.
            Err(Errno::ISDIR | Errno::PERM) if is_directory(folder, name)? => {
                return Ok(Some(OsString::from_vec(name.as_bytes().to_vec())));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn is_directory(folder: &OwnedFd, name: &OsStr) -> io::Result<bool> {
    let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}
