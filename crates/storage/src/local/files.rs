//! Files in the pool: cloning, sparse copying, and durable changes.

use crate::error::StorageError;
use rustix::fs::{
    FlockOperation, IFlags, Mode, OFlags, RenameFlags, SeekFrom, flock, ioctl_ficlone, ioctl_getflags, ioctl_setflags,
    renameat_with, seek,
};
use rustix::io::Errno;
use scalebox_units::Bytes;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Images contain guests' data: only root may read them.
const IMAGE_MODE: u32 = 0o600;

/// Suffix of unfinished files. The next start removes those of interrupted operations.
pub(crate) const PARTIAL: &str = ".partial";

/// Creates a file for reading and writing; fails if the path exists. Never follows a link.
pub(crate) fn create_new(path: &Path) -> Result<File, StorageError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(IMAGE_MODE)
        .open(path)
        .map_err(|error| StorageError::io("create", path.display(), error))
}

/// Flags for opening a file. It neither follows a link in the last component nor waits for the
/// other end of a pipe.
const SAFE_OPEN_FLAGS: i32 = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits() as i32;

/// Opens a file for reading; never follows a link in the last component.
pub(crate) fn open_read(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(SAFE_OPEN_FLAGS).open(path)
}

/// Lists the entries of a folder, each with whether it is a regular file. All files of the pool are
/// regular files.
pub(crate) fn entries(folder: &Path) -> Result<Vec<(PathBuf, bool)>, StorageError> {
    let failed = |error| StorageError::io("list", folder.display(), error);
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        match entry.file_type() {
            Ok(kind) => entries.push((entry.path(), kind.is_file())),
            // The entry was removed since the listing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(entries)
}

/// Opens a file like [`open_read`], for writing too.
pub(crate) fn open_write(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(SAFE_OPEN_FLAGS)
        .open(path)
}

/// Makes `target` share all blocks of `source` (`FICLONE`); no data is copied.
///
/// # Errors
/// `EINVAL` when only one of the two is NOCOW, `EOPNOTSUPP` where the file system cannot clone,
/// `EXDEV` across file systems.
pub(crate) fn reflink(source: &File, target: &File) -> io::Result<()> {
    ioctl_ficlone(target, source).map_err(io::Error::from)
}

/// Clones an unnamed file from folder `from` to folder `to`, to check that disks can be cloned
/// there.
///
/// # Errors
/// [`StorageError::NotAPool`] where the file system cannot clone.
pub(crate) fn require_reflink(from: &Path, to: &Path) -> Result<(), StorageError> {
    let unnamed = |dir: &Path| unnamed(dir).map_err(|error| StorageError::io("create a file in", dir.display(), error));
    let (source, target) = (unnamed(from)?, unnamed(to)?);
    match ioctl_ficlone(&target, &source) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOTTY) => Err(StorageError::NotAPool {
            path: to.to_owned(),
            fs_type: scalebox_mounts::holding(to)
                .ok()
                .flatten()
                .map_or_else(|| "different".to_owned(), |mount| mount.fs_type),
        }),
        Err(errno) => Err(StorageError::io("clone files to", to.display(), errno.into())),
    }
}

/// Copies the data of `source` to `target`, keeping its holes.
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

/// Seeks to data or a hole; `None` when the kernel reports `ENXIO`, "no more data after this
/// offset".
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
            "the file became shorter during the copy",
        ));
    }
    Ok(())
}

/// Flushes a folder, so that names created or removed in it survive a power cut.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StorageError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| StorageError::io("flush", dir.display(), error))
}

/// A folder opened before names in it change, so that flushing it afterwards needs no path and no
/// new descriptor.
///
/// Each operation either takes effect durably, or is rolled back and returns the error. In between
/// it calls its argument `step`, where tests inject failures.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    file: File,
}

impl Folder {
    /// Opens the folder at `path`.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub(crate) fn open(path: &Path) -> Result<Folder, StorageError> {
        let file = File::open(path).map_err(|error| StorageError::io("open", path.display(), error))?;
        Ok(Folder {
            path: path.to_owned(),
            file,
        })
    }

    /// Flushes the folder, so that names created or removed in it survive a power cut.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub(crate) fn sync(&self) -> Result<(), StorageError> {
        let synced = self.file.sync_all();
        synced.map_err(|error| StorageError::io("flush", self.path.display(), error))
    }

    /// Renames the flushed file `from` to the new name `to`. On failure it keeps the name `from`.
    ///
    /// # Errors
    /// [`StorageError::Io`], of the kind `AlreadyExists` when the name is taken.
    pub(crate) fn publish(
        &self,
        from: &Path,
        to: &Path,
        step: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), StorageError> {
        let there = |error| StorageError::io("create", to.display(), error);
        let published = fs::symlink_metadata(from).map_err(there)?.ino();
        rename_new(from, to).map_err(there)?;
        let flushed = step().map_err(there).and_then(|()| self.sync());
        if flushed.is_err() {
            // The name is reverted only if it is still the same file: another program may have
            // replaced it since.
            let rolled_back = match fs::symlink_metadata(to) {
                Ok(now) if now.ino() != published => Ok(()),
                _ => rename_new(to, from),
            };
            self.sync_rollback(to, rolled_back);
        }
        flushed
    }

    /// Replaces the file `to`, which is removed, by the flushed file `from`; publishes it if `to`
    /// does not exist. On failure both keep their names.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub(crate) fn replace(
        &self,
        from: &Path,
        to: &Path,
        step: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), StorageError> {
        let there = |error| StorageError::io("replace", to.display(), error);
        // The file is locked, so that no sweep removes it as a leftover while it has the name
        // `from`.
        let replaced = match open_read(to) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.publish(from, to, step),
            Err(error) => return Err(there(error)),
        };
        lock_against_sweep(&replaced).map_err(there)?;
        match exchange(from, to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.publish(from, to, step),
            other => other.map_err(there)?,
        }
        let flushed = step().map_err(there).and_then(|()| self.sync());
        match flushed {
            Ok(()) => discard(from),
            Err(_) => self.sync_rollback(to, exchange(from, to)),
        }
        flushed
    }

    /// Removes the file `path`, via the intermediate name `hidden`. On failure it keeps the name
    /// `path`.
    ///
    /// # Errors
    /// [`StorageError::Io`], of the kind `NotFound` when it does not exist.
    pub(crate) fn remove(
        &self,
        path: &Path,
        hidden: &Path,
        step: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), StorageError> {
        let there = |error| StorageError::io("delete", path.display(), error);
        let file = open_read(path).map_err(there)?;
        lock_against_sweep(&file).map_err(there)?;
        rename_new(path, hidden).map_err(there)?;
        let flushed = step().map_err(there).and_then(|()| self.sync());
        match flushed {
            Ok(()) => discard(hidden),
            Err(_) => self.sync_rollback(path, rename_new(hidden, path)),
        }
        flushed
    }

    /// Flushes a rollback. Its failure is only logged, because the caller reports the original
    /// error.
    fn sync_rollback(&self, path: &Path, rolled_back: io::Result<()>) {
        let flushed = rolled_back.and_then(|()| self.file.sync_all());
        if let Err(error) = flushed {
            tracing::error!(path = %path.display(), %error, "cannot durably roll back a failed change");
        }
    }
}

/// Locks a file so that sweeps of unfinished files skip it. A lock held by another process serves
/// as well.
fn lock_against_sweep(file: &File) -> io::Result<()> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) | Err(Errno::WOULDBLOCK) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Exchanges the names of two files on one file system.
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    renameat_with(rustix::fs::CWD, one, rustix::fs::CWD, other, RenameFlags::EXCHANGE).map_err(io::Error::from)
}

/// Clones `source` to an unnamed file in `folder`.
///
/// # Errors
/// [`StorageError::Io`].
pub(crate) fn unnamed_clone(folder: &Path, source: &File) -> Result<File, StorageError> {
    let failed = |error| StorageError::io("clone to a file in", folder.display(), error);
    let clone = unnamed(folder).map_err(failed)?;
    reflink(source, &clone).map_err(failed)?;
    Ok(clone)
}

/// Creates a file without a name, which is removed when it is closed.
fn unnamed(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR)?;
    Ok(File::from(fd))
}

/// Renames within one file system; fails with `AlreadyExists` instead of replacing.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, RenameFlags::NOREPLACE).map_err(io::Error::from)
}

/// Sets NOCOW (`chattr +C`) on an empty file, or on a folder for the files created in it. Returns
/// whether the flag was missing.
pub(crate) fn set_nocow(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let flags = ioctl_getflags(&file)?;
    if flags.contains(IFlags::NOCOW) {
        return Ok(false);
    }
    ioctl_setflags(&file, flags | IFlags::NOCOW)?;
    Ok(true)
}

/// Timeout and interval of retries of a held lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// Locks a file for this program. Returns `false` if another program keeps the lock.
///
/// A held lock is retried for a short time, because a program killed a moment ago may still hold
/// it: a child that it was about to start shares its files until the child's `exec`.
///
/// # Errors
/// Any error of `flock`.
pub fn try_lock_exclusive(file: impl AsFd) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if begun.elapsed() < LOCK_TIMEOUT => thread::sleep(LOCK_INTERVAL),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Returns the folder of a file.
pub(crate) fn parent(image: &Path) -> &Path {
    image.parent().unwrap_or(Path::new("/"))
}

/// Removes a file while handling another error. A failure is only logged, because the caller
/// reports the first error.
pub(crate) fn discard(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove an unfinished file; the next start removes it");
    }
}

/// Removes a folder with all its contents. Succeeds if it does not exist.
///
/// # Errors
/// [`StorageError::Io`].
pub(crate) fn remove_tree(path: &Path) -> Result<(), StorageError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StorageError::io("remove", path.display(), error)),
        _ => Ok(()),
    }
}

/// Returns the size of the blocks an open file owns.
pub(crate) fn allocated_of(file: &File) -> rustix::io::Result<Bytes> {
    Ok(Bytes::from_blocks(
        u64::try_from(rustix::fs::fstat(file)?.st_blocks).unwrap_or(0),
        512,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    #[test]
    fn sparse_copies_keep_contents_and_holes() {
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
        assert!(allocated_of(&target).unwrap() < Bytes::from_mib(1));
    }

    /// Creates a folder with the files `old` and `new`; each contains its own name.
    fn two_files() -> (tempfile::TempDir, Folder, PathBuf, PathBuf) {
        let scratch = tempfile::tempdir().unwrap();
        let (old, new) = (scratch.path().join("old"), scratch.path().join("new"));
        fs::write(&old, "old").unwrap();
        fs::write(&new, "new").unwrap();
        let folder = Folder::open(scratch.path()).unwrap();
        (scratch, folder, old, new)
    }

    fn fails() -> io::Result<()> {
        Err(io::Error::other("injected"))
    }

    fn content(path: &Path) -> Option<String> {
        fs::read_to_string(path).ok()
    }

    #[test]
    fn publishing_is_rolled_back_when_the_flush_fails() {
        let (scratch, folder, old, new) = two_files();
        let target = scratch.path().join("target");
        assert!(folder.publish(&new, &target, fails).is_err());
        assert_eq!((content(&new).as_deref(), content(&target)), (Some("new"), None));
        let taken = folder.publish(&new, &old, || Ok(())).unwrap_err();
        assert!(matches!(taken, StorageError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists));
        folder.publish(&new, &target, || Ok(())).unwrap();
        assert_eq!((content(&new), content(&target).as_deref()), (None, Some("new")));
    }

    #[test]
    fn replacing_keeps_the_old_file_when_the_flush_fails() {
        let (scratch, folder, old, new) = two_files();
        assert!(folder.replace(&new, &old, fails).is_err());
        assert_eq!(
            (content(&new).as_deref(), content(&old).as_deref()),
            (Some("new"), Some("old"))
        );
        folder.replace(&new, &old, || Ok(())).unwrap();
        assert_eq!((content(&new), content(&old).as_deref()), (None, Some("new")));
        let absent = scratch.path().join("absent");
        folder.replace(&old, &absent, || Ok(())).unwrap();
        assert_eq!((content(&old), content(&absent).as_deref()), (None, Some("new")));
    }

    #[test]
    fn removing_keeps_the_file_when_the_flush_fails() {
        let (scratch, folder, old, _) = two_files();
        let hidden = scratch.path().join("hidden");
        assert!(folder.remove(&old, &hidden, fails).is_err());
        assert_eq!((content(&old).as_deref(), content(&hidden)), (Some("old"), None));
        folder.remove(&old, &hidden, || Ok(())).unwrap();
        assert_eq!((content(&old), content(&hidden)), (None, None));
    }

    #[test]
    fn links_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (secret, link) = (folder.path().join("secret"), folder.path().join("link"));
        File::create(&secret).unwrap().write_all(b"secret").unwrap();
        std::os::unix::fs::symlink(&secret, &link).unwrap();
        assert!(open_read(&link).is_err());
    }
}
