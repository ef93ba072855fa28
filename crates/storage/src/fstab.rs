//! The line in `FSTAB` that brings the pool back after a reboot.

use crate::mounts::escape;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The mount options of a pool on an image. `loop` makes the loop device; `nofail` lets a host boot whose pool is gone; `noatime` saves a write
/// for each read; `discard=async` hands freed blocks on to the host disk.
pub(crate) const IMAGE_OPTIONS: &str = "loop,nofail,noatime,discard=async";
/// Those of a pool on a device.
pub(crate) const DEVICE_OPTIONS: &str = "nofail,noatime,discard=async";

/// Why the mount was not registered.
#[derive(Debug, thiserror::Error)]
pub enum FstabError {
    /// Reading or writing failed.
    #[error("cannot register the pool in {}: {source}", path.display())]
    Io {
        /// The table.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another line claims the mount point.
    #[error(
        "{}: {} is already the mount point of {other}; remove that line or set DATA_DIR to another folder",
        path.display(), target.display()
    )]
    Claimed {
        /// The table.
        path: PathBuf,
        /// The mount point.
        target: PathBuf,
        /// What the line mounts there.
        other: String,
    },
}

/// A path as it stands in the table.
pub(crate) fn escape_path(path: &Path) -> String {
    escape(path)
}

/// Adds the line for `source` (a path as [`escape_path`] gives it, or `UUID=…`) at `target` unless it is there; returns whether it was added.
/// A missing table is made.
///
/// # Errors
/// [`FstabError::Claimed`] when another line mounts something else at `target`.
pub(crate) fn register(path: &Path, source: &str, target: &Path, options: &str) -> Result<bool, FstabError> {
    let io = |source| FstabError::Io {
        path: path.to_owned(),
        source,
    };
    let table = match fs::read_to_string(path) {
        Ok(table) => table,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(io(error)),
    };
    let target_field = escape(target);
    for line in table.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let mut fields = line.split_whitespace();
        let (other, at) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        if other == source && at == target_field {
            return Ok(false);
        }
        if at == target_field {
            return Err(FstabError::Claimed {
                path: path.to_owned(),
                target: target.to_owned(),
                other: other.to_owned(),
            });
        }
    }
    // One short append keeps the table's inode, owner and mode, and is whole or absent after a crash.
    let newline = if table.is_empty() || table.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    let line = format!("{newline}{source} {target_field} btrfs {options} 0 0\n");
    let mut file = OpenOptions::new().append(true).create(true).open(path).map_err(io)?;
    if table.is_empty() {
        // A new table is read by programs that are not root, whatever the umask of this one is.
        file.set_permissions(fs::Permissions::from_mode(0o644)).map_err(io)?;
    }
    file.write_all(line.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(io)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_added_once_and_nothing_else_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fstab");
        fs::write(&path, "# comment\n/dev/sda1 / ext4 defaults 0 1").unwrap();
        let (image, target) = (escape_path(Path::new("/srv/pool image")), Path::new("/srv/pool"));
        assert!(register(&path, &image, target, IMAGE_OPTIONS).unwrap());
        assert!(!register(&path, &image, target, IMAGE_OPTIONS).unwrap());
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "# comment\n/dev/sda1 / ext4 defaults 0 1\n/srv/pool\\040image /srv/pool btrfs loop,nofail,noatime,discard=async 0 0\n"
        );
    }

    #[test]
    fn a_mount_point_that_is_taken_is_not_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fstab");
        fs::write(&path, "/dev/sdb1 /srv/pool xfs defaults 0 0\n").unwrap();
        let error = register(&path, "/srv/pool.img", Path::new("/srv/pool"), IMAGE_OPTIONS).unwrap_err();
        assert!(
            error.to_string().contains("already the mount point of /dev/sdb1"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
    }
}
