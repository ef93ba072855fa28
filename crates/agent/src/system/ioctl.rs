//! Calls of ioctl(2) that rustix has no function for.
//!
//! The numbers are from `linux/fs.h` (`FIFREEZE`, `FITHAW`, `FITRIM`), `fs/ext4/ext4.h`
//! (`EXT4_IOC_RESIZE_FS`) and `linux/btrfs.h` (`BTRFS_IOC_RESIZE`).

use rustix::fd::AsFd;
use rustix::io;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl, opcode};
use std::ffi::c_int;

const FIFREEZE: Opcode = opcode::read_write::<c_int>(b'X', 119);
const FITHAW: Opcode = opcode::read_write::<c_int>(b'X', 120);
const FITRIM: Opcode = opcode::read_write::<TrimRange>(b'X', 121);
const EXT4_IOC_RESIZE_FS: Opcode = opcode::write::<u64>(b'f', 16);
const BTRFS_IOC_RESIZE: Opcode = opcode::write::<BtrfsArguments>(0x94, 3);

/// `struct fstrim_range`.
#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    min_length: u64,
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct BtrfsArguments {
    fd: i64,
    name: [u8; 4088],
}

/// Freezes a file system: writes wait until it is thawed.
pub(crate) fn freeze(file: impl AsFd) -> io::Result<()> {
    // SAFETY: FIFREEZE ignores its argument (ioctl_fsfreeze in fs/ioctl.c).
    unsafe { ioctl(file, IntegerSetter::<FIFREEZE>::new_usize(0)) }
}

/// Thaws a file system.
pub(crate) fn thaw(file: impl AsFd) -> io::Result<()> {
    // SAFETY: FITHAW ignores its argument (ioctl_fsthaw in fs/ioctl.c).
    unsafe { ioctl(file, IntegerSetter::<FITHAW>::new_usize(0)) }
}

/// Discards the unused blocks of a file system, and returns their size in bytes.
pub(crate) fn trim(file: impl AsFd) -> io::Result<u64> {
    let mut range = TrimRange {
        start: 0,
        length: u64::MAX,
        min_length: 0,
    };
    // SAFETY: FITRIM reads and writes a struct fstrim_range.
    unsafe { ioctl(file, Updater::<FITRIM, TrimRange>::new(&mut range)) }?;
    Ok(range.length)
}

/// Grows an ext4 file system to a number of blocks.
pub(crate) fn resize_ext4(file: impl AsFd, blocks: u64) -> io::Result<()> {
    // SAFETY: EXT4_IOC_RESIZE_FS reads a u64.
    unsafe { ioctl(file, Setter::<EXT4_IOC_RESIZE_FS, u64>::new(blocks)) }
}

/// Grows a btrfs file system to the size of its first device.
pub(crate) fn grow_btrfs(file: impl AsFd) -> io::Result<()> {
    let mut arguments = BtrfsArguments { fd: 0, name: [0; 4088] };
    arguments.name[..3].copy_from_slice(b"max");
    // SAFETY: BTRFS_IOC_RESIZE reads a struct btrfs_ioctl_vol_args, whose name ends with a zero.
    unsafe { ioctl(file, Setter::<BTRFS_IOC_RESIZE, BtrfsArguments>::new(arguments)) }
}
