//! `pool init`: creating the pool's backing, its mount and its folders.
//!
//! Every step checks the present state first. So a run after an interrupted one finishes the work,
//! and a run on a complete pool changes nothing. A new image is created under another name and
//! renamed when its file system is complete. So an existing file at `POOL_IMAGE` is either a
//! complete image or foreign, and is never formatted. A device with any known content is never
//! formatted either. An existing file system is used as it is.

use crate::error::{DeviceRefusal, StorageError};
use crate::local::backing::{self, ActualBacking, Backing, FsKind, PoolLocation};
use crate::local::btrfs;
use crate::local::files;
use crate::local::fstab::{self, DEVICE_OPTIONS, FstabError, IMAGE_OPTIONS};
use crate::local::init_event::{InitEvent, InitWarning};
use crate::local::signature::{Signature, probe};
use crate::local::sizing::{MIN_DEFAULT_SIZE, RequestedSize, pool_size};
use crate::local::space;
use crate::programs::{LOSETUP, MKFS_BTRFS, MOUNT, UMOUNT};
use rustix::fs::{FlockOperation, flock};
use scalebox_programs::{ProgramError, Run};
use scalebox_units::{Bytes, Gib};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Location and size of a pool.
#[derive(Debug, Clone)]
pub struct PoolPlan {
    /// The mount point (`DATA_DIR`).
    pub data_dir: PathBuf,
    /// The configured backing (`POOL_IMAGE`, `POOL_DEVICE`).
    pub backing: Backing,
    /// The fstab in which the mount is registered (`FSTAB`); `None` leaves that to the operator.
    pub fstab: Option<PathBuf>,
    /// The requested size (`STORAGE_SIZE`); `None` takes 80 % of the free space, or the whole
    /// device.
    pub size: Option<RequestedSize>,
    /// Number of disks that the caller expects in the pool. If there are any, no new pool is
    /// created.
    pub expected_disks: u64,
    /// Space that admission keeps free (`STORAGE_BUFFER_GIB`), for the warning about a pool larger
    /// than its host disk.
    pub buffer: Gib,
}

/// The result of `pool init`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitOutcome {
    /// The pool was complete and mounted; nothing changed.
    AlreadyThere,
    /// The pool was created, or the work of an interrupted run was finished.
    Ready,
}

/// The folders of a pool; `true` if their files are NOCOW. A clone of a NOCOW file must be NOCOW
/// too, so the flag is set before the first file is created.
const FOLDERS: [(&str, bool); 3] = [("templates", true), ("vms", true), (KERNELS, false)];

/// The folder of the kernels, and the folder in its place in a pool of an earlier release.
pub(crate) const KERNELS: &str = "kernels";
pub(crate) const PREVIOUS_KERNEL: &str = "kernel";

/// The label of new file systems.
const LABEL: &str = "scalebox";

/// Creates the pool of `plan` unless it exists, and mounts it. Blocks for a few seconds.
///
/// Failing to register the mount in fstab is only a warning, which contains the line to add.
///
/// # Errors
/// [`StorageError::TooLittleSpace`], [`StorageError::ForeignImage`], [`StorageError::UnfitDevice`],
/// [`StorageError::OtherDevice`], [`StorageError::NotAPool`], [`StorageError::NotEmpty`],
/// [`StorageError::OtherFolder`], [`StorageError::Busy`], [`FstabError::Claimed`] if nothing is
/// mounted yet, and errors of outside programs. After an error, existing data is unchanged.
pub fn init(plan: &PoolPlan, report: &mut dyn FnMut(InitEvent)) -> Result<InitOutcome, StorageError> {
    let beside = match &plan.backing {
        Backing::Image(image) => image,
        Backing::Device(_) | Backing::Existing => &plan.data_dir,
    };
    let _lock = lock_beside(beside)?;
    let (place, made) = match backing::find(&plan.data_dir, &plan.backing)? {
        Some(place) => {
            report(InitEvent::Step(describe_existing(plan, &place)));
            (place, false)
        }
        None => {
            require_unclaimed(plan)?;
            (create(plan, report)?, true)
        }
    };
    if place.backing == ActualBacking::Existing {
        require_pool_or_room(plan, &place)?;
    }
    let place = use_direct_io(place, plan, report)?;
    let mut changed = made | ensure_folders(&plan.data_dir, place.kind, report)?;
    changed |= register(plan, &place, report)?;
    warn_about_size(plan, &place, report);
    Ok(if changed {
        InitOutcome::Ready
    } else {
        InitOutcome::AlreadyThere
    })
}

/// Fails if fstab mounts something else at the pool's folder, which would hide the pool after a
/// reboot. Call it before anything is created. An unreadable fstab does not prevent a pool.
fn require_unclaimed(plan: &PoolPlan) -> Result<(), StorageError> {
    let (Some(table), Some((source, _))) = (&plan.fstab, planned_source(plan)?) else {
        return Ok(());
    };
    match fstab::is_registered(table, &source, &plan.data_dir) {
        Err(error @ FstabError::Claimed { .. }) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Returns the source that fstab will name, if it is known before the pool exists.
fn planned_source(plan: &PoolPlan) -> Result<Option<(fstab::Source, &'static str)>, StorageError> {
    Ok(match &plan.backing {
        Backing::Image(image) => Some((fstab::Source::Path(image.clone()), IMAGE_OPTIONS)),
        // Device names change between boots, so the UUID is used. A device without a pool has none
        // yet.
        Backing::Device(device) if device.exists() => probe(device)?
            .filter(Signature::is_pool)
            .and_then(|found| found.uuid)
            .map(|uuid| (fstab::Source::Uuid(uuid), DEVICE_OPTIONS)),
        Backing::Device(_) | Backing::Existing => None,
    })
}

/// Warns if `STORAGE_SIZE` differs from the size of an existing pool, which does not change.
fn warn_about_size(plan: &PoolPlan, place: &PoolLocation, report: &mut dyn FnMut(InitEvent)) {
    let Some(requested) = &plan.size else { return };
    let found = match &place.backing {
        ActualBacking::Image(image) => fs::metadata(image).map(|meta| Bytes::new(meta.len())).ok(),
        ActualBacking::Device(_) => File::open(&plan.data_dir)
            .ok()
            .and_then(|dir| btrfs::chunk_space(&dir).ok())
            .map(|space| space.device_size),
        ActualBacking::Existing => {
            return report(InitEvent::Warning(InitWarning::SizeOfExisting(requested.clone())));
        }
    };
    // File systems consist of whole blocks: an image or a device can be larger by part of a block.
    if let Some(found) =
        found.filter(|found| (*found - requested.bytes()).max(requested.bytes() - *found) >= Bytes::from_mib(1))
    {
        let requested = requested.clone();
        report(InitEvent::Warning(InitWarning::OtherSize { requested, found }));
    }
}

fn describe_existing(plan: &PoolPlan, place: &PoolLocation) -> String {
    let at = plan.data_dir.display();
    if place.is_mount_point {
        format!("Storage already mounted at {at}")
    } else {
        format!("Using the existing {} file system of {at}", place.kind.name())
    }
}

/// Creates or mounts the pool.
fn create(plan: &PoolPlan, report: &mut dyn FnMut(InitEvent)) -> Result<PoolLocation, StorageError> {
    match &plan.backing {
        Backing::Image(image) => {
            report(InitEvent::Step("Setting up btrfs storage...".to_owned()));
            make_dir(&plan.data_dir)?;
            require_empty(&plan.data_dir)?;
            require_not_mounted_elsewhere(image)?;
            ensure_image(plan, image, report)?;
            mount_image(image, &plan.data_dir)?;
        }
        Backing::Device(device) => {
            report(InitEvent::Step("Setting up btrfs storage...".to_owned()));
            make_dir(&plan.data_dir)?;
            require_empty(&plan.data_dir)?;
            ensure_device(plan, device, report)?;
            mount(device, &plan.data_dir, DEVICE_OPTIONS)?;
        }
        Backing::Existing => make_dir(&plan.data_dir)?,
    }
    let place = backing::find(&plan.data_dir, &plan.backing)?;
    place.ok_or_else(|| StorageError::NotMounted(plan.data_dir.clone()))
}

/// Checks that an existing file system can clone files, and that the pool's folder on it has no
/// foreign contents.
fn require_pool_or_room(plan: &PoolPlan, place: &PoolLocation) -> Result<(), StorageError> {
    let data_dir = &plan.data_dir;
    files::require_reflink(data_dir, data_dir)?;
    let is_pool = is_pool(data_dir);
    if !is_pool {
        require_none_expected(plan, data_dir)?;
    }
    if place.is_mount_point || is_pool || only_ours_in(data_dir)? {
        return Ok(());
    }
    Err(StorageError::OtherFolder(data_dir.to_owned()))
}

/// Returns whether a folder has the folders of a pool, of this release or an earlier one.
pub(crate) fn is_pool(dir: &Path) -> bool {
    FOLDERS.iter().all(|(name, _)| {
        let is_there = |name| dir.join(name).is_dir();
        is_there(*name) || *name == KERNELS && is_there(PREVIOUS_KERNEL)
    })
}

/// Returns whether a folder contains nothing but folders that an interrupted `pool init` may have
/// created.
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

/// Registers a pool on an image or device in fstab, and returns whether the line was missing. A
/// failure is only a warning: the pool works until the next reboot.
fn register(plan: &PoolPlan, place: &PoolLocation, report: &mut dyn FnMut(InitEvent)) -> Result<bool, StorageError> {
    let Some(table) = &plan.fstab else { return Ok(false) };
    let (source, options) = match (&place.backing, &plan.backing) {
        // Only the configured image is registered: another image was mounted by the operator.
        (ActualBacking::Image(image), Backing::Image(wanted)) if is_same_file(image, wanted) => {
            (fstab::Source::Path(wanted.clone()), IMAGE_OPTIONS)
        }
        (ActualBacking::Device(device), _) => match probe(device)?.and_then(|found| found.uuid) {
            Some(uuid) => (fstab::Source::Uuid(uuid), DEVICE_OPTIONS),
            None => (fstab::Source::Path(device.clone()), DEVICE_OPTIONS),
        },
        _ => return Ok(false),
    };
    match fstab::register(table, &source, &plan.data_dir, options) {
        Ok(false) => Ok(false),
        Ok(true) => {
            report(InitEvent::Step(format!(
                "Registered {} in {}",
                plan.data_dir.display(),
                table.display()
            )));
            Ok(true)
        }
        Err(error) => {
            let line = fstab::line(&source, &plan.data_dir, options).display().to_string();
            report(InitEvent::Warning(InitWarning::NotRegistered { error, line }));
            Ok(false)
        }
    }
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    one == other || other.canonicalize().is_ok_and(|other| other == one)
}

/// Unmounts a pool on an image or device; its loop device is removed too. Keeps the image, the
/// device, the line in fstab, and the mount of an existing file system. Returns whether the pool
/// was mounted.
///
/// # Errors
/// [`StorageError::Program`] when it is in use.
pub fn unmount(data_dir: &Path, backing: &Backing) -> Result<bool, StorageError> {
    match backing::find(data_dir, backing)? {
        Some(place) if place.backing != ActualBacking::Existing => {
            Run::of(UMOUNT).args([data_dir]).stdout()?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Enables direct I/O on the pool's loop device, as `pool init` does; a mount by fstab lacks it.
pub fn ensure_direct_io(
    data_dir: &Path,
    backing: &Backing,
    report: &mut dyn FnMut(InitEvent),
) -> Result<(), StorageError> {
    if let Some(place) = backing::find(data_dir, backing)?
        && let DirectIo::Refused(error) = try_direct_io(&place)
    {
        report(InitEvent::Warning(InitWarning::NoDirectIoWhileMounted(error)));
    }
    Ok(())
}

/// Prevents concurrent runs, which would create the pool twice. Locks the folder of its image or
/// mount point, which leaves no lock file behind.
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

/// Fails if the image is mounted elsewhere: two ledgers would then count the same disks.
fn require_not_mounted_elsewhere(image: &Path) -> Result<(), StorageError> {
    let image = image.canonicalize().unwrap_or_else(|_| image.to_owned());
    let mounts = scalebox_mounts::all().map_err(|error| StorageError::io("read", "the mount table", error))?;
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

fn ensure_image(plan: &PoolPlan, image: &Path, report: &mut dyn FnMut(InitEvent)) -> Result<(), StorageError> {
    match image_content(image)? {
        ImageContent::Pool => {
            let found = format!("Found the pool image {}, keeping its contents", image.display());
            report(InitEvent::Step(found));
            return Ok(());
        }
        ImageContent::Other(found) => {
            return Err(StorageError::ForeignImage {
                path: image.to_owned(),
                found,
            });
        }
        ImageContent::Unformatted => {
            report(InitEvent::Step(format!(
                "Removing the empty image {} left by an interrupted run",
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
    report(InitEvent::Step(format!(
        "Creating {size} btrfs storage pool ({}GB available on host)...",
        available.floor_gib()
    )));
    if size.bytes > available {
        report(InitEvent::Warning(InitWarning::LargerThanHostDisk {
            size: size.clone(),
            available: available.floor_gib(),
            usable: (available - plan.buffer.bytes()).floor_gib(),
        }));
    }
    create_image(image, size.bytes)?;
    if files::require_reflink(parent(image)?, parent(image)?).is_ok() {
        report(InitEvent::Warning(InitWarning::UnnecessaryImage(image.to_owned())));
    }
    Ok(())
}

/// Ensures that the device has a pool's file system; formats it only if it has no known content.
fn ensure_device(plan: &PoolPlan, device: &Path, report: &mut dyn FnMut(InitEvent)) -> Result<(), StorageError> {
    let unfit = |reason| StorageError::UnfitDevice {
        device: device.to_owned(),
        reason,
    };
    let meta = fs::metadata(device).map_err(|error| StorageError::io("read", device.display(), error))?;
    if !meta.file_type().is_block_device() {
        return Err(unfit(DeviceRefusal::NotABlockDevice));
    }
    match probe(device)? {
        Some(found) if found.is_pool() => {
            report(InitEvent::Step(format!(
                "Found a pool on {}, keeping its contents",
                device.display()
            )));
            return Ok(());
        }
        Some(found) if found.ambiguous => return Err(unfit(DeviceRefusal::Ambiguous(found.to_string()))),
        Some(found) => return Err(unfit(DeviceRefusal::ForeignContents(found.to_string()))),
        None => {}
    }
    require_none_expected(plan, device)?;
    let found = space::device_size(device)?;
    let size = match &plan.size {
        None if found < MIN_DEFAULT_SIZE.bytes() => {
            return Err(unfit(DeviceRefusal::TooSmall(found)));
        }
        Some(requested) if requested.bytes() > found => {
            let requested = requested.to_string();
            return Err(unfit(DeviceRefusal::SmallerThanRequested { found, requested }));
        }
        requested => requested.as_ref().map_or(found, RequestedSize::bytes),
    };
    report(InitEvent::Step(format!(
        "Creating {size} btrfs storage pool on {} ({found})...",
        device.display()
    )));
    make_file_system(device, Some(size))
}

/// Fails if disks are expected. A new pool in place of a missing one would look as if all disks
/// were lost.
fn require_none_expected(plan: &PoolPlan, image: &Path) -> Result<(), StorageError> {
    match plan.expected_disks {
        0 => Ok(()),
        disks => Err(StorageError::PoolMissing {
            image: image.to_owned(),
            disks,
        }),
    }
}

enum ImageContent {
    Absent,
    /// A file without a single block: a run was interrupted between creating and formatting it.
    Unformatted,
    Pool,
    Other(String),
}

fn image_content(image: &Path) -> Result<ImageContent, StorageError> {
    match fs::symlink_metadata(image) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ImageContent::Absent),
        Err(error) => return Err(StorageError::io("read", image.display(), error)),
        Ok(meta) if meta.is_symlink() => {
            let target = fs::read_link(image);
            let target = target.map_or_else(|error| error.to_string(), |target| target.display().to_string());
            let path = image.to_owned();
            return Err(StorageError::LinkedImage { path, target });
        }
        Ok(meta) if !meta.is_file() => {
            return Ok(ImageContent::Other("something other than a regular file".to_owned()));
        }
        Ok(_) => {}
    }
    Ok(match probe(image)? {
        Some(Signature { kind, .. }) if kind == "btrfs" => ImageContent::Pool,
        Some(found) => ImageContent::Other(found.to_string()),
        None if space::allocated(image)? == Bytes::ZERO => ImageContent::Unformatted,
        None => ImageContent::Other("data without a file system".to_owned()),
    })
}

fn create_image(image: &Path, size: Bytes) -> Result<(), StorageError> {
    let mut partial = image.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    // The lock is held, so only an interrupted run can have left it.
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
    // On a btrfs, copy-on-write of the image would undo the NOCOW of the pool in it.
    if btrfs::is_btrfs(&file).unwrap_or(false) {
        files::set_nocow(partial).map_err(|error| StorageError::io("set NOCOW on", partial.display(), error))?;
    }
    file.set_len(size.as_u64())
        .map_err(|error| StorageError::io("create", format!("an image of {size}"), error))?;
    make_file_system(partial, None)?;
    file.sync_all()
        .map_err(|error| StorageError::io("flush", partial.display(), error))
}

/// Formats all of `path`, or its first `size` bytes.
fn make_file_system(path: &Path, size: Option<Bytes>) -> Result<(), StorageError> {
    let size = size.map(|size| format!("--byte-count={}", size.as_u64()));
    let args = ["--quiet", "--label", LABEL, "--data", "single", "--metadata", "dup"];
    let args = args.into_iter().chain(size.as_deref()).map(OsStr::new);
    Run::of(MKFS_BTRFS).args(args.chain([path.as_os_str()])).stdout()?;
    Ok(())
}

fn remove(path: &Path) -> Result<(), StorageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StorageError::io("remove", path.display(), error)),
        _ => Ok(()),
    }
}

/// Mounts with `mount`, like a reboot: a loop device is then removed with the mount, however that
/// ends.
fn mount(source: &Path, target: &Path, options: &str) -> Result<(), StorageError> {
    let args = ["-t", "btrfs", "-o", options];
    Run::of(MOUNT).args(args).args([source, target]).stdout()?;
    Ok(())
}

/// The default sector size of a loop device, in bytes.
const DEFAULT_SECTOR_SIZE: u64 = 512;

/// Mounts an image through a loop device with the sector size of the host disk. The kernel refuses
/// direct I/O with smaller sectors, and `mount` cannot set their size.
fn mount_image(image: &Path, target: &Path) -> Result<(), StorageError> {
    let sector = host_sector(image);
    if sector == DEFAULT_SECTOR_SIZE {
        return mount(image, target, IMAGE_OPTIONS);
    }
    let sector = sector.to_string();
    let args = ["--find", "--show", "--sector-size", &sector, "--direct-io=on"];
    let attached = Run::of(LOSETUP).args(args).args([image]).stdout();
    let Ok(device) = attached else {
        // The kernel, losetup or the host disk does not support it; the pool then works without it,
        // more slowly.
        return mount(image, target, IMAGE_OPTIONS);
    };
    let device = PathBuf::from(device.trim());
    let mounted = mount(&device, target, DEVICE_OPTIONS);
    // If mounted, the device is now removed with its mount; otherwise it is removed now.
    let detached = Run::of(LOSETUP).args(["--detach"]).args([&device]).stdout();
    mounted?;
    detached?;
    Ok(())
}

/// Returns the sector size of the disk under a file, in bytes. A file system on several disks gets
/// the default.
fn host_sector(file: &Path) -> u64 {
    let of_device = |device: u64| {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        // A partition's queue is in the folder of its disk, one level up.
        let sector = ["queue", "../queue"].into_iter().find_map(|queue| {
            let attribute = device.join(queue).join("logical_block_size");
            fs::read_to_string(attribute).ok()
        });
        sector?.trim().parse().ok()
    };
    let device = fs::metadata(file).ok().map(|meta| meta.dev());
    device.and_then(of_device).unwrap_or(DEFAULT_SECTOR_SIZE)
}

enum DirectIo {
    /// Direct I/O is on, or the pool has no loop device.
    On,
    Refused(ProgramError),
}

/// Tries to enable direct I/O. Without it every block is cached twice, and the writes of all guests
/// share one page cache.
fn try_direct_io(place: &PoolLocation) -> DirectIo {
    let (ActualBacking::Image(image), Some(name)) = (&place.backing, place.device.file_name()) else {
        return DirectIo::On;
    };
    let queue = Path::new("/sys/block").join(name);
    let is_off = fs::read_to_string(queue.join("loop/dio")).is_ok_and(|state| state.trim() == "0");
    if !is_off {
        return DirectIo::On;
    }
    let set = |option: &str| Run::of(LOSETUP).args([option]).args([&place.device]).stdout();
    let first = match set("--direct-io=on") {
        Ok(_) => return DirectIo::On,
        Err(error) => error,
    };
    let sector = host_sector(image);
    if sector == DEFAULT_SECTOR_SIZE {
        return DirectIo::Refused(first);
    }
    // Older kernels can change it under a mounted file system, whose blocks of 4 KiB suit both
    // sizes.
    match set(&format!("--sector-size={sector}")).and_then(|_| set("--direct-io=on")) {
        Ok(_) => DirectIo::On,
        Err(error) => DirectIo::Refused(error),
    }
}

/// Enables direct I/O. If that needs another loop device, the pool is unmounted for it unless it is
/// in use.
fn use_direct_io(
    place: PoolLocation,
    plan: &PoolPlan,
    report: &mut dyn FnMut(InitEvent),
) -> Result<PoolLocation, StorageError> {
    let DirectIo::Refused(refusal) = try_direct_io(&place) else {
        return Ok(place);
    };
    let warning = |reason| InitEvent::Warning(InitWarning::NoDirectIo(reason));
    let ActualBacking::Image(image) = &place.backing else {
        return Ok(place);
    };
    if host_sector(image) == DEFAULT_SECTOR_SIZE {
        report(warning(refusal));
        return Ok(place);
    }
    if let Err(busy) = Run::of(UMOUNT).args([&plan.data_dir]).stdout() {
        report(warning(busy));
        return Ok(place);
    }
    mount_image(image, &plan.data_dir)?;
    let place = backing::find(&plan.data_dir, &plan.backing)?;
    let place = place.ok_or_else(|| StorageError::NotMounted(plan.data_dir.clone()))?;
    if let DirectIo::Refused(refusal) = try_direct_io(&place) {
        report(warning(refusal));
    }
    Ok(place)
}

fn ensure_folders(data_dir: &Path, kind: FsKind, report: &mut dyn FnMut(InitEvent)) -> Result<bool, StorageError> {
    let mut changed = false;
    for (name, in_place) in FOLDERS {
        let folder = data_dir.join(name);
        match DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => changed = true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(StorageError::io("create", folder.display(), error)),
        }
        // XFS always overwrites blocks in place unless they are shared.
        if !in_place || kind == FsKind::Xfs {
            continue;
        }
        let newly_set =
            files::set_nocow(&folder).map_err(|error| StorageError::io("set NOCOW on", folder.display(), error))?;
        changed |= newly_set;
        if newly_set && require_empty(&folder).is_err() {
            report(InitEvent::Warning(InitWarning::CopyOnWriteFiles(folder)));
        }
    }
    if changed {
        files::sync_dir(data_dir)?;
    }
    Ok(changed)
}
