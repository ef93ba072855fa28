//! `pool init`: the pool image, its file system, its mount and its folders.
//!
//! Every step looks at what is there before it does anything, so a run that was interrupted is finished by the next, and a
//! run on a finished pool changes nothing. The image is made under another name and renamed when its file system stands:
//! what lies at `POOL_IMAGE` is whole, or not ours, and is never formatted.

use crate::command::{self, Program};
use crate::error::StorageError;
use crate::files;
use crate::fstab::{self, MOUNT_OPTIONS};
use crate::mounts::{self, MountEntry};
use crate::size::{Bytes, Gib};
use crate::sizing::{PoolSize, RequestedSize, pool_size};
use crate::space;
use rustix::fs::{FlockOperation, flock};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Where a pool is to be and how large.
#[derive(Debug, Clone)]
pub struct PoolPlan {
    /// The mount point (`DATA_DIR`).
    pub data_dir: PathBuf,
    /// The backing image (`POOL_IMAGE`).
    pub image: PathBuf,
    /// The table to register the mount in (`FSTAB`).
    pub fstab: PathBuf,
    /// The size the operator asked for (`STORAGE_SIZE`); `None` takes 80 % of what is free.
    pub size: Option<RequestedSize>,
    /// Space that admission leaves free (`STORAGE_BUFFER_GIB`), for the warning about a pool larger than its host disk.
    pub buffer: Gib,
}

/// What `pool init` tells the person who runs it, as it happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InitEvent {
    /// A line on what is being done, in the words of the seed where it has some.
    Step(String),
    /// Something the operator should know, though the pool works.
    Warning(String),
}

/// What a run of `pool init` did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitOutcome {
    /// The pool was there, whole and mounted: nothing was changed.
    AlreadyThere,
    /// The pool was made, or what an interrupted run left undone was finished.
    Ready,
}

/// The folders of a pool, and whether files in them are overwritten in place. Clones of an overwritten-in-place file must lie in
/// such a folder too, so it is set before the first file.
const FOLDERS: [(&str, bool); 3] = [("templates", true), ("vms", true), ("kernel", false)];

/// Makes the pool of `plan` unless it is there, and mounts it. Blocks for a few seconds.
///
/// # Errors
/// [`StorageError::TooLittleSpace`], [`StorageError::ForeignImage`], [`StorageError::NotEmpty`], [`StorageError::Busy`] and the failures of the
/// programs it calls; each leaves what was there before as it was.
pub fn init(plan: &PoolPlan, tell: &mut dyn FnMut(InitEvent)) -> Result<InitOutcome, StorageError> {
    let _lock = lock_beside(&plan.image)?;
    let was_mounted = match mounted_pool(&plan.data_dir)? {
        Some(mount) => {
            tell(InitEvent::Step(format!(
                "Storage already mounted at {}",
                plan.data_dir.display()
            )));
            use_direct_io(&mount, tell);
            true
        }
        None => {
            tell(InitEvent::Step("Setting up btrfs storage...".to_owned()));
            make_dir(&plan.data_dir)?;
            require_empty(&plan.data_dir)?;
            require_not_mounted_elsewhere(&plan.image)?;
            ensure_image(plan, tell)?;
            mount(plan, tell)?;
            false
        }
    };
    let mut changed = !was_mounted;
    if lies_on_image(plan)? && fstab::register(&plan.fstab, &plan.image, &plan.data_dir)? {
        tell(InitEvent::Step(format!(
            "Registered {} in {}",
            plan.data_dir.display(),
            plan.fstab.display()
        )));
        changed = true;
    }
    changed |= ensure_folders(&plan.data_dir, tell)?;
    Ok(if changed {
        InitOutcome::Ready
    } else {
        InitOutcome::AlreadyThere
    })
}

/// Unmounts the pool; its loop device goes with it. The image and the line in the table of mounts stay. Returns whether it was
/// mounted.
///
/// # Errors
/// [`StorageError::Command`] when it is in use.
pub fn unmount(data_dir: &Path) -> Result<bool, StorageError> {
    if mounted_pool(data_dir)?.is_none() {
        return Ok(false);
    }
    command::run(Program::Umount, [data_dir])?;
    Ok(true)
}

/// Turns direct I/O on for the pool's loop device, as `pool init` does; a mount from the table of mounts comes without it.
pub fn ensure_direct_io(data_dir: &Path, tell: &mut dyn FnMut(InitEvent)) -> Result<(), StorageError> {
    if let Some(mount) = mounted_pool(data_dir)? {
        use_direct_io(&mount, tell);
    }
    Ok(())
}

/// The pool mounted at `data_dir`, if something is; an error if that is not btrfs.
pub(crate) fn mounted_pool(data_dir: &Path) -> Result<Option<MountEntry>, StorageError> {
    let mount = mounts::mounted_at(data_dir).map_err(|error| StorageError::io("look up", data_dir.display(), error))?;
    match mount {
        Some(mount) if mount.fs_type != "btrfs" => Err(StorageError::NotAPool {
            path: data_dir.to_owned(),
            fs_type: mount.fs_type,
        }),
        other => Ok(other),
    }
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
    match fs::read_to_string(&attribute) {
        Ok(path) => Ok(Some(PathBuf::from(path.trim_end_matches('\n')))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StorageError::io("read", attribute.display(), error)),
    }
}

/// Two runs at once would make the image twice: a lock on the folder it lies in, which leaves no file behind.
fn lock_beside(image: &Path) -> Result<File, StorageError> {
    let folder = parent(image)?;
    make_dir(folder)?;
    let dir = File::open(folder).map_err(|error| StorageError::io("open", folder.display(), error))?;
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(dir),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StorageError::Busy(image.to_owned())),
        Err(errno) => Err(StorageError::io("lock", folder.display(), errno.into())),
    }
}

fn parent(path: &Path) -> Result<&Path, StorageError> {
    match path.parent() {
        Some(parent) if path.is_absolute() => Ok(parent),
        _ => Err(StorageError::io(
            "use",
            path.display(),
            io::Error::other("the path must be absolute and name a file"),
        )),
    }
}

fn make_dir(dir: &Path) -> Result<(), StorageError> {
    fs::create_dir_all(dir).map_err(|error| StorageError::io("create", dir.display(), error))
}

fn require_empty(dir: &Path) -> Result<(), StorageError> {
    let mut entries = fs::read_dir(dir).map_err(|error| StorageError::io("read", dir.display(), error))?;
    match entries.next() {
        None => Ok(()),
        Some(_) => Err(StorageError::NotEmpty(dir.to_owned())),
    }
}

/// One pool at two places would be two sets of books over the same disks.
fn require_not_mounted_elsewhere(image: &Path) -> Result<(), StorageError> {
    let image = image.canonicalize().unwrap_or_else(|_| image.to_owned());
    let mounts = mounts::all().map_err(|error| StorageError::io("read", "the table of mounts", error))?;
    for mount in mounts {
        if backing_file(&mount)?.is_some_and(|backing| backing == image) {
            return Err(StorageError::MountedElsewhere {
                image,
                at: mount.target,
            });
        }
    }
    Ok(())
}

fn ensure_image(plan: &PoolPlan, tell: &mut dyn FnMut(InitEvent)) -> Result<(), StorageError> {
    match image_content(&plan.image)? {
        ImageContent::Pool => {
            let found = format!("Found the pool image {}, keeping what is in it", plan.image.display());
            tell(InitEvent::Step(found));
            return Ok(());
        }
        ImageContent::Other(found) => {
            return Err(StorageError::ForeignImage {
                path: plan.image.clone(),
                found,
            });
        }
        ImageContent::Hole => {
            tell(InitEvent::Step(format!(
                "Removing the empty image {} of an interrupted run",
                plan.image.display()
            )));
            remove(&plan.image)?;
        }
        ImageContent::Absent => {}
    }
    let available = space::available(parent(&plan.image)?)?;
    let size = pool_size(available, plan.size.as_ref())?;
    tell(InitEvent::Step(format!(
        "Creating {size} btrfs storage pool ({}GB available on host)...",
        available.floor_gib()
    )));
    if size.bytes > available {
        tell(InitEvent::Warning(larger_than_host(&size, available, plan.buffer)));
    }
    create_image(&plan.image, size.bytes)
}

fn larger_than_host(size: &PoolSize, available: Bytes, buffer: Gib) -> String {
    let usable = (available - buffer.bytes()).floor_gib();
    format!(
        "The pool ({size}) is larger than what its host disk has free ({}GB): it is created sparse, and creations will be refused \
         once about {usable}GB are written to it, or earlier if something else fills the host disk.",
        available.floor_gib()
    )
}

enum ImageContent {
    Absent,
    /// A file without a single block: a run was interrupted between making the file and formatting it.
    Hole,
    Pool,
    Other(String),
}

fn image_content(image: &Path) -> Result<ImageContent, StorageError> {
    match fs::symlink_metadata(image) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ImageContent::Absent),
        Err(error) => return Err(StorageError::io("look at", image.display(), error)),
        Ok(meta) if !meta.is_file() => return Ok(ImageContent::Other("something that is not a plain file".to_owned())),
        Ok(_) => {}
    }
    Ok(match probe(image)? {
        Some(kind) if kind == "btrfs" => ImageContent::Pool,
        Some(kind) => ImageContent::Other(kind),
        None if space::allocated(image)? == Bytes::ZERO => ImageContent::Hole,
        None => ImageContent::Other("data without a file system".to_owned()),
    })
}

/// What a file holds, by its signatures: the type of a file system, or of a partition table.
pub(crate) fn probe(path: &Path) -> Result<Option<String>, StorageError> {
    // Exit code 2: no signature was found; 8: several that contradict each other.
    let args = ["-p", "-o", "export", "--"].map(OsStr::new);
    let (code, output) = command::run_accepting(Program::Blkid, args.into_iter().chain([path.as_os_str()]), |code| {
        matches!(code, 0 | 2 | 8)
    })?;
    if code == 8 {
        return Ok(Some("several file systems at once".to_owned()));
    }
    let value = |key: &str| {
        output
            .lines()
            .find_map(|line| line.strip_prefix(key).map(str::to_owned))
    };
    Ok(value("TYPE=").or_else(|| value("PTTYPE=").map(|table| format!("a {table} partition table"))))
}

fn create_image(image: &Path, size: Bytes) -> Result<(), StorageError> {
    let mut partial = image.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    // Under the lock, only an interrupted run can have left it.
    remove(&partial)?;
    let made = format_image(&partial, size).and_then(|()| {
        files::rename_new(&partial, image).map_err(|error| StorageError::io("create", image.display(), error))
    });
    if made.is_err() {
        files::discard(&partial);
    }
    made?;
    files::sync_dir(parent(image)?)
}

fn format_image(partial: &Path, size: Bytes) -> Result<(), StorageError> {
    let file = files::create_new(partial)?;
    file.set_len(size.as_u64())
        .map_err(|error| StorageError::io("make", format!("an image of {size}"), error))?;
    let args = [
        "--quiet",
        "--label",
        "scalebox",
        "--data",
        "single",
        "--metadata",
        "dup",
    ]
    .map(OsStr::new);
    command::run(Program::MkfsBtrfs, args.into_iter().chain([partial.as_os_str()]))?;
    file.sync_all()
        .map_err(|error| StorageError::io("flush", partial.display(), error))
}

fn remove(path: &Path) -> Result<(), StorageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StorageError::io("remove", path.display(), error)),
        _ => Ok(()),
    }
}

/// Mounts by `mount -o loop`, as a reboot does: the loop device then goes with the mount, however that ends.
fn mount(plan: &PoolPlan, tell: &mut dyn FnMut(InitEvent)) -> Result<(), StorageError> {
    let options = ["-t", "btrfs", "-o", MOUNT_OPTIONS].map(OsStr::new);
    command::run(
        Program::Mount,
        options
            .into_iter()
            .chain([plan.image.as_os_str(), plan.data_dir.as_os_str()]),
    )?;
    if let Some(mount) = mounted_pool(&plan.data_dir)? {
        use_direct_io(&mount, tell);
    }
    Ok(())
}

/// Without direct I/O, every block a guest writes is cached twice, and the writes of all guests go through one page cache.
fn use_direct_io(mount: &MountEntry, tell: &mut dyn FnMut(InitEvent)) {
    let Some(name) = mount.source.file_name() else { return };
    let state = fs::read_to_string(Path::new("/sys/block").join(name).join("loop/dio"));
    if state.is_ok_and(|state| state.trim() == "0")
        && let Err(error) = command::run(
            Program::Losetup,
            [OsStr::new("--direct-io=on"), mount.source.as_os_str()],
        )
    {
        let warning = format!("The host disk takes no direct I/O, so the pool is slower than it could be: {error}");
        tell(InitEvent::Warning(warning));
    }
}

/// Whether the pool that is mounted lies on the plan's image, and not on a device or an image of another name.
fn lies_on_image(plan: &PoolPlan) -> Result<bool, StorageError> {
    let Some(mount) = mounted_pool(&plan.data_dir)? else {
        return Ok(false);
    };
    Ok(backing_file(&mount)?
        .is_some_and(|backing| backing == plan.image || plan.image.canonicalize().is_ok_and(|i| i == backing)))
}

fn ensure_folders(data_dir: &Path, tell: &mut dyn FnMut(InitEvent)) -> Result<bool, StorageError> {
    let mut changed = false;
    for (name, in_place) in FOLDERS {
        let folder = data_dir.join(name);
        match DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => changed = true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(StorageError::io("create", folder.display(), error)),
        }
        if !in_place {
            continue;
        }
        let newly_set =
            files::set_nocow(&folder).map_err(|error| StorageError::io("set NOCOW on", folder.display(), error))?;
        changed |= newly_set;
        if newly_set && require_empty(&folder).is_err() {
            tell(InitEvent::Warning(format!(
                "{} held files before it was set to NOCOW: they keep their slower way of writing, and cannot be cloned into new disks \
                 until they are copied",
                folder.display()
            )));
        }
    }
    if changed {
        files::sync_dir(data_dir)?;
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_warning_says_from_where_on_creations_are_refused() {
        let size = pool_size(Gib::new(60).bytes(), Some(&"100G".parse().unwrap())).unwrap();
        let warning = larger_than_host(&size, Gib::new(60).bytes(), Gib::new(2));
        assert!(
            warning.contains("(100G)") && warning.contains("(60GB)") && warning.contains("about 58GB"),
            "{warning}"
        );
    }
}
