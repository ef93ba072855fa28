//! What btrfs says of itself, by ioctl: chunk space by kind and the devices' sizes.
//!
//! Layouts and numbers: `include/uapi/linux/btrfs.h` and `btrfs_tree.h` of the kernel.

use crate::size::Bytes;
use rustix::fd::AsFd;
use rustix::io;
use rustix::ioctl::{Getter, Opcode, Setter, Updater, ioctl, opcode};
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
/// Profiles, and how many raw bytes a byte takes in them at most.
const COPIES: [(u64, u64); 7] = [
    // DUP, RAID1, RAID10
    (1 << 5, 2),
    (1 << 4, 2),
    (1 << 6, 2),
    // RAID1C3, RAID1C4
    (1 << 9, 3),
    (1 << 10, 4),
    // RAID5, RAID6: as many as on the fewest devices.
    (1 << 7, 2),
    (1 << 8, 3),
];
const GLOBAL_RESERVE: u64 = 1 << 49;

/// Kinds of space there can be: data, metadata, system and the reserve, each in up to two profiles
/// while a balance converts.
const SLOTS: usize = 16;

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
    spaces: [SpaceInfo; SLOTS],
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

/// The subvolume that `file` lies in, by its number.
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

/// The chunk space of a btrfs. Logical sizes count a byte once, raw sizes as often as the profile
/// stores it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ChunkSpace {
    /// Size of all devices.
    pub(crate) device_size: Bytes,
    /// Raw space in no chunk yet.
    pub(crate) unallocated: Bytes,
    /// Logical size of the data chunks, and what of it is used.
    pub(crate) data_total: Bytes,
    pub(crate) data_used: Bytes,
    /// Logical size of the metadata chunks, and what of it is used.
    pub(crate) metadata_total: Bytes,
    pub(crate) metadata_used: Bytes,
    /// Part of the metadata that btrfs keeps for itself to be able to delete when full.
    pub(crate) global_reserve: Bytes,
    /// How many raw bytes a byte of metadata takes: 2 for DUP and RAID1.
    pub(crate) metadata_copies: u64,
    /// The same of data: 1 in a pool that was made here.
    pub(crate) data_copies: u64,
    /// How many devices there are. With several, what one has left may have no counterpart on
    /// another.
    pub(crate) devices: u64,
    /// Raw bytes in use: data, metadata and system, each as often as it is stored.
    pub(crate) raw_used: Bytes,
}

/// Data that btrfs has taken and not yet committed: `used` grows only with the next commit, 30 s
/// away by default, in which gigabytes are written.
///
/// From `/sys/fs/btrfs/UUID/allocation/data` and `…/metadata`
/// (Documentation/ABI/testing/sysfs-fs-btrfs): what is reserved for writes under way, what may be
/// needed by buffered ones, and what was freed and can be used only after the commit.
#[derive(Debug)]
pub(crate) struct PendingWrites {
    data: [File; 3],
    metadata: [File; 3],
}

impl PendingWrites {
    /// The counters of the btrfs that `file` lies on. They stay open: reading one is then a single
    /// system call.
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

    /// Data that is taken and not yet accounted for.
    pub(crate) fn data(&self) -> std::io::Result<Bytes> {
        sum(&self.data)
    }

    /// Metadata that is taken or may be by the transaction under way, btrfs' own reserve included.
    pub(crate) fn metadata(&self) -> std::io::Result<Bytes> {
        sum(&self.metadata)
    }
}

/// Where the kernel shows the btrfs that `file` lies on. It is not there where sysfs is not
/// mounted, or a container does not have it.
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
        sum += Bytes::new(number.ok_or_else(|| std::io::Error::other("a counter of btrfs is no number"))?);
    }
    Ok(sum)
}

/// Whether `file` lies on a btrfs.
pub(crate) fn is_btrfs(file: impl AsFd) -> io::Result<bool> {
    // BTRFS_SUPER_MAGIC of include/uapi/linux/magic.h.
    const SUPER_MAGIC: u64 = 0x9123_683e;
    Ok(rustix::fs::fstatfs(file)?.f_type as u64 == SUPER_MAGIC)
}

/// Reads the space of the btrfs that `file` lies on.
///
/// # Errors
/// `ENOTTY` when it is no btrfs.
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
            // While a balance converts, the dearer one.
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

/// Longer than most commits take.
const WAKE_AGAIN: std::time::Duration = std::time::Duration::from_millis(200);

/// Commits the transaction under way and waits for it. Unlike `syncfs`, it does not write out what
/// guests and others have dirty.
///
/// # Errors
/// `ENOTTY` when it is no btrfs; what the commit fails with.
pub(crate) fn commit(file: impl AsFd) -> io::Result<()> {
    let fd = file.as_fd();
    // SAFETY: the kernel writes the transaction's number, a u64.
    let begin = || unsafe { ioctl(fd, Getter::<START_SYNC, u64>::new()) };
    let transaction = begin()?;
    // The kernel's thread is only woken: while it ends the commit before, it does not hear that,
    // and would sleep until its timer of 30 s. So it is woken again for as long as it takes.
    std::thread::scope(|scope| {
        let (done, waiting) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            while waiting.recv_timeout(WAKE_AGAIN) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) && begin().is_ok()
            {
            }
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
            slots: SLOTS as u64,
            total: 0,
        },
        spaces: [SpaceInfo::default(); SLOTS],
    };
    // SAFETY: the kernel writes at most `slots` entries behind the header, and there is room for
    // SLOTS of them.
    unsafe { ioctl(file.as_fd(), Updater::<SPACE_INFO, SpaceArgs>::new(&mut args))? };
    let filled = usize::try_from(args.header.total).map_or(SLOTS, |total| total.min(SLOTS));
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

/// The size of all devices, how much of it is in chunks, and how many they are.
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
            // Numbers of devices that were removed stay unused.
            Err(io::Errno::NODEV) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((size, allocated, info.num_devices))
}

const _: () = assert!(size_of::<InoLookupArgs>() == 4096);
const _: () = assert!(size_of::<DevInfoArgs>() == 4096 && size_of::<FsInfoArgs>() == 1024);
