//! Files in the pool: cloning, copying with holes, and making a change durable.

use crate::error::StorageError;
use crate::mounts;
use rustix::fs::{
    FlockOperation, IFlags, Mode, OFlags, RenameFlags, SeekFrom, flock, ioctl_ficlone, ioctl_getflags, ioctl_setflags,
    renameat_with, seek,
};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Images hold what guests wrote: nobody but root reads them.
const IMAGE_MODE: u32 = 0o600;

/// Makes a new file for reading and writing; fails if the path exists. Never follows a link.
pub(crate) fn create_new(path: &Path) -> Result<File, StorageError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(IMAGE_MODE)
        .open(path)
        .map_err(|error| StorageError::io("create", path.display(), error))
}

/// Never follows a link in the last component, and never waits for the other end of a pipe.
const CAREFULLY: i32 = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits() as i32;

/// Opens a file for reading; never follows a link in the last component.
pub(crate) fn open_read(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(CAREFULLY).open(path)
}

/// The entries of a folder, each with whether it is a regular file, as which everything of the pool's is made.
pub(crate) fn entries(folder: &Path) -> Result<Vec<(PathBuf, bool)>, StorageError> {
    let failed = |error| StorageError::io("list", folder.display(), error);
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        match entry.file_type() {
            Ok(kind) => entries.push((entry.path(), kind.is_file())),
            // Removed a moment ago.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(entries)
}

/// As [`open_read`], for writing too.
pub(crate) fn open_write(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(CAREFULLY)
        .open(path)
}

/// Makes `target` share all blocks of `source` (`FICLONE`): no byte is copied.
///
/// # Errors
/// `EINVAL` when one of the two is NOCOW and the other is not, `EOPNOTSUPP` where the file system cannot, `EXDEV` across file systems.
pub(crate) fn reflink(source: &File, target: &File) -> io::Result<()> {
    ioctl_ficlone(target, source).map_err(io::Error::from)
}

/// Clones an unnamed file from `from` to `to`, two folders of one file system, as every creation of a disk will.
///
/// # Errors
/// [`StorageError::NotAPool`] where the file system cannot.
pub(crate) fn require_reflink(from: &Path, to: &Path) -> Result<(), StorageError> {
    let unnamed = |dir: &Path| {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR);
        fd.map(File::from)
            .map_err(|errno| StorageError::io("create a file in", dir.display(), errno.into()))
    };
    let (source, target) = (unnamed(from)?, unnamed(to)?);
    match ioctl_ficlone(&target, &source) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOTTY) => Err(StorageError::NotAPool {
            path: to.to_owned(),
            fs_type: mounts::holding(to)
                .ok()
                .flatten()
                .map_or_else(|| "different".to_owned(), |mount| mount.fs_type),
        }),
        Err(errno) => Err(StorageError::io("clone files to", to.display(), errno.into())),
    }
}

/// Copies the data of `source` to `target`, keeping its holes. Blocks until done.
pub(crate) fn copy_sparse(source: &File, target: &File) -> io::Result<()> {
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut offset = 0;
    while let Some(start) = seek_or_end(source, SeekFrom::Data(offset))? {
        let end = seek_or_end(source, SeekFrom::Hole(start))?.unwrap_or(size);
        copy_range(source, target, start, end)?;
        offset = end;
    }
    Ok(())
}

/// `ENXIO` is the kernel's word for "no more data behind this offset".
pub(crate) fn seek_or_end(file: &File, to: SeekFrom) -> io::Result<Option<u64>> {
    match seek(file, to) {
        Ok(offset) => Ok(Some(offset)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn copy_range(mut source: &File, mut target: &File, start: u64, end: u64) -> io::Result<()> {
    source.seek(io::SeekFrom::Start(start))?;
    target.seek(io::SeekFrom::Start(start))?;
    let copied = io::copy(&mut source.take(end - start), &mut target)?;
    if copied < end - start {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the file became shorter while it was copied",
        ));
    }
    Ok(())
}

/// Flushes a folder, so that names made or removed in it survive a power cut.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StorageError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| StorageError::io("flush", dir.display(), error))
}

/// Renames within one file system, failing with `AlreadyExists` rather than replacing.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, RenameFlags::NOREPLACE).map_err(io::Error::from)
}

/// Marks a folder so that files made in it are overwritten in place (`chattr +C`), or an empty file. Returns whether it had to.
pub(crate) fn set_nocow(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let flags = ioctl_getflags(&file)?;
    if flags.contains(IFlags::NOCOW) {
        return Ok(false);
    }
    ioctl_setflags(&file, flags | IFlags::NOCOW)?;
    Ok(true)
}

/// How long a lock is waited for, and how often it is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// Locks a file for one program. One that was killed a moment ago may still have it: a program that it was just starting shares its files until it
/// is the other program. So a lock that is held is waited for a little. `false`: another program has it.
///
/// # Errors
/// What `flock` fails with.
pub fn lock_for_one_program(file: impl AsFd) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if begun.elapsed() < LOCK_PATIENCE => thread::sleep(LOCK_INTERVAL),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Removes a file in an undo path, where the first error is the one to report: a failure here is logged.
pub(crate) fn discard(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a half-made file could not be removed; the next start removes it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_sparse_copy_has_the_same_bytes_and_the_same_holes() {
        let folder = tempfile::tempdir().unwrap();
        let source = create_new(&folder.path().join("source")).unwrap();
        source.set_len(64 << 20).unwrap();
        source.write_all_at(b"head", 0).unwrap();
        source.write_all_at(b"tail", (64 << 20) - 4).unwrap();
        let target = create_new(&folder.path().join("target")).unwrap();
        copy_sparse(&source, &target).unwrap();
        let (mut expected, mut found) = (Vec::new(), Vec::new());
        File::open(folder.path().join("source"))
            .unwrap()
            .read_to_end(&mut expected)
            .unwrap();
        File::open(folder.path().join("target"))
            .unwrap()
            .read_to_end(&mut found)
            .unwrap();
        assert!(expected == found);
        assert!(crate::space::allocated_of(&target).unwrap() < crate::Bytes::from_mib(1));
    }

    #[test]
    fn a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (secret, link) = (folder.path().join("secret"), folder.path().join("link"));
        File::create(&secret).unwrap().write_all(b"secret").unwrap();
        std::os::unix::fs::symlink(&secret, &link).unwrap();
        assert!(open_read(&link).is_err());
    }
}
