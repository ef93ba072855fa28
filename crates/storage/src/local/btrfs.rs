//! Space and sizes of a btrfs, by ioctl: chunk space per type, and the devices.
//!
//! Layouts and numbers: `include/uapi/linux/btrfs.h` and `btrfs_tree.h` of the kernel.

use rustix::fd::AsFd;
use rustix::io;
use rustix::ioctl::{Getter, Opcode, Setter, Updater, ioctl, opcode};
use scalebox_units::Bytes;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: u8 = 0x94;
const SPACE_INFO: Opcode = opcode::read_write::<SpaceArgsHeader>(MAGIC, 20);
const DEV_INFO: Opcode = opcode::read_write::<DevInfoArgs>(MAGIC, 30);
const FS_INFO: Opcode = opcode::read::<FsInfoArgs>(MAGIC, 31);

const INO_LOOKUP: Opcode = opcode::read_write::<InoLookupArgs>(MAGIC, 18);
const START_SYNC: Opcode = opcode::read::<u64>(MAGIC, 24);
const WAIT_SYNC: Opcode = opcode::write::<u64>(MAGIC, 22);

const DATA: u64 = 1 << 0;
const SYSTEM: u64 = 1 << 1;
const METADATA: u64 = 1 << 2;
/// Profiles, and the maximum number of raw bytes per byte stored.
const COPIES: [(u64, u64); 7] = [
    // DUP, RAID1, RAID10
    (1 << 5, 2),
    (1 << 4, 2),
    (1 << 6, 2),
    // RAID1C3, RAID1C4
    (1 << 9, 3),
    (1 << 10, 4),
    // RAID5, RAID6: the value for the smallest number of devices.
    (1 << 7, 2),
    (1 << 8, 3),
];
const GLOBAL_RESERVE: u64 = 1 << 49;

/// Maximum number of space types: data, metadata, system and the reserve, each in up to two
/// profiles during a balance.
const MAX_SPACES: usize = 16;

#[repr(C)]
struct SpaceArgsHeader {
    slots: u64,
    total: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SpaceInfo {
    flags: u64,
    total_bytes: u64,
    used_bytes: u64,
}

#[repr(C)]
struct SpaceArgs {
    header: SpaceArgsHeader,
    spaces: [SpaceInfo; MAX_SPACES],
}

#[repr(C)]
struct FsInfoArgs {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    rest: [u64; 124],
}

#[repr(C)]
struct DevInfoArgs {
    devid: u64,
    uuid: [u8; 16],
    bytes_used: u64,
    total_bytes: u64,
    fsid: [u8; 16],
    unused: [u64; 377],
    path: [u8; 1024],
}

#[repr(C)]
struct InoLookupArgs {
    treeid: u64,
    objectid: u64,
    name: [u8; 4080],
}

/// Returns the number of the subvolume that contains `file`.
///
/// # Errors
/// `ENOTTY` when it is not a btrfs.
pub(crate) fn subvolume(file: impl AsFd) -> io::Result<u64> {
    // The root folder of each subvolume has this number; tree 0 is the file's own.
    const ROOT_FOLDER: u64 = 256;
    let mut args = InoLookupArgs {
        treeid: 0,
        objectid: ROOT_FOLDER,
        name: [0; 4080],
    };
    // SAFETY: the argument has the size and layout of `btrfs_ioctl_ino_lookup_args`.
    unsafe { ioctl(file.as_fd(), Updater::<INO_LOOKUP, InoLookupArgs>::new(&mut args))? };
    Ok(args.treeid)
}

/// The chunk space of a btrfs. Logical sizes count each byte once, raw sizes once per copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ChunkSpace {
    /// Size of all devices.
    pub(crate) device_size: Bytes,
    /// Raw space not allocated to a chunk.
    pub(crate) unallocated: Bytes,
    /// Logical size of the data chunks, and the used part of it.
    pub(crate) data_total: Bytes,
    pub(crate) data_used: Bytes,
    /// Logical size of the metadata chunks, and the used part of it.
    pub(crate) metadata_total: Bytes,
    pub(crate) metadata_used: Bytes,
    /// The metadata that btrfs reserves so that it can delete files when full.
    pub(crate) global_reserve: Bytes,
    /// Raw bytes per byte of metadata: 2 for DUP and RAID1.
    pub(crate) metadata_copies: u64,
    /// Raw bytes per byte of data: 1 in a pool created by this crate.
    pub(crate) data_copies: u64,
    /// Number of devices. With several, free space on one may have no counterpart on another.
    pub(crate) devices: u64,
    /// Raw bytes in use: data, metadata and system, each counted once per copy.
    pub(crate) raw_used: Bytes,
}

/// Data that btrfs has accepted but not committed yet. `used` grows only with the next commit, by
/// default every 30 s, in which gigabytes can be written.
///
/// From `/sys/fs/btrfs/UUID/allocation/data` and `…/metadata`
/// (Documentation/ABI/testing/sysfs-fs-btrfs): space reserved for writes in progress, space that
/// buffered writes may need, and space that was freed but is usable only after the commit.
#[derive(Debug)]
pub(crate) struct PendingWrites {
    data: [File; 3],
    metadata: [File; 3],
}

impl PendingWrites {
    /// Opens the counters of the btrfs that contains `file`. They stay open, so that reading one
    /// takes a single system call.
    pub(crate) fn open(file: impl AsFd) -> std::io::Result<PendingWrites> {
        let folder = sysfs_folder(&file)?.join("allocation");
        let counters = |kind: &str| {
            let open = |counter: &str| File::open(folder.join(kind).join(counter));
            Ok::<_, std::io::Error>([open("bytes_reserved")?, open("bytes_may_use")?, open("bytes_pinned")?])
        };
        Ok(PendingWrites {
            data: counters("data")?,
            metadata: counters("metadata")?,
        })
    }

    /// Reads the data that is accepted but not counted yet.
    pub(crate) fn data(&self) -> std::io::Result<Bytes> {
        sum(&self.data)
    }

    /// Reads the metadata that the current transaction has taken or may take, including btrfs'
    /// reserve.
    pub(crate) fn metadata(&self) -> std::io::Result<Bytes> {
        sum(&self.metadata)
    }
}

/// Returns the sysfs folder of the btrfs that contains `file`. It does not exist where sysfs is not
/// mounted or hidden from a container.
pub(crate) fn sysfs_folder(file: impl AsFd) -> std::io::Result<PathBuf> {
    let hex: Vec<String> = fs_info(&file)?.fsid.iter().map(|byte| format!("{byte:02x}")).collect();
    let group = |range: std::ops::Range<usize>| hex[range].concat();
    let uuid = [group(0..4), group(4..6), group(6..8), group(8..10), group(10..16)].join("-");
    Ok(Path::new("/sys/fs/btrfs").join(uuid))
}

fn sum(counters: &[File]) -> std::io::Result<Bytes> {
    let mut sum = Bytes::ZERO;
    for counter in counters {
        let mut text = [0; 32];
        let length = counter.read_at(&mut text, 0)?;
        let number = str::from_utf8(&text[..length])
            .ok()
            .and_then(|text| text.trim().parse().ok());
        sum += Bytes::new(number.ok_or_else(|| std::io::Error::other("a btrfs counter is not a number"))?);
    }
    Ok(sum)
}

/// Returns whether `file` is on a btrfs.
pub(crate) fn is_btrfs(file: impl AsFd) -> io::Result<bool> {
    // BTRFS_SUPER_MAGIC of include/uapi/linux/magic.h.
    const SUPER_MAGIC: u64 = 0x9123_683e;
    Ok(rustix::fs::fstatfs(file)?.f_type as u64 == SUPER_MAGIC)
}

/// Reads the space of the btrfs that contains `file`.
///
/// # Errors
/// `ENOTTY` when it is not a btrfs.
pub(crate) fn chunk_space(file: impl AsFd) -> io::Result<ChunkSpace> {
    let mut space = ChunkSpace {
        metadata_copies: 1,
        data_copies: 1,
        ..ChunkSpace::default()
    };
    for info in space_infos(&file)? {
        let (total, used) = (Bytes::new(info.total_bytes), Bytes::new(info.used_bytes));
        let profile = COPIES.iter().find(|(profile, _)| info.flags & profile != 0);
        let copies = profile.map_or(1, |(_, copies)| *copies);
        if info.flags & GLOBAL_RESERVE != 0 {
            space.global_reserve += total;
            continue;
        }
        if info.flags & DATA != 0 {
            space.data_total += total;
            space.data_used += used;
            // During a balance, the higher of two values.
            space.data_copies = space.data_copies.max(copies);
        } else if info.flags & METADATA != 0 {
            space.metadata_total += total;
            space.metadata_used += used;
            space.metadata_copies = space.metadata_copies.max(copies);
        }
        if info.flags & (DATA | METADATA | SYSTEM) != 0 {
            space.raw_used += Bytes::from_blocks(info.used_bytes, copies);
        }
    }
    let (device_size, allocated, count) = devices(&file)?;
    space.device_size = device_size;
    space.unallocated = device_size - allocated;
    space.devices = count;
    Ok(space)
}

/// Interval at which the commit thread is woken; longer than most commits take.
const WAKE_INTERVAL: std::time::Duration = std::time::Duration::from_millis(200);

/// Commits the current transaction and waits for it. Unlike `syncfs`, it does not flush dirty
/// pages.
///
/// # Errors
/// `ENOTTY` when it is not a btrfs; any error of the commit.
pub(crate) fn commit(file: impl AsFd) -> io::Result<()> {
    let fd = file.as_fd();
    // SAFETY: the kernel writes the transaction's number, a u64.
    let begin = || unsafe { ioctl(fd, Getter::<START_SYNC, u64>::new()) };
    let transaction = begin()?;
    // START_SYNC only wakes the kernel's commit thread. The thread misses a wake-up while it
    // finishes the previous commit, and would sleep until its timer of 30 s. So it is woken
    // repeatedly.
    std::thread::scope(|scope| {
        let (done, waiting) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            while waiting.recv_timeout(WAKE_INTERVAL) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                && begin().is_ok()
            {}
        });
        // SAFETY: the kernel reads the transaction's number, a u64.
        let committed = unsafe { ioctl(fd, Setter::<WAIT_SYNC, u64>::new(transaction)) };
        drop(done);
        committed
    })
}

fn space_infos(file: &impl AsFd) -> io::Result<Vec<SpaceInfo>> {
    let mut args = SpaceArgs {
        header: SpaceArgsHeader {
            slots: MAX_SPACES as u64,
            total: 0,
        },
        spaces: [SpaceInfo::default(); MAX_SPACES],
    };
    // SAFETY: the kernel writes at most `slots` entries after the header, and there is room for
    // MAX_SPACES of them.
    unsafe { ioctl(file.as_fd(), Updater::<SPACE_INFO, SpaceArgs>::new(&mut args))? };
    let filled = usize::try_from(args.header.total).map_or(MAX_SPACES, |total| total.min(MAX_SPACES));
    Ok(args.spaces[..filled].to_vec())
}

fn fs_info(file: &impl AsFd) -> io::Result<FsInfoArgs> {
    let mut info = FsInfoArgs {
        max_id: 0,
        num_devices: 0,
        fsid: [0; 16],
        rest: [0; 124],
    };
    // SAFETY: the argument has the size and layout of `btrfs_ioctl_fs_info_args`.
    unsafe { ioctl(file.as_fd(), Updater::<FS_INFO, FsInfoArgs>::new(&mut info))? };
    Ok(info)
}

/// Returns the size of all devices, the part allocated to chunks, and the number of devices.
fn devices(file: &impl AsFd) -> io::Result<(Bytes, Bytes, u64)> {
    let info = fs_info(file)?;
    let (mut size, mut allocated) = (Bytes::ZERO, Bytes::ZERO);
    for devid in 1..=info.max_id {
        let mut device = DevInfoArgs {
            devid,
            uuid: [0; 16],
            bytes_used: 0,
            total_bytes: 0,
            fsid: [0; 16],
            unused: [0; 377],
            path: [0; 1024],
        };
        // SAFETY: the argument has the size and layout of `btrfs_ioctl_dev_info_args`.
        match unsafe { ioctl(file.as_fd(), Updater::<DEV_INFO, DevInfoArgs>::new(&mut device)) } {
            Ok(()) => {
                size += Bytes::new(device.total_bytes);
                allocated += Bytes::new(device.bytes_used);
            }
            // The numbers of removed devices stay unused.
            Err(io::Errno::NODEV) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((size, allocated, info.num_devices))
}

const _: () = assert!(size_of::<InoLookupArgs>() == 4096);
const _: () = assert!(size_of::<DevInfoArgs>() == 4096 && size_of::<FsInfoArgs>() == 1024);
