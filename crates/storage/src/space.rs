//! How much can really be written: the pool and the host disk under it, seen as one.

use crate::backing::FileSystem;
use crate::btrfs::{ChunkSpace, PendingWrites, chunk_space};
use crate::error::StorageError;
use crate::quota::{Allowance, Quota};
use crate::size::Bytes;
use rustix::fs::{fstat, fstatvfs, statvfs};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

/// Metadata room that must stay within reach before btrfs is counted on to take more data. Below
/// it, unallocated space is set aside for metadata chunks; at zero, nothing is free, whatever `df`
/// says.
const METADATA_HEADROOM: Bytes = Bytes::from_mib(128);

/// Metadata that a block of data takes when it is an extent of its own, as a guest that writes here
/// and there can make all of them: one item of 78 bytes in the file's tree and one in the tree of
/// extents, in leaves that are two thirds full or better. Measured: 172 bytes for each of 98,000
/// blocks written in random order.
const METADATA_PER_BLOCK: f64 = 256.0;

/// The same of XFS: 16 bytes in the file's map, 24 in the reverse map, 12 in the tree of shared
/// extents, in blocks that are at least half full (XFS Algorithms & Data Structures, 3rd edition,
/// chapters 11 to 13).
const XFS_METADATA_PER_BLOCK: f64 = 104.0;

/// Metadata room below which nothing is free when no further chunk can be made for it: what is
/// under way, and the deletions that make room again, still have to fit.
const METADATA_FLOOR: Bytes = Bytes::from_mib(32);

/// The pool's space at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Size of the pool.
    pub capacity: Bytes,
    /// Data in use, each shared block counted once.
    pub used: Bytes,
    /// What can really be written: the smaller of what the pool and what the host disk can still
    /// take.
    pub free: Bytes,
    /// What the pool alone could take.
    pub pool_free: Bytes,
    /// Free space of the host disk under the pool image; `None` for a pool that lies on none.
    pub host_free: Option<Bytes>,
    /// Pool space in no chunk yet. XFS has no chunks: zero.
    pub unallocated: Bytes,
    /// Size of the metadata chunks, and what of it is used; a part of the rest is the file system's
    /// own reserve. Zero on XFS, which takes metadata where it takes data.
    pub metadata_total: Bytes,
    /// See [`Space::metadata_total`].
    pub metadata_used: Bytes,
    /// The data that pool and host disk can hold in all, what they hold included, even if every
    /// block of it becomes an extent of its own.
    pub backable: Bytes,
    /// At most this much of `used` is something else than blocks that disks map in extents of their
    /// own: templates, what disks share, extents held for a part of them. Without a fresh
    /// measurement, all that is used.
    pub fixed: Bytes,
}

impl Space {
    /// Reads the space of the pool that `pool` lies on, over `image` when it is a loop device's
    /// backing file.
    pub(crate) fn read(pool: &File, file_system: &FileSystem, image: Option<&Path>) -> Result<Space, StorageError> {
        match file_system {
            FileSystem::Btrfs(pending, quota) => {
                let space = Space::of_btrfs(pool, pending, image)?;
                let allowance = quota.allowance(pool).map_err(unread_quota)?;
                Ok(allowance.map_or(space, |allowance| space.within(allowance)))
            }
            FileSystem::Xfs => Space::of_xfs(pool),
        }
    }

    /// The same with a quota over the pool's folder: what others have on the same file system
    /// counts no more, and the limit is all there is.
    fn within(self, allowance: Allowance) -> Space {
        let free = self.free.min(allowance.left);
        if allowance.limit >= self.capacity {
            return Space { free, ..self };
        }
        let used = self.used.min(allowance.limit - allowance.left);
        Space {
            capacity: allowance.limit,
            used,
            free,
            pool_free: self.pool_free.min(allowance.left),
            backable: self.backable.min(used + free),
            fixed: self.fixed.min(used),
            ..self
        }
    }

    /// XFS takes what is written off what is free at once, and has no second limit.
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
            backable: (used + free).scaled(1.0 / (1.0 + XFS_METADATA_PER_BLOCK / 4096.0)),
            fixed: used,
        })
    }

    /// `free = min(pool free, host free + blocks the image owns and the pool does not use)`: a
    /// block that the image already owns can be written again without the host disk's help.
    fn of_btrfs(pool: &File, pending: &PendingWrites, image: Option<&Path>) -> Result<Space, StorageError> {
        let chunks =
            chunk_space(pool).map_err(|errno| StorageError::io("read the space of", "the pool", errno.into()))?;
        // Taken by btrfs and not accounted for until its next commit, half a minute away at most:
        // gone all the same.
        let unread = |error| StorageError::io("read the uncommitted writes of", "the pool", error);
        let mut pool_free = writable(&chunks, pending.metadata().map_err(unread)?);
        let pending = pending.data().map_err(unread)?;
        pool_free = pool_free - pending;
        if chunks.devices > 1 {
            // How much of it finds room on several devices at once, btrfs knows.
            let stat =
                fstatvfs(pool).map_err(|errno| StorageError::io("read the space of", "the pool", errno.into()))?;
            pool_free = pool_free.min(Bytes::from_blocks(stat.f_bavail, stat.f_frsize));
        }
        // What can be held in the end does not depend on the transaction under way.
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
            backable: backable(holdable, &chunks),
            fixed: chunks.data_used,
        })
    }
}

/// Data bytes that btrfs can still take: room in its data chunks, and unallocated space less what
/// metadata will want of it. `pending` is metadata that the transaction under way may take, btrfs'
/// own reserve included: several times what it will, so it decides only whether there is anything
/// left when no chunk can be made for it.
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

/// Of `holdable` bytes, what can be data when the metadata for it has to be made out of the same
/// space.
///
/// Data `x` needs `x ÷ 4096 × METADATA_PER_BLOCK` of metadata. What the metadata chunks cannot take
/// becomes further chunks. With each byte of data stored `d` times and each of metadata `m` times,
/// it is the largest `x` with `d·x + m × (x × share − chunks) ≤ d × holdable`.
fn backable(holdable: Bytes, chunks: &ChunkSpace) -> Bytes {
    let room = chunks.metadata_total - chunks.global_reserve;
    let share = METADATA_PER_BLOCK / 4096.0;
    let (d, m) = (chunks.data_copies, chunks.metadata_copies);
    let raw = Bytes::from_blocks(holdable.as_u64(), d) + Bytes::from_blocks(room.as_u64(), m);
    holdable.min(raw.scaled(1.0 / (d as f64 + m as f64 * share)))
}

/// What an unprivileged program could write to the folder or file `path`: what its file system has
/// free, and its quotas allow.
pub(crate) fn available(path: &Path) -> Result<Bytes, StorageError> {
    let failed = |error| StorageError::io("read the free space of", path.display(), error);
    let free = |path: &Path| {
        let stat = statvfs(path).map_err(|errno| failed(errno.into()))?;
        Ok::<_, StorageError>(Bytes::from_blocks(stat.f_bavail, stat.f_frsize))
    };
    let mut available = free(path)?;
    let file = File::open(path).map_err(failed)?;
    // Of a project with a quota on XFS or ext4, statfs tells what that allows, but of a folder
    // alone: a file does not hand its project on.
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

/// The size of a block device.
pub(crate) fn device_size(device: &Path) -> Result<Bytes, StorageError> {
    let size = File::open(device).and_then(|mut device| device.seek(SeekFrom::End(0)));
    size.map(Bytes::new)
        .map_err(|error| StorageError::io("read the size of", device.display(), error))
}

/// The blocks a file owns; `st_blocks` counts 512 bytes whatever the file system's block size.
pub(crate) fn allocated(path: &Path) -> Result<Bytes, StorageError> {
    let stat = rustix::fs::stat(path).map_err(|errno| StorageError::io("read", path.display(), errno.into()))?;
    Ok(Bytes::from_blocks(u64::try_from(stat.st_blocks).unwrap_or(0), 512))
}

/// The blocks an open file owns.
pub(crate) fn allocated_of(file: &File) -> rustix::io::Result<Bytes> {
    Ok(Bytes::from_blocks(
        u64::try_from(fstat(file)?.st_blocks).unwrap_or(0),
        512,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::Gib;

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
    fn room_in_data_chunks_and_unallocated_space_can_be_written() {
        assert_eq!(writable(&chunks(), Bytes::ZERO), Gib::new(25).bytes());
    }

    #[test]
    fn metadata_that_runs_short_takes_its_share_of_the_unallocated_space_first() {
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
    fn metadata_for_scattered_blocks_is_taken_out_of_what_can_be_backed() {
        let (chunks, holdable) = (chunks(), Gib::new(29).bytes());
        let data = backable(holdable, &chunks);
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
        assert_eq!(backable(holdable, &ample), holdable);
    }

    #[test]
    fn data_that_is_stored_twice_takes_twice_the_unallocated_space() {
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
    fn metadata_of_the_transaction_under_way_is_gone_all_the_same() {
        let full = ChunkSpace {
            unallocated: Bytes::from_mib(10),
            ..chunks()
        };
        assert!(writable(&full, Bytes::from_mib(300)) > Bytes::ZERO);
        assert_eq!(writable(&full, Bytes::from_mib(390)), Bytes::ZERO);
        // Where a chunk can be made for it, it takes nothing.
        assert_eq!(
            writable(&chunks(), Bytes::from_mib(390)),
            writable(&chunks(), Bytes::ZERO)
        );
    }
}
