//! The backing of a pool: an image, a block device, or an existing file system.

use crate::error::StorageError;
use rustix::fs::{FileType, stat};
use scalebox_mounts::Mount;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The configured backing of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// A sparse image file on a loop device. If the operator mounted another file system at the
    /// pool's folder, that one is used.
    Image(PathBuf),
    /// A whole block device.
    Device(PathBuf),
    /// The existing file system of the pool's folder. The pool does not control its size.
    Existing,
}

/// The backing of a mounted pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ActualBacking {
    /// An image; its size is the size of the pool.
    Image(PathBuf),
    /// A block device used by the pool only.
    Device(PathBuf),
    /// An existing file system that the pool does not resize, and that may hold other data.
    Existing,
}

/// A folder that is or can become a pool.
#[derive(Debug)]
pub(crate) struct PoolLocation {
    pub(crate) backing: ActualBacking,
    /// The mount source.
    pub(crate) device: PathBuf,
    pub(crate) kind: FsKind,
    /// `true` if the pool's folder is itself a mount point, not a folder inside a mounted file
    /// system.
    pub(crate) is_mount_point: bool,
}

/// The file systems that can clone files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FsKind {
    Btrfs,
    Xfs,
}

impl FsKind {
    fn of(mount: &Mount, at: &Path) -> Result<FsKind, StorageError> {
        match mount.fs_type.as_str() {
            "btrfs" => Ok(FsKind::Btrfs),
            "xfs" => Ok(FsKind::Xfs),
            other => Err(StorageError::NotAPool {
                path: at.to_owned(),
                fs_type: other.to_owned(),
            }),
        }
    }

    /// Returns the kernel's name of the file system.
    pub(crate) fn name(self) -> &'static str {
        match self {
            FsKind::Btrfs => "btrfs",
            FsKind::Xfs => "xfs",
        }
    }
}

/// Finds the pool at `data_dir` with the configured `backing`; `None` if it has to be created or
/// mounted first.
///
/// # Errors
/// [`StorageError::NotAPool`] when the file system there cannot clone files,
/// [`StorageError::OtherDevice`].
pub(crate) fn find(data_dir: &Path, backing: &Backing) -> Result<Option<PoolLocation>, StorageError> {
    let look_up = |error| StorageError::io("look up", data_dir.display(), error);
    if let Some(mount) = scalebox_mounts::mounted_at(data_dir).map_err(look_up)? {
        let kind = FsKind::of(&mount, data_dir)?;
        let backing = match backing {
            Backing::Device(device) if same_device(device, &mount.source) => ActualBacking::Device(device.clone()),
            Backing::Device(device) => {
                return Err(StorageError::OtherDevice {
                    path: data_dir.to_owned(),
                    device: device.clone(),
                    found: mount.source,
                });
            }
            Backing::Image(_) => match (kind, backing_file(&mount)?) {
                (FsKind::Btrfs, Some(image)) => ActualBacking::Image(image),
                _ => ActualBacking::Existing,
            },
            Backing::Existing => ActualBacking::Existing,
        };
        return Ok(Some(PoolLocation {
            backing,
            device: mount.source,
            kind,
            is_mount_point: true,
        }));
    }
    if *backing != Backing::Existing {
        return Ok(None);
    }
    let Some(mount) = scalebox_mounts::holding(data_dir).map_err(look_up)? else {
        return Ok(None);
    };
    Ok(Some(PoolLocation {
        backing: ActualBacking::Existing,
        kind: FsKind::of(&mount, data_dir)?,
        device: mount.source,
        is_mount_point: false,
    }))
}

/// Returns the backing file of the loop device a pool is mounted from; `None` for any other device.
pub(crate) fn backing_file(mount: &Mount) -> Result<Option<PathBuf>, StorageError> {
    let Some(name) = mount
        .source
        .file_name()
        .filter(|name| name.as_encoded_bytes().starts_with(b"loop"))
    else {
        return Ok(None);
    };
    let attribute = Path::new("/sys/block").join(name).join("loop/backing_file");
    match fs::read(&attribute) {
        Ok(path) => {
            let path = path.strip_suffix(b"\n").unwrap_or(&path);
            Ok(Some(PathBuf::from(OsStr::from_bytes(path))))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StorageError::io("read", attribute.display(), error)),
    }
}

/// Returns whether two paths name the same block device: `/dev/disk/by-id/…` is a link, and device
/// nodes can be anywhere.
fn same_device(one: &Path, other: &Path) -> bool {
    let device = |path: &Path| {
        let stat = stat(path).ok()?;
        (FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice).then_some(stat.st_rdev)
    };
    device(one).is_some_and(|number| Some(number) == device(other))
}
