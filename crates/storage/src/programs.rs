//! The outside programs of this crate: e2fsprogs, btrfs-progs and util-linux.

use crate::error::StorageError;
use scalebox_programs::Program;
use std::time::Duration;

/// Timeout of a program that works on one image. The largest disks take seconds; a file system
/// crafted to keep the program busy or waiting would take hours. The duration of the other programs
/// depends on the size of the pool.
const IMAGE_TIMEOUT: Duration = Duration::from_secs(300);

/// Detects the file system in an image.
pub(crate) const BLKID: Program = Program::new("blkid", "util-linux").within(IMAGE_TIMEOUT);
/// Grows and shrinks the pool's file system.
pub(crate) const BTRFS: Program = Program::new("btrfs", "btrfs-progs");
/// Edits an ext4 file system, in user space.
pub(crate) const DEBUGFS: Program = Program::new("debugfs", "e2fsprogs").within(IMAGE_TIMEOUT);
/// Checks an ext4 file system and replays its journal, in user space.
pub(crate) const E2FSCK: Program = Program::new("e2fsck", "e2fsprogs").within(IMAGE_TIMEOUT);
/// Discards the free blocks of a file system.
pub(crate) const FSTRIM: Program = Program::new("fstrim", "util-linux");
/// Sets direct I/O on a loop device, and updates the device after its file was resized.
pub(crate) const LOSETUP: Program = Program::new("losetup", "mount");
/// Makes the pool's file system.
pub(crate) const MKFS_BTRFS: Program = Program::new("mkfs.btrfs", "btrfs-progs");
/// Mounts the pool and creates its loop device.
pub(crate) const MOUNT: Program = Program::new("mount", "mount");
/// Grows an ext4 file system, in user space.
pub(crate) const RESIZE2FS: Program = Program::new("resize2fs", "e2fsprogs").within(IMAGE_TIMEOUT);
/// Unmounts the pool, which also removes its loop device.
pub(crate) const UMOUNT: Program = Program::new("umount", "mount");

/// All programs that pools need, to check for at start.
pub const PROGRAMS: [Program; 10] = [
    BLKID, BTRFS, DEBUGFS, E2FSCK, FSTRIM, LOSETUP, MKFS_BTRFS, MOUNT, RESIZE2FS, UMOUNT,
];

/// Checks that every one of [`PROGRAMS`] is installed.
///
/// # Errors
/// [`StorageError::Program`] for the first missing one.
pub fn require_programs() -> Result<(), StorageError> {
    Ok(scalebox_programs::require(&PROGRAMS)?)
}
