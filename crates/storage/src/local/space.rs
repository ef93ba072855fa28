//! Reads the writable space: the pool and the host disk under it, combined.

use crate::error::StorageError;
use crate::local::btrfs::{ChunkSpace, PendingWrites, chunk_space};
use crate::local::pool_fs::PoolFs;
use crate::local::quota::{Allowance, Quota};
use crate::space::Space;
use rustix::fs::{fstatvfs, statvfs};
use scalebox_units::Bytes;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

/// Metadata space that must be available before btrfs can be expected to take more data. If less is
/// free, unallocated space is set aside for metadata chunks. Without free metadata space, nothing
/// can be written, whatever `df` reports.
const METADATA_HEADROOM: Bytes = Bytes::from_mib(128);

/// Metadata per block of data in the worst case, in bytes: each block is an extent. Scattered
/// writes of a guest can make it so. An extent takes one item of 78 bytes in the file's tree and
/// one in the extent tree, in leaves that are at least two thirds full. Measured: 172 bytes for
/// each of 98,000 blocks written in random order.
const METADATA_PER_BLOCK: f64 = 256.0;

/// Metadata per block of data on XFS in the worst case, in bytes. An extent takes 16 bytes in the
/// file's map, 24 in the reverse map, and 12 in the tree of shared extents, in blocks that are at
/// least half full (XFS Algorithms & Data Structures, 3rd edition, chapters 11 to 13).
const XFS_METADATA_PER_BLOCK: f64 = 104.0;

/// Minimum free metadata space when no further metadata chunk can be allocated. Below it nothing
/// counts as free, because the transaction in progress, and the deletions that free space again,
/// must still fit.
const METADATA_FLOOR: Bytes = Bytes::from_mib(32);

/// Reads the space of the pool whose root folder is `pool`. `image` is the backing file of its
/// loop device, if it has one.
pub(crate) fn read(pool: &File, file_system: &PoolFs, image: Option<&Path>) -> Result<Space, StorageError> {
    match file_system {
        PoolFs::Btrfs(pending, quota) => {
            let space = of_btrfs(pool, pending, image)?;
            let allowance = quota.allowance(pool).map_err(unread_quota)?;
            Ok(allowance.map_or(space, |allowance| within(space, allowance)))
        }
        PoolFs::Xfs => of_xfs(pool),
        #[cfg(feature = "simulated")]
        PoolFs::Simulated(space) => Ok(space.read()),
    }
}

/// Applies a quota on the pool's folder. The limit is then the capacity, and other data on the
/// same file system no longer counts.
fn within(space: Space, allowance: Allowance) -> Space {
    let free = space.free.min(allowance.left);
    if allowance.limit >= space.capacity {
        return Space { free, ..space };
    }
    let used = space.used.min(allowance.limit - allowance.left);
    Space {
        capacity: allowance.limit,
        used,
        free,
        pool_free: space.pool_free.min(allowance.left),
        worst_case_capacity: space.worst_case_capacity.min(used + free),
        unreclaimable: space.unreclaimable.min(used),
        ..space
    }
}

/// Reads the space of an XFS. It updates its free space at once and has no second limit.
fn of_xfs(pool: &File) -> Result<Space, StorageError> {
    let stat = fstatvfs(pool).map_err(|errno| StorageError::io("read the space of", "the pool", errno.into()))?;
    let blocks = |count| Bytes::from_blocks(count, stat.f_frsize);
    let (capacity, free) = (blocks(stat.f_blocks), blocks(stat.f_bavail));
    let used = capacity - blocks(stat.f_bfree);
    Ok(Space {
        capacity,
        used,
        free,
        pool_free: free,
        host_free: None,
        unallocated: Bytes::ZERO,
        metadata_total: Bytes::ZERO,
        metadata_used: Bytes::ZERO,
        worst_case_capacity: (used + free).scaled(1.0 / (1.0 + XFS_METADATA_PER_BLOCK / 4096.0)),
        unreclaimable: used,
    })
}

/// Reads the space of a btrfs. `free = min(pool free, host free + blocks the image owns and the
/// pool does not use)`: a block that the image already owns can be rewritten without taking
/// space on the host disk.
fn of_btrfs(pool: &File, pending: &PendingWrites, image: Option<&Path>) -> Result<Space, StorageError> {
    let chunks = chunk_space(pool).map_err(|errno| StorageError::io("read the space of", "the pool", errno.into()))?;
    // Data that btrfs accepted but does not count before its next commit, within 30 s, is no
    // longer free.
    let unread = |error| StorageError::io("read the uncommitted writes of", "the pool", error);
    let mut pool_free = writable(&chunks, pending.metadata().map_err(unread)?);
    let pending = pending.data().map_err(unread)?;
    pool_free = pool_free - pending;
    if chunks.devices > 1 {
        // Only btrfs can determine how much of it can be placed on several devices at once.
        let stat = fstatvfs(pool).map_err(|errno| StorageError::io("read the space of", "the pool", errno.into()))?;
        pool_free = pool_free.min(Bytes::from_blocks(stat.f_bavail, stat.f_frsize));
    }
    // The capacity does not depend on the transaction in progress.
    let holdable = writable(&chunks, Bytes::ZERO) + chunks.data_used;
    let (host_free, free, holdable) = match image {
        None => (None, pool_free, holdable),
        Some(image) => {
            let host_free = available(image)?;
            let owned = allocated(image)?;
            (
                Some(host_free),
                pool_free.min(host_free + (owned - chunks.raw_used - pending)),
                holdable.min(host_free + owned - (chunks.raw_used - chunks.data_used)),
            )
        }
    };
    Ok(Space {
        capacity: chunks.device_size.scaled(1.0 / chunks.data_copies as f64),
        used: chunks.data_used,
        free,
        pool_free,
        host_free,
        unallocated: chunks.unallocated,
        metadata_total: chunks.metadata_total,
        metadata_used: chunks.metadata_used,
        worst_case_capacity: worst_case_capacity(holdable, &chunks),
        unreclaimable: chunks.data_used,
    })
}

/// Returns the data bytes that btrfs can still take. They are the free space in its data chunks,
/// plus unallocated space minus the share that metadata will need. `pending` is the metadata that
/// the transaction in progress may take, including btrfs' own reserve. That is several times the
/// metadata that the transaction will use, so it only matters when no further chunk can be
/// allocated.
fn writable(chunks: &ChunkSpace, pending: Bytes) -> Bytes {
    let unused = chunks.metadata_total - chunks.metadata_used;
    let wanted = |free: Bytes| Bytes::from_blocks((METADATA_HEADROOM - free).as_u64(), chunks.metadata_copies);
    let now = unused - pending.max(chunks.global_reserve);
    if now < METADATA_FLOOR && chunks.unallocated < wanted(now) {
        return Bytes::ZERO;
    }
    let raw = chunks.unallocated - wanted(unused - chunks.global_reserve);
    (chunks.data_total - chunks.data_used) + raw.scaled(1.0 / chunks.data_copies as f64)
}

/// Returns the part of `holdable` that can be data when its metadata has to fit in the same space.
///
/// Data `x` needs `x ÷ 4096 × METADATA_PER_BLOCK` bytes of metadata. Metadata that does not fit in
/// the existing metadata chunks needs further chunks. With `d` copies of data and `m` copies of
/// metadata, the result is the largest `x` with `d·x + m × (x × share − chunks) ≤ d × holdable`.
fn worst_case_capacity(holdable: Bytes, chunks: &ChunkSpace) -> Bytes {
    let room = chunks.metadata_total - chunks.global_reserve;
    let share = METADATA_PER_BLOCK / 4096.0;
    let (d, m) = (chunks.data_copies, chunks.metadata_copies);
    let raw = Bytes::from_blocks(holdable.as_u64(), d) + Bytes::from_blocks(room.as_u64(), m);
    holdable.min(raw.scaled(1.0 / (d as f64 + m as f64 * share)))
}

/// Returns how much an unprivileged program could write to the folder or file `path`. This depends
/// on the free space and the quotas of its file system.
pub(crate) fn available(path: &Path) -> Result<Bytes, StorageError> {
    let failed = |error| StorageError::io("read the free space of", path.display(), error);
    let free = |path: &Path| {
        let stat = statvfs(path).map_err(|errno| failed(errno.into()))?;
        Ok::<_, StorageError>(Bytes::from_blocks(stat.f_bavail, stat.f_frsize))
    };
    let mut available = free(path)?;
    let file = File::open(path).map_err(failed)?;
    // On XFS and ext4, statfs reports the quota of a project, but only for a folder: files do not
    // pass their project on.
    let is_folder = file.metadata().map_err(failed)?.is_dir();
    if let Some(folder) = path.parent().filter(|_| !is_folder) {
        available = available.min(free(folder)?);
    }
    if let Some(quota) = Quota::of(&file).map_err(unread_quota)?
        && let Some(allowance) = quota.allowance(&file).map_err(unread_quota)?
    {
        available = available.min(allowance.left);
    }
    Ok(available)
}

fn unread_quota(error: io::Error) -> StorageError {
    StorageError::io("read the quotas of", "the pool's file system", error)
}

/// Returns the size of a block device.
pub(crate) fn device_size(device: &Path) -> Result<Bytes, StorageError> {
    let size = File::open(device).and_then(|mut device| device.seek(SeekFrom::End(0)));
    size.map(Bytes::new)
        .map_err(|error| StorageError::io("read the size of", device.display(), error))
}

/// Returns the size of the blocks a file owns; `st_blocks` counts 512 bytes on every file system.
pub(crate) fn allocated(path: &Path) -> Result<Bytes, StorageError> {
    let stat = rustix::fs::stat(path).map_err(|errno| StorageError::io("read", path.display(), errno.into()))?;
    Ok(Bytes::from_blocks(u64::try_from(stat.st_blocks).unwrap_or(0), 512))
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_units::Gib;

    fn chunks() -> ChunkSpace {
        ChunkSpace {
            device_size: Gib::new(30).bytes(),
            unallocated: Gib::new(20).bytes(),
            data_total: Gib::new(9).bytes(),
            data_used: Gib::new(4).bytes(),
            metadata_total: Bytes::from_mib(512),
            metadata_used: Bytes::from_mib(100),
            global_reserve: Bytes::from_mib(64),
            metadata_copies: 2,
            data_copies: 1,
            devices: 1,
            raw_used: Gib::new(4).bytes(),
        }
    }

    #[test]
    fn free_space_in_data_chunks_and_unallocated_space_can_be_written() {
        assert_eq!(writable(&chunks(), Bytes::ZERO), Gib::new(25).bytes());
    }

    #[test]
    fn scarce_metadata_reserves_unallocated_space() {
        let short = ChunkSpace {
            metadata_used: Bytes::from_mib(400),
            ..chunks()
        };
        assert_eq!(
            writable(&short, Bytes::ZERO),
            Gib::new(25).bytes() - Bytes::from_mib(2 * 80)
        );
    }

    #[test]
    fn metadata_of_scattered_blocks_lowers_the_worst_case_capacity() {
        let (chunks, holdable) = (chunks(), Gib::new(29).bytes());
        let data = worst_case_capacity(holdable, &chunks);
        let metadata = data.scaled(256.0 / 4096.0) - (chunks.metadata_total - chunks.global_reserve);
        let all = data + Bytes::from_blocks(metadata.as_u64(), 2);
        assert!(
            all <= holdable && all + Bytes::from_kib(64) > holdable,
            "{data} and {metadata}"
        );
        let ample = ChunkSpace {
            metadata_total: Gib::new(4).bytes(),
            ..chunks
        };
        assert_eq!(worst_case_capacity(holdable, &ample), holdable);
    }

    #[test]
    fn mirrored_data_takes_twice_the_unallocated_space() {
        let mirrored = ChunkSpace {
            data_copies: 2,
            ..chunks()
        };
        assert_eq!(writable(&mirrored, Bytes::ZERO), Gib::new(15).bytes());
    }

    #[test]
    fn nothing_is_free_once_metadata_cannot_grow() {
        let dead = ChunkSpace {
            metadata_used: Bytes::from_mib(448),
            unallocated: Bytes::from_mib(10),
            ..chunks()
        };
        assert_eq!(writable(&dead, Bytes::ZERO), Bytes::ZERO);
    }

    #[test]
    fn metadata_of_the_transaction_in_progress_is_not_free() {
        let full = ChunkSpace {
            unallocated: Bytes::from_mib(10),
            ..chunks()
        };
        assert!(writable(&full, Bytes::from_mib(300)) > Bytes::ZERO);
        assert_eq!(writable(&full, Bytes::from_mib(390)), Bytes::ZERO);
        // Where a chunk can be allocated for the metadata, no data space is set aside.
        assert_eq!(
            writable(&chunks(), Bytes::from_mib(390)),
            writable(&chunks(), Bytes::ZERO)
        );
    }
}
