//! `pool init`: what the pool lies on, its mount and its folders.
//!
//! Every step looks at what is there before it does anything, so a run that was interrupted is
//! finished by the next, and a run on a finished pool changes nothing. An image is made under
//! another name and renamed when its file system stands: what lies at `POOL_IMAGE` is whole, or not
//! ours, and is never formatted. Neither is a device on which anything is found. A file system that
//! is there already is taken as it is.

use crate::backing::{self, Backing, Ground, Kind, Place};
use crate::btrfs;
use crate::command::{self, CommandError, Program};
use crate::error::StorageError;
use crate::files;
use crate::fstab::{self, DEVICE_OPTIONS, FstabError, IMAGE_OPTIONS};
use crate::mounts;
use crate::signature::{Signature, probe};
use crate::size::{Bytes, Gib};
use crate::sizing::{PoolSize, RequestedSize, SMALLEST, pool_size};
use crate::space;
use rustix::fs::{FlockOperation, flock};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Where a pool is to be and how large.
#[derive(Debug, Clone)]
pub struct PoolPlan {
    /// The mount point (`DATA_DIR`).
    pub data_dir: PathBuf,
    /// What the pool is to lie on (`POOL_IMAGE`, `POOL_DEVICE`).
    pub backing: Backing,
    /// The table to register the mount in (`FSTAB`); `None` leaves that to the operator.
    pub fstab: Option<PathBuf>,
    /// The size the operator asked for (`STORAGE_SIZE`); `None` takes 80 % of what is free, or the
    /// whole device.
    pub size: Option<RequestedSize>,
    /// How many disks should be in the pool by the books of whoever runs it: with any, no new pool
    /// is made.
    pub expected_disks: u64,
    /// Space that admission leaves free (`STORAGE_BUFFER_GIB`), for the warning about a pool larger
    /// than its host disk.
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

/// The folders of a pool, and whether files in them are overwritten in place. Clones of an
/// overwritten-in-place file must lie in such a folder too, so it is set before the first file.
const FOLDERS: [(&str, bool); 3] = [("templates", true), ("vms", true), ("kernel", false)];

/// The label of the file systems that are made here.
const LABEL: &str = "scalebox";

/// Makes the pool of `plan` unless it is there, and mounts it. Blocks for a few seconds.
///
/// What the pool needs comes first; that it could not be registered in the table of mounts is a
/// warning with the line to add.
///
/// # Errors
/// [`StorageError::TooLittleSpace`], [`StorageError::ForeignImage`], [`StorageError::UnfitDevice`],
/// [`StorageError::OtherDevice`], [`StorageError::NotAPool`], [`StorageError::NotEmpty`],
/// [`StorageError::OtherFolder`], [`StorageError::Busy`], [`FstabError::Claimed`] where nothing is
/// mounted yet, and the failures of the programs it calls; each leaves what was there before as it
/// was.
pub fn init(plan: &PoolPlan, tell: &mut dyn FnMut(InitEvent)) -> Result<InitOutcome, StorageError> {
    let beside = match &plan.backing {
        Backing::Image(image) => image,
        Backing::Device(_) | Backing::Given => &plan.data_dir,
    };
    let _lock = lock_beside(beside)?;
    let (place, made) = match backing::find(&plan.data_dir, &plan.backing)? {
        Some(place) => {
            tell(InitEvent::Step(found_there(plan, &place)));
            (place, false)
        }
        None => {
            require_unclaimed(plan)?;
            (make(plan, tell)?, true)
        }
    };
    if place.ground == Ground::Given {
        require_pool_or_room(plan, &place)?;
    }
    let place = use_direct_io(place, plan, tell)?;
    let mut changed = made | ensure_folders(&plan.data_dir, place.kind, tell)?;
    changed |= register(plan, &place, tell)?;
    warn_of_another_size(plan, &place, tell);
    Ok(if changed {
        InitOutcome::Ready
    } else {
        InitOutcome::AlreadyThere
    })
}

/// A table that mounts something else at the pool's place would hide the pool after a reboot: said
/// before anything is made. A table that cannot be read is no reason to make no pool.
fn require_unclaimed(plan: &PoolPlan) -> Result<(), StorageError> {
    let (Some(table), Some((source, _))) = (&plan.fstab, planned_source(plan)?) else {
        return Ok(());
    };
    match fstab::is_registered(table, &source, &plan.data_dir) {
        Err(error @ FstabError::Claimed { .. }) => Err(error.into()),
        _ => Ok(()),
    }
}

/// What a line of the table of mounts would mount, as far as it can be told before the pool is
/// made.
fn planned_source(plan: &PoolPlan) -> Result<Option<(fstab::Source, &'static str)>, StorageError> {
    Ok(match &plan.backing {
        Backing::Image(image) => Some((fstab::Source::Path(image.clone()), IMAGE_OPTIONS)),
        // Devices change their names from boot to boot. One that holds no pool yet has no UUID.
        Backing::Device(device) if device.exists() => probe(device)?
            .filter(Signature::is_pool)
            .and_then(|found| found.uuid)
            .map(|uuid| (fstab::Source::Uuid(uuid), DEVICE_OPTIONS)),
        Backing::Device(_) | Backing::Given => None,
    })
}

/// `STORAGE_SIZE` is about a new pool. One that is there keeps its size, and that is not to be
/// found out later.
fn warn_of_another_size(plan: &PoolPlan, place: &Place, tell: &mut dyn FnMut(InitEvent)) {
    let Some(asked) = &plan.size else { return };
    let found = match &place.ground {
        Ground::Image(image) => fs::metadata(image).map(|meta| Bytes::new(meta.len())).ok(),
        Ground::Device(_) => File::open(&plan.data_dir)
            .ok()
            .and_then(|dir| btrfs::chunk_space(&dir).ok())
            .map(|space| space.device_size),
        Ground::Given => {
            tell(InitEvent::Warning(format!(
                "STORAGE_SIZE={asked} has no effect: the pool lies on a file system that was there before it"
            )));
            return;
        }
    };
    // The file system is made of whole blocks: an image or a device may be larger by a part of one.
    if let Some(found) =
        found.filter(|found| (*found - asked.bytes()).max(asked.bytes() - *found) >= Bytes::from_mib(1))
    {
        tell(InitEvent::Warning(format!(
            "STORAGE_SIZE={asked} has no effect: the pool is there already and has {found}. \
             `scalebox pool grow --size` or `scalebox pool shrink --size` changes it, with the daemon running"
        )));
    }
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
            mount_image(image, &plan.data_dir)?;
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
    let place = backing::find(&plan.data_dir, &plan.backing)?;
    place.ok_or_else(|| StorageError::NotMounted(plan.data_dir.clone()))
}

/// A file system that was there before must be able to clone, and a folder on it must not be
/// somebody else's.
fn require_pool_or_room(plan: &PoolPlan, place: &Place) -> Result<(), StorageError> {
    let data_dir = &plan.data_dir;
    files::require_reflink(data_dir, data_dir)?;
    let is_pool = FOLDERS.iter().all(|(name, _)| data_dir.join(name).is_dir());
    if !is_pool {
        require_none_expected(plan, data_dir)?;
    }
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

/// Enters a pool that is mounted from its own image or device in the table of mounts. Returns
/// whether it was not in there. That it cannot be is a warning: the pool is there and works until
/// the next reboot.
fn register(plan: &PoolPlan, place: &Place, tell: &mut dyn FnMut(InitEvent)) -> Result<bool, StorageError> {
    let Some(table) = &plan.fstab else { return Ok(false) };
    let (source, options) = match (&place.ground, &plan.backing) {
        // Only the image that is asked for: one of another name was mounted by somebody else.
        (Ground::Image(image), Backing::Image(wanted)) if is_same_file(image, wanted) => {
            (fstab::Source::Path(wanted.clone()), IMAGE_OPTIONS)
        }
        (Ground::Device(device), _) => match probe(device)?.and_then(|found| found.uuid) {
            Some(uuid) => (fstab::Source::Uuid(uuid), DEVICE_OPTIONS),
            None => (fstab::Source::Path(device.clone()), DEVICE_OPTIONS),
        },
        _ => return Ok(false),
    };
    match fstab::register(table, &source, &plan.data_dir, options) {
        Ok(false) => Ok(false),
        Ok(true) => {
            tell(InitEvent::Step(format!(
                "Registered {} in {}",
                plan.data_dir.display(),
                table.display()
            )));
            Ok(true)
        }
        Err(error) => {
            let line = fstab::line(&source, &plan.data_dir, options);
            tell(InitEvent::Warning(format!(
                "{error}. The pool is mounted, and will not be after a reboot: add the line `{}` to the host's table of mounts, or set \
                 FSTAB=none if something else mounts it",
                line.display()
            )));
            Ok(false)
        }
    }
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    one == other || other.canonicalize().is_ok_and(|other| other == one)
}

/// Unmounts a pool that is mounted from its own image or device; a loop device goes with it. Image,
/// device and the line in the table of mounts stay, and so does a file system that was there before
/// the pool. Returns whether it was mounted.
///
/// # Errors
/// [`StorageError::Command`] when it is in use.
pub fn unmount(data_dir: &Path, backing: &Backing) -> Result<bool, StorageError> {
    match backing::find(data_dir, backing)? {
        Some(place) if place.ground != Ground::Given => {
            command::run(Program::Umount, [data_dir])?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Turns direct I/O on for the pool's loop device, as `pool init` does; a mount from the table of
/// mounts comes without it.
pub fn ensure_direct_io(
    data_dir: &Path,
    backing: &Backing,
    tell: &mut dyn FnMut(InitEvent),
) -> Result<(), StorageError> {
    if let Some(place) = backing::find(data_dir, backing)?
        && let DirectIo::Refused(error) = try_direct_io(&place)
    {
        tell(InitEvent::Warning(format!(
            "The pool's loop device does without direct I/O, so the pool is slower than it could be: {error}. \
             `scaleboxd down && scaleboxd pool init` tries again with the sectors of the host disk"
        )));
    }
    Ok(())
}

/// Two runs at once would make the pool twice: a lock on the folder that its image or its mount
/// point lies in, which leaves no file behind.
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
        if backing::backing_file(&mount)?.is_some_and(|backing| backing == image) {
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
    require_none_expected(plan, image)?;
    let folder = parent(image)?;
    let available = space::available(folder)?;
    let size = pool_size(available, plan.size.as_ref()).map_err(|source| StorageError::TooLittleSpace {
        source,
        folder: folder.to_owned(),
    })?;
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
        Some(found) if found.ambivalent => {
            return Err(unfit(format!(
                "it holds {found}, and it is not clear whose the data is; see wipefs --no-act {}",
                device.display()
            )));
        }
        Some(found) => {
            return Err(unfit(format!(
                "it holds {found}; to give that up for good, run: wipefs --all {}",
                device.display()
            )));
        }
        None => {}
    }
    require_none_expected(plan, device)?;
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

/// A new pool in place of one that is missing would look like one whose disks are all lost.
fn require_none_expected(plan: &PoolPlan, image: &Path) -> Result<(), StorageError> {
    match plan.expected_disks {
        0 => Ok(()),
        disks => Err(StorageError::Expected {
            image: image.to_owned(),
            disks,
        }),
    }
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
    /// A file without a single block: a run was interrupted between making the file and formatting
    /// it.
    Hole,
    Pool,
    Other(String),
}

fn image_content(image: &Path) -> Result<ImageContent, StorageError> {
    match fs::symlink_metadata(image) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ImageContent::Absent),
        Err(error) => return Err(StorageError::io("look at", image.display(), error)),
        Ok(meta) if meta.is_symlink() => return Ok(ImageContent::Other(link_of(image))),
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

/// A link is not followed: what is made in its place would replace it, and the line in the table of
/// mounts must hold as long as the image does.
fn link_of(image: &Path) -> String {
    let target = fs::read_link(image).map_or_else(|error| error.to_string(), |target| target.display().to_string());
    format!("a symbolic link to {target} (set POOL_IMAGE to that path itself)")
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

/// The sectors of a loop device unless it is told otherwise, in bytes.
const USUAL_SECTOR: u64 = 512;

/// Mounts an image by a loop device whose sectors are those of the host disk: with smaller ones the
/// kernel refuses direct I/O, and `mount` cannot choose them.
fn mount_image(image: &Path, target: &Path) -> Result<(), StorageError> {
    let sector = host_sector(image);
    if sector == USUAL_SECTOR {
        return mount(image, target, IMAGE_OPTIONS);
    }
    let sector = sector.to_string();
    let args = ["--find", "--show", "--sector-size", &sector, "--direct-io=on"].map(OsStr::new);
    let attached = command::run(Program::Losetup, args.into_iter().chain([image.as_os_str()]));
    let Ok(device) = attached else {
        // A kernel, a losetup or a host disk that cannot: slower, and as good.
        return mount(image, target, IMAGE_OPTIONS);
    };
    let device = PathBuf::from(device.trim());
    let mounted = mount(&device, target, DEVICE_OPTIONS);
    // One that is mounted goes with its mount from here on; any other goes now.
    let detached = command::run(Program::Losetup, [OsStr::new("--detach"), device.as_os_str()]);
    mounted?;
    detached?;
    Ok(())
}

/// The sectors of the disk that a file lies on, in bytes, where its file system lies on a single
/// one.
fn host_sector(file: &Path) -> u64 {
    let of_device = |device: u64| {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        // A partition has its queue in the disk's folder, which is above it.
        let sector = ["queue", "../queue"].into_iter().find_map(|queue| {
            let attribute = device.join(queue).join("logical_block_size");
            fs::read_to_string(attribute).ok()
        });
        sector?.trim().parse().ok()
    };
    let device = fs::metadata(file).ok().map(|meta| meta.dev());
    device.and_then(of_device).unwrap_or(USUAL_SECTOR)
}

enum DirectIo {
    /// There is no loop device, or it does.
    On,
    Refused(CommandError),
}

/// Without direct I/O, every block a guest writes is cached twice, and the writes of all guests go
/// through one page cache.
fn try_direct_io(place: &Place) -> DirectIo {
    let (Ground::Image(image), Some(name)) = (&place.ground, place.device.file_name()) else {
        return DirectIo::On;
    };
    let queue = Path::new("/sys/block").join(name);
    let is_off = fs::read_to_string(queue.join("loop/dio")).is_ok_and(|state| state.trim() == "0");
    if !is_off {
        return DirectIo::On;
    }
    let set = |option: &str| command::run(Program::Losetup, [OsStr::new(option), place.device.as_os_str()]);
    let first = match set("--direct-io=on") {
        Ok(_) => return DirectIo::On,
        Err(error) => error,
    };
    let sector = host_sector(image);
    if sector == USUAL_SECTOR {
        return DirectIo::Refused(first);
    }
    // Older kernels let it be changed under a mounted file system, which has blocks of 4 KiB
    // anyway.
    match set(&format!("--sector-size={sector}")).and_then(|_| set("--direct-io=on")) {
        Ok(_) => DirectIo::On,
        Err(error) => DirectIo::Refused(error),
    }
}

/// Turns direct I/O on; where that takes another loop device, the pool is unmounted for it unless
/// it is in use.
fn use_direct_io(place: Place, plan: &PoolPlan, tell: &mut dyn FnMut(InitEvent)) -> Result<Place, StorageError> {
    let DirectIo::Refused(refusal) = try_direct_io(&place) else {
        return Ok(place);
    };
    let warning = |reason: &dyn std::fmt::Display| {
        InitEvent::Warning(format!(
            "The pool's loop device does without direct I/O, so the pool is slower than it could be: {reason}"
        ))
    };
    let Ground::Image(image) = &place.ground else {
        return Ok(place);
    };
    if host_sector(image) == USUAL_SECTOR {
        tell(warning(&refusal));
        return Ok(place);
    }
    if let Err(busy) = command::run(Program::Umount, [&plan.data_dir]) {
        tell(warning(&busy));
        return Ok(place);
    }
    mount_image(image, &plan.data_dir)?;
    let place = backing::find(&plan.data_dir, &plan.backing)?;
    let place = place.ok_or_else(|| StorageError::NotMounted(plan.data_dir.clone()))?;
    if let DirectIo::Refused(refusal) = try_direct_io(&place) {
        tell(warning(&refusal));
    }
    Ok(place)
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
