//! The fstab line that mounts the pool after a reboot (setting `FSTAB`).

use scalebox_mounts::{escape, unescape};
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Mount options of a pool on an image. `loop` creates the loop device, `nofail` lets the host boot
/// without the pool, `noatime` avoids a write per read, and `discard=async` returns freed blocks to
/// the host disk.
pub(crate) const IMAGE_OPTIONS: &str = "loop,nofail,noatime,discard=async";
/// Mount options of a pool on a device.
pub(crate) const DEVICE_OPTIONS: &str = "nofail,noatime,discard=async";

/// The reason why the mount could not be registered.
#[derive(Debug, thiserror::Error)]
pub enum FstabError {
    /// Reading or writing fstab failed.
    #[error("cannot register the pool in {}: {source}", path.display())]
    Io {
        /// The fstab file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The path is a device, a pipe or a folder.
    #[error("cannot register the pool in {}: it is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// Another line has the same mount point.
    #[error("{}: {} is already the mount point of {other}", path.display(), target.display())]
    Claimed {
        /// The fstab file.
        path: PathBuf,
        /// The mount point.
        target: PathBuf,
        /// The source in that line.
        other: String,
    },
}

/// The source of a line: the mounted file or file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// A file or a device, by its path.
    Path(PathBuf),
    /// A file system, by its UUID.
    Uuid(String),
}

impl Source {
    /// Returns the first field of a line for this source.
    fn field(&self) -> OsString {
        match self {
            Source::Path(path) => escape(path),
            Source::Uuid(uuid) => format!("UUID={uuid}").into(),
        }
    }

    /// Returns whether a first field names this source. Paths are compared as paths: `/x//y/` is
    /// `/x/y`.
    fn is_named_by(&self, field: &[u8]) -> bool {
        match self {
            Source::Path(path) => unescape(field) == *path,
            Source::Uuid(_) => field == self.field().as_bytes(),
        }
    }
}

/// Returns the line that mounts `source` at `target`, without a newline.
pub(crate) fn line(source: &Source, target: &Path, options: &str) -> OsString {
    let mut line = source.field();
    line.push(" ");
    line.push(escape(target));
    line.push(format!(" btrfs {options} 0 0"));
    line
}

/// Returns whether fstab has a line that mounts `source` at `target`.
///
/// # Errors
/// [`FstabError::Claimed`] when a line mounts something else at `target`; [`FstabError::Io`],
/// [`FstabError::NotAFile`].
pub(crate) fn is_registered(path: &Path, source: &Source, target: &Path) -> Result<bool, FstabError> {
    find_line(path, &read(path)?, source, target)
}

/// Returns the source of the first fstab line with the mount point `target`, if any.
///
/// # Errors
/// [`FstabError::Io`], [`FstabError::NotAFile`].
pub fn registered_source(path: &Path, target: &Path) -> Result<Option<String>, FstabError> {
    let table = read(path)?;
    let found = entries(&table).find(|(_, at)| unescape(at) == target);
    Ok(found.map(|(source, _)| String::from_utf8_lossy(source).into_owned()))
}

/// Adds the line for `source` at `target` unless it exists; returns whether it was added. Creates
/// fstab if it is missing.
///
/// # Errors
/// [`FstabError::Claimed`] when another line mounts something else at `target`;
/// [`FstabError::NotAFile`] for a device such as `/dev/null`; [`FstabError::Io`]. The file is then
/// unchanged.
pub(crate) fn register(path: &Path, source: &Source, target: &Path, options: &str) -> Result<bool, FstabError> {
    let table = read(path)?;
    if find_line(path, &table, source, target)? {
        return Ok(false);
    }
    let mut added = line(source, target, options);
    added.push("\n");
    if !table.is_empty() && !table.ends_with(b"\n") {
        let mut separated = OsString::from("\n");
        separated.push(added);
        added = separated;
    }
    append(path, added.as_bytes()).map_err(|source| FstabError::Io {
        path: path.to_owned(),
        source,
    })?;
    Ok(true)
}

/// Reads fstab as bytes, because its comments may be in any encoding. Returns no bytes for a
/// missing file.
fn read(path: &Path) -> Result<Vec<u8>, FstabError> {
    let io = |source| FstabError::Io {
        path: path.to_owned(),
        source,
    };
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => fs::read(path).map_err(io),
        Ok(_) => Err(FstabError::NotAFile(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(io(error)),
    }
}

/// Returns the first two fields of each line except comments.
fn entries(table: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    table.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
        let source = fields.next().filter(|field| !field.starts_with(b"#"))?;
        Some((source, fields.next()?))
    })
}

fn find_line(path: &Path, table: &[u8], source: &Source, target: &Path) -> Result<bool, FstabError> {
    for (other, at) in entries(table) {
        if unescape(at) != target {
            continue;
        }
        if source.is_named_by(other) {
            return Ok(true);
        }
        return Err(FstabError::Claimed {
            path: path.to_owned(),
            target: target.to_owned(),
            other: String::from_utf8_lossy(other).into_owned(),
        });
    }
    Ok(false)
}

/// Appends a line in one write. That keeps inode, owner and mode of the file, and after a crash the
/// line is complete or absent.
fn append(path: &Path, line: &[u8]) -> io::Result<()> {
    let mut file = match OpenOptions::new().append(true).create_new(true).open(path) {
        Ok(file) => {
            // A new fstab must be readable for other accounts, whatever the umask. An existing one
            // keeps its mode.
            file.set_permissions(fs::Permissions::from_mode(0o644))?;
            file
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => OpenOptions::new().append(true).open(path)?,
        Err(error) => return Err(error),
    };
    let before = file.metadata()?;
    if !before.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let written = file.write_all(line).and_then(|()| file.sync_all());
    if written.is_err() {
        // A partial line could describe another mount.
        file.set_len(before.len())?;
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(path: &str) -> Source {
        Source::Path(path.into())
    }

    #[test]
    fn the_line_is_added_once_and_nothing_else_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fstab");
        // A comment in Latin-1, as older editors write it.
        fs::write(&path, b"# f\xfcr /\n/dev/sda1 / ext4 defaults 0 1").unwrap();
        let (image, target) = (image("/srv/pool image"), Path::new("/srv/pool"));
        assert!(register(&path, &image, target, IMAGE_OPTIONS).unwrap());
        assert!(!register(&path, &image, target, IMAGE_OPTIONS).unwrap());
        assert_eq!(
            fs::read(&path).unwrap(),
            b"# f\xfcr /\n/dev/sda1 / ext4 defaults 0 1\n\
              /srv/pool\\040image /srv/pool btrfs loop,nofail,noatime,discard=async 0 0\n"
        );
    }

    #[test]
    fn a_mount_point_in_use_is_not_registered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fstab");
        fs::write(&path, "/dev/sdb1 /srv/pool xfs defaults 0 0\n").unwrap();
        let error = register(&path, &image("/srv/pool.img"), Path::new("/srv/pool"), IMAGE_OPTIONS).unwrap_err();
        assert!(
            error.to_string().contains("already the mount point of /dev/sdb1"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
    }

    #[test]
    fn different_spellings_of_a_path_are_one_mount() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fstab");
        let registered =
            |source: &str, target: &str| register(&path, &image(source), Path::new(target), IMAGE_OPTIONS).unwrap();
        assert!(registered("/srv/pool.img", "/srv/pool"));
        assert!(!registered("/srv//pool.img", "/srv/pool/"));
        assert!(!registered("/srv/./pool.img", "/srv//pool"));
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
    }

    #[test]
    fn only_regular_files_change_and_keep_their_mode() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("null");
        // A separate device node, so that a failure does not change the machine's.
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &device,
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::from_raw_mode(0o666),
            rustix::fs::makedev(1, 3),
        )
        .unwrap();
        fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).unwrap();
        let added = |path: &Path| register(path, &image("/srv/pool.img"), Path::new("/srv/pool"), IMAGE_OPTIONS);
        assert!(matches!(added(&device), Err(FstabError::NotAFile(_))));
        assert!(matches!(added(folder.path()), Err(FstabError::NotAFile(_))));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&device), 0o666);

        let kept = folder.path().join("kept");
        fs::write(&kept, "").unwrap();
        fs::set_permissions(&kept, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(added(&kept).unwrap());
        assert_eq!(mode(&kept), 0o600, "an existing empty file keeps its mode");
        let made = folder.path().join("made");
        assert!(added(&made).unwrap());
        assert_eq!(mode(&made), 0o644);
    }
}
