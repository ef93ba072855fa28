//! Grows a file system to the size of its disk.

use crate::server::Failure;
use crate::system::ioctl;
use rustix::fs::{statfs, statvfs};
use scalebox_agent_api::{FailureCode, RootSize};
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Bytes of a sector in `/sys/dev/block/*/size`, regardless of the disk's own sectors.
const SECTOR: u64 = 512;

/// Grows the file system that is mounted at `target`, and returns its size. Does nothing if it has
/// the size of its disk.
///
/// # Errors
/// [`FailureCode::Unsupported`] unless it is ext4 or btrfs. Those of the kernel.
pub(crate) fn grow(target: &Path) -> Result<RootSize, Failure> {
    let failed = || Failure::io(format!("grow the file system at {}", target.display()));
    let mount = scalebox_mounts::mounted_at(target).map_err(failed())?.ok_or_else(|| {
        let error = format!("no file system is mounted at {}", target.display());
        Failure::new(FailureCode::NotFound, error)
    })?;
    let grown = match mount.fs_type.as_str() {
        "ext4" | "ext3" | "ext2" => grow_ext4(target, mount.device),
        "btrfs" => grow_btrfs(target),
        other => {
            let error = format!("the agent cannot grow {other}, the file system at {}", target.display());
            return Err(Failure::new(FailureCode::Unsupported, error));
        }
    };
    grown.and_then(|()| Ok(size(target)?)).map_err(failed())
}

fn grow_ext4(target: &Path, (major, minor): (u32, u32)) -> io::Result<()> {
    let size = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size"))?;
    let sectors: u64 = size.trim().parse().map_err(io::Error::other)?;
    let block = u64::try_from(statfs(target)?.f_bsize).map_err(io::Error::other)?;
    let blocks = sectors.saturating_mul(SECTOR).checked_div(block).unwrap_or(0);
    Ok(ioctl::resize_ext4(File::open(target)?, blocks)?)
}

fn grow_btrfs(target: &Path) -> io::Result<()> {
    Ok(ioctl::grow_btrfs(File::open(target)?)?)
}

/// Returns the size of the file system that contains `path`.
pub(crate) fn size(path: &Path) -> rustix::io::Result<RootSize> {
    let stat = statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok(RootSize {
        total: bytes(stat.f_blocks),
        used: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
    })
}
