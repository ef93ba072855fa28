//! `pool init`: what the pool lies on, its mount and its folders.
//!
//! Every step looks at what is there before it does anything, so a run that was interrupted is finished by the next, and a
//! run on a finished pool changes nothing. An image is made under another name and renamed when its file system stands:
//! what lies at `POOL_IMAGE` is whole, or not ours, and is never formatted. Neither is a device on which anything is found. A file
//! system that is there already is taken as it is.

use crate::btrfs;
use crate::command::{self, Program};
use crate::error::StorageError;
use crate::files;
use crate::fstab::{self, DEVICE_OPTIONS, IMAGE_OPTIONS};
use crate::ground::{self, Backing, Ground, Kind, Place};
use crate::mounts;
use crate::signature::{Signature, probe};
use crate::size::{Bytes, Gib};
use crate::sizing::{PoolSize, RequestedSize, SMALLEST, pool_size};
use crate::space;
use rustix::fs::{FlockOperation, flock};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// Where a pool is to be and how large.
#[derive(Debug, Clone)]
pub struct PoolPlan {
    /// The mount point (`DATA_DIR`).
    pub data_dir: PathBuf,
    /// What the pool is to lie on (`POOL_IMAGE`, `POOL_DEVICE`).
    pub backing: Backing,
    /// The table to register the mount in (`FSTAB`).
    pub fstab: PathBuf,
    /// The size the operator asked for (`STORAGE_SIZE`); `None` takes 80 % of what is free, or the whole device.
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

/// The label of the file systems that are made here.
const LABEL: &str = "scalebox";

/// Makes the pool of `plan` unless it is there, and mounts it. Blocks for a few seconds.
///
/// # Errors
/// [`StorageError::TooLittleSpace`], [`StorageError::ForeignImage`], [`StorageError::UnfitDevice`], [`StorageError::OtherDevice`],
/// [`StorageError::NotAPool`], [`StorageError::NotEmpty`], [`StorageError::OtherFolder`], [`StorageError::Busy`] and the failures of the programs it
/// calls; each leaves what was there before as it was.
pub fn init(plan: &PoolPlan, tell: &mut dyn FnMut(InitEvent)) -> Result<InitOutcome, StorageError> {
    let beside = match &plan.backing {
        Backing::Image(image) => image,
        Backing::Device(_) | Backing::Given => &plan.data_dir,
    };
    let _lock = lock_beside(beside)?;
    let (place, made) = match ground::find(&plan.data_dir, &plan.backing)? {
        Some(place) => {
            tell(InitEvent::Step(found_there(plan, &place)));
            (place, false)
        }
        None => (make(plan, tell)?, true),
    };
    if place.ground == Ground::Given {
        require_pool_or_room(&plan.data_dir, &place)?;
    }
    use_direct_io(&place, tell);
    let mut changed = made | register(plan, &place, tell)?;
    changed |= ensure_folders(&plan.data_dir, place.kind, tell)?;
    Ok(if changed {
        InitOutcome::Ready
    } else {
        InitOutcome::AlreadyThere
    })
}

fn found_there(plan: &PoolPlan, place: &Place) -> String {
    let at = plan.data_dir.display();
    if place.is_mount_point {
        format!("Storage already mounted at {at}")
    } else {
        format!("Using the {} file system that {at} lies on", place.kind.name())
    }
}

/// What `pool init` does where nothing is mounted yet.
fn make(plan: &PoolPlan, tell: &mut dyn FnMut(InitEvent)) -> Result<Place, StorageError> {
    match &plan.backing {
        Backing::Image(image) => {
            tell(InitEvent::Step("Setting up btrfs storage...".to_owned()));
            make_dir(&plan.data_dir)?;
            require_empty(&plan.data_dir)?;
            require_not_mounted_elsewhere(image)?;
            ensure_image(plan, image, tell)?;
            mount(image, &plan.data_dir, IMAGE_OPTIONS)?;
        }
        Backing::Device(device) => {
            tell(InitEvent::Step("Setting up btrfs storage...".to_owned()));
            make_dir(&plan.data_dir)?;
            require_empty(&plan.data_dir)?;
            ensure_device(plan, device, tell)?;
            mount(device, &plan.data_dir, DEVICE_OPTIONS)?;
        }
        Backing::Given => make_dir(&plan.data_dir)?,
    }
    let place = ground::find(&plan.data_dir, &plan.backing)?;
    place.ok_or_else(|| StorageError::NotMounted(plan.data_dir.clone()))
}

/// A file system that was there before must be able to clone, and a folder on it must not be somebody else's.
fn require_pool_or_room(data_dir: &Path, place: &Place) -> Result<(), StorageError> {
    files::require_reflink(data_dir, data_dir)?;
    let is_pool = FOLDERS.iter().all(|(name, _)| data_dir.join(name).is_dir());
    if place.is_mount_point || is_pool || only_ours_in(data_dir)? {
        return Ok(());
    }
    Err(StorageError::OtherFolder(data_dir.to_owned()))
}

/// Whether a folder holds nothing but what an interrupted run of `pool init` may have made.
fn only_ours_in(dir: &Path) -> Result<bool, StorageError> {
    let failed = |error| StorageError::io("read", dir.display(), error);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if !FOLDERS.iter().any(|(ours, _)| name == *ours) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Enters a pool that is mounted from its own image or device in the table of mounts. Returns whether it was not in there.
fn register(plan: &PoolPlan, place: &Place, tell: &mut dyn FnMut(InitEvent)) -> Result<bool, StorageError> {
    let (source, options) = match (&place.ground, &plan.backing) {
        // Only the image that is asked for: one of another name was mounted by somebody else.
        (Ground::Image(image), Backing::Image(wanted)) if is_same_file(image, wanted) => {
            (fstab::escape_path(wanted), IMAGE_OPTIONS)
        }
        // Devices change their names from boot to boot.
        (Ground::Device(device), _) => match probe(device)?.and_then(|found| found.uuid) {
            Some(uuid) => (format!("UUID={uuid}"), DEVICE_OPTIONS),
            None => (fstab::escape_path(device), DEVICE_OPTIONS),
        },
        _ => return Ok(false),
    };
    let added = fstab::register(&plan.fstab, &source, &plan.data_dir, options)?;
    if added {
        tell(InitEvent::Step(format!(
            "Registered {} in {}",
            plan.data_dir.display(),
            plan.fstab.display()
        )));
    }
    Ok(added)
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    one == other || other.canonicalize().is_ok_and(|other| other == one)
}

/// Unmounts a pool that is mounted from its own image or device; a loop device goes with it. Image, device and the line in the table of mounts
/// stay, and so does a file system that was there before the pool. Returns whether it was mounted.
///
/// # Errors
/// [`StorageError::Command`] when it is in use.
pub fn unmount(data_dir: &Path, backing: &Backing) -> Result<bool, StorageError> {
    match ground::find(data_dir, backing)? {
        Some(place) if place.ground != Ground::Given => {
            command::run(Program::Umount, [data_dir])?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Turns direct I/O on for the pool's loop device, as `pool init` does; a mount from the table of mounts comes without it.
pub fn ensure_direct_io(
    data_dir: &Path,
    backing: &Backing,
    tell: &mut dyn FnMut(InitEvent),
) -> Result<(), StorageError> {
    if let Some(place) = ground::find(data_dir, backing)? {
        use_direct_io(&place, tell);
    }
    Ok(())
}

/// Two runs at once would make the pool twice: a lock on the folder that its image or its mount point lies in, which leaves no file behind.
fn lock_beside(path: &Path) -> Result<File, StorageError> {
    let folder = parent(path)?;
    make_dir(folder)?;
    let dir = File::open(folder).map_err(|error| StorageError::io("open", folder.display(), error))?;
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(dir),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StorageError::Busy(path.to_owned())),
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
        if ground::backing_file(&mount)?.is_some_and(|backing| backing == image) {
            return Err(StorageError::MountedElsewhere {
                image,
                at: mount.target,
            });
        }
    }
    Ok(())
}

fn ensure_image(plan: &PoolPlan, image: &Path, tell: &mut dyn FnMut(InitEvent)) -> Result<(), StorageError> {
    match image_content(image)? {
        ImageContent::Pool => {
            let found = format!("Found the pool image {}, keeping what is in it", image.display());
            tell(InitEvent::Step(found));
            return Ok(());
        }
        ImageContent::Other(found) => {
            return Err(StorageError::ForeignImage {
                path: image.to_owned(),
                found,
            });
        }
        ImageContent::Hole => {
            tell(InitEvent::Step(format!(
                "Removing the empty image {} of an interrupted run",
                image.display()
            )));
            remove(image)?;
        }
        ImageContent::Absent => {}
    }
    let available = space::available(parent(image)?)?;
    let size = pool_size(available, plan.size.as_ref())?;
    tell(InitEvent::Step(format!(
        "Creating {size} btrfs storage pool ({}GB available on host)...",
        available.floor_gib()
    )));
    if size.bytes > available {
        tell(InitEvent::Warning(larger_than_host(&size, available, plan.buffer)));
    }
    create_image(image, size.bytes)?;
    if files::require_reflink(parent(image)?, parent(image)?).is_ok() {
        tell(InitEvent::Warning(format!(
            "{} lies on a file system that can clone files itself: POOL_IMAGE=none puts a pool in a folder on it, without an image",
            image.display()
        )));
    }
    Ok(())
}

/// The device, with a pool's file system on it; formatted only where nothing at all is found on it.
fn ensure_device(plan: &PoolPlan, device: &Path, tell: &mut dyn FnMut(InitEvent)) -> Result<(), StorageError> {
    let unfit = |reason| StorageError::UnfitDevice {
        device: device.to_owned(),
        reason,
    };
    let meta = fs::metadata(device).map_err(|error| StorageError::io("look at", device.display(), error))?;
    if !meta.file_type().is_block_device() {
        return Err(unfit(
            "it is no block device: set POOL_DEVICE to one, such as /dev/disk/by-id/…, or POOL_IMAGE to a file to be made".to_owned(),
        ));
    }
    match probe(device)? {
        Some(found) if found.is_pool() => {
            tell(InitEvent::Step(format!(
                "Found a pool on {}, keeping what is in it",
                device.display()
            )));
            return Ok(());
        }
        Some(found) => {
            return Err(unfit(format!(
                "it holds {found}; to give that up for good, run: wipefs --all {}",
                device.display()
            )));
        }
        None => {}
    }
    let found = space::device_size(device)?;
    let size = match &plan.size {
        None if found < SMALLEST.bytes() => {
            return Err(unfit(format!("it has {found}, and a pool at least {SMALLEST} GiB")));
        }
        Some(asked) if asked.bytes() > found => {
            return Err(unfit(format!("it has {found}, less than STORAGE_SIZE asks for")));
        }
        asked => asked.as_ref().map_or(found, RequestedSize::bytes),
    };
    tell(InitEvent::Step(format!(
        "Creating {size} btrfs storage pool on {} ({found})...",
        device.display()
    )));
    make_file_system(device, Some(size))
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
        Some(Signature { kind, .. }) if kind == "btrfs" => ImageContent::Pool,
        Some(found) => ImageContent::Other(found.to_string()),
        None if space::allocated(image)? == Bytes::ZERO => ImageContent::Hole,
        None => ImageContent::Other("data without a file system".to_owned()),
    })
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
    // On a btrfs, the pool's own way of writing would be undone below it.
    if btrfs::is_btrfs(&file).unwrap_or(false) {
        files::set_nocow(partial).map_err(|error| StorageError::io("set NOCOW on", partial.display(), error))?;
    }
    file.set_len(size.as_u64())
        .map_err(|error| StorageError::io("make", format!("an image of {size}"), error))?;
    make_file_system(partial, None)?;
    file.sync_all()
        .map_err(|error| StorageError::io("flush", partial.display(), error))
}

/// In all of what `path` is, or in its first `size` bytes.
fn make_file_system(path: &Path, size: Option<Bytes>) -> Result<(), StorageError> {
    let size = size.map(|size| format!("--byte-count={}", size.as_u64()));
    let args = ["--quiet", "--label", LABEL, "--data", "single", "--metadata", "dup"];
    let args = args.into_iter().chain(size.as_deref()).map(OsStr::new);
    command::run(Program::MkfsBtrfs, args.chain([path.as_os_str()]))?;
    Ok(())
}

fn remove(path: &Path) -> Result<(), StorageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StorageError::io("remove", path.display(), error)),
        _ => Ok(()),
    }
}

/// Mounts by `mount`, as a reboot does: a loop device then goes with the mount, however that ends.
fn mount(source: &Path, target: &Path, options: &str) -> Result<(), StorageError> {
    let args = ["-t", "btrfs", "-o", options].map(OsStr::new);
    command::run(
        Program::Mount,
        args.into_iter().chain([source.as_os_str(), target.as_os_str()]),
    )?;
    Ok(())
}

/// Without direct I/O, every block a guest writes is cached twice, and the writes of all guests go through one page cache.
fn use_direct_io(place: &Place, tell: &mut dyn FnMut(InitEvent)) {
    let (Ground::Image(_), Some(name)) = (&place.ground, place.device.file_name()) else {
        return;
    };
    let state = fs::read_to_string(Path::new("/sys/block").join(name).join("loop/dio"));
    if state.is_ok_and(|state| state.trim() == "0")
        && let Err(error) = command::run(
            Program::Losetup,
            [OsStr::new("--direct-io=on"), place.device.as_os_str()],
        )
    {
        let warning = format!("The host disk takes no direct I/O, so the pool is slower than it could be: {error}");
        tell(InitEvent::Warning(warning));
    }
}

fn ensure_folders(data_dir: &Path, kind: Kind, tell: &mut dyn FnMut(InitEvent)) -> Result<bool, StorageError> {
    let mut changed = false;
    for (name, in_place) in FOLDERS {
        let folder = data_dir.join(name);
        match DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => changed = true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(StorageError::io("create", folder.display(), error)),
        }
        // XFS writes in place by itself, what is not shared.
        if !in_place || kind == Kind::Xfs {
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
