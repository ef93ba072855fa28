//! What a pool lies on: an image of its own, a device of its own, or a file system that somebody
//! else made.

use crate::btrfs::{self, PendingWrites};
use crate::error::StorageError;
use crate::mounts::{self, MountEntry};
use crate::quota::Quota;
use rustix::fs::{FileType, stat};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What the operator wants the pool to lie on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// A sparse image file, on a loop device. A file system that the operator mounted at the pool's
    /// place all the same is taken as it is.
    Image(PathBuf),
    /// A whole block device.
    Device(PathBuf),
    /// The file system that the pool's folder lies on already. Its size is not the pool's affair.
    Given,
}

/// What a mounted pool lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ground {
    /// This image; its size is the pool's.
    Image(PathBuf),
    /// A device that is the pool's alone.
    Device(PathBuf),
    /// A file system that is not the pool's to size, and may hold other things.
    Given,
}

/// A place where a pool is, or can be.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) ground: Ground,
    /// What it is mounted from.
    pub(crate) device: PathBuf,
    pub(crate) kind: Kind,
    /// Whether the pool's folder is a mount point, and not a folder on a file system that is
    /// mounted elsewhere.
    pub(crate) is_mount_point: bool,
}

/// The file systems that can clone files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Btrfs,
    Xfs,
}

impl Kind {
    fn of(mount: &MountEntry, at: &Path) -> Result<Kind, StorageError> {
        match mount.fs_type.as_str() {
            "btrfs" => Ok(Kind::Btrfs),
            "xfs" => Ok(Kind::Xfs),
            other => Err(StorageError::NotAPool {
                path: at.to_owned(),
                fs_type: other.to_owned(),
            }),
        }
    }

    /// As the kernel calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Btrfs => "btrfs",
            Kind::Xfs => "xfs",
        }
    }
}

/// The pool's file system: what of it differs by kind.
#[derive(Debug)]
pub(crate) enum FileSystem {
    /// With the counters of what it has taken and not yet accounted for, and the quotas that the
    /// pool's folder counts in.
    Btrfs(PendingWrites, Quota),
    Xfs,
}

impl FileSystem {
    pub(crate) fn open(kind: Kind, dir: &File) -> io::Result<FileSystem> {
        match kind {
            Kind::Btrfs => {
                let quota = Quota::of(dir)?.ok_or_else(|| io::Error::other("it is not a btrfs any more"))?;
                Ok(FileSystem::Btrfs(PendingWrites::open(dir)?, quota))
            }
            Kind::Xfs => Ok(FileSystem::Xfs),
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match self {
            FileSystem::Btrfs(..) => Kind::Btrfs,
            FileSystem::Xfs => Kind::Xfs,
        }
    }

    /// Whether the flush of a new file covers its name.
    pub(crate) fn fsync_keeps_name(&self) -> bool {
        matches!(self, FileSystem::Btrfs(..))
    }

    /// Makes what was freed writable. btrfs does so when it commits its transaction; XFS at once.
    pub(crate) fn commit(&self, dir: &File) -> rustix::io::Result<()> {
        match self {
            FileSystem::Btrfs(..) => btrfs::commit(dir),
            FileSystem::Xfs => Ok(()),
        }
    }

    /// Frees the blocks of a file that has no name any more. XFS frees those of one that is merely
    /// closed later, in the background.
    pub(crate) fn free(&self, file: File) -> io::Result<()> {
        match self {
            FileSystem::Btrfs(..) => Ok(()),
            FileSystem::Xfs => file.set_len(0),
        }
    }
}

/// The place for a pool at `data_dir`, as `backing` wants it; `None` where it has to be made first.
///
/// # Errors
/// [`StorageError::NotAPool`] when what is there cannot clone files, [`StorageError::OtherDevice`].
pub(crate) fn find(data_dir: &Path, backing: &Backing) -> Result<Option<Place>, StorageError> {
    let look_up = |error| StorageError::io("look up", data_dir.display(), error);
    if let Some(mount) = mounts::mounted_at(data_dir).map_err(look_up)? {
        let kind = Kind::of(&mount, data_dir)?;
        let ground = match backing {
            Backing::Device(device) if same_device(device, &mount.source) => Ground::Device(device.clone()),
            Backing::Device(device) => {
                return Err(StorageError::OtherDevice {
                    path: data_dir.to_owned(),
                    device: device.clone(),
                    found: mount.source,
                });
            }
            Backing::Image(_) => match (kind, backing_file(&mount)?) {
                (Kind::Btrfs, Some(image)) => Ground::Image(image),
                _ => Ground::Given,
            },
            Backing::Given => Ground::Given,
        };
        return Ok(Some(Place {
            ground,
            device: mount.source,
            kind,
            is_mount_point: true,
        }));
    }
    if *backing != Backing::Given {
        return Ok(None);
    }
    let Some(mount) = mounts::holding(data_dir).map_err(look_up)? else {
        return Ok(None);
    };
    Ok(Some(Place {
        ground: Ground::Given,
        kind: Kind::of(&mount, data_dir)?,
        device: mount.source,
        is_mount_point: false,
    }))
}

/// The backing file of the loop device a pool is mounted from; `None` for any other device.
pub(crate) fn backing_file(mount: &MountEntry) -> Result<Option<PathBuf>, StorageError> {
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

/// Whether two names are of one block device: `/dev/disk/by-id/…` is a link, and nodes may be made
/// anywhere.
fn same_device(one: &Path, other: &Path) -> bool {
    let device = |path: &Path| {
        let stat = stat(path).ok()?;
        (FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice).then_some(stat.st_rdev)
    };
    device(one).is_some_and(|number| Some(number) == device(other))
}
