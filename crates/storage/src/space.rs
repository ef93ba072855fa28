//! How much can really be written: the pool and the host disk under it, seen as one.

use crate::btrfs::{ChunkSpace, PendingWrites, chunk_space};
use crate::error::StorageError;
use crate::size::Bytes;
use rustix::fs::{fstat, statvfs};
use std::fs::File;
use std::path::Path;

/// Metadata room that must stay within reach before btrfs is counted on to take more data. Below it, unallocated space is set
/// aside for metadata chunks; at zero, nothing is free, whatever `df` says.
const METADATA_HEADROOM: Bytes = Bytes::from_mib(128);

/// The pool's space at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Size of the pool.
    pub capacity: Bytes,
    /// Data in use, each shared block counted once.
    pub used: Bytes,
    /// What can really be written: the smaller of what the pool and what the host disk can still take.
    pub free: Bytes,
    /// What the pool alone could take.
    pub pool_free: Bytes,
    /// Free space of the host disk under the pool image; `None` for a pool on a device of its own.
    pub host_free: Option<Bytes>,
    /// Pool space in no chunk yet.
    pub unallocated: Bytes,
    /// Size of the metadata chunks, and what of it is used; a part of the rest is the file system's own reserve.
    pub metadata_total: Bytes,
    /// See [`Space::metadata_total`].
    pub metadata_used: Bytes,
}

impl Space {
    /// Reads the space of the pool that `pool` lies on, over `image` when it is a loop device's backing file.
    ///
    /// `free = min(pool free, host free + blocks the image owns and the pool does not use)`: a block that the image
    /// already owns can be written again without the host disk's help.
    pub(crate) fn read(pool: &File, pending: &PendingWrites, image: Option<&Path>) -> Result<Space, StorageError> {
        let chunks =
            chunk_space(pool).map_err(|errno| StorageError::io("read the space of", "the pool", errno.into()))?;
        // Taken by btrfs and not accounted for until its next commit, half a minute away at most: gone all the same.
        let pending = pending
            .read()
            .map_err(|error| StorageError::io("read the uncommitted writes of", "the pool", error))?;
        let pool_free = writable(&chunks) - pending;
        let (host_free, free) = match image {
            None => (None, pool_free),
            Some(image) => {
                let host_free = available(image)?;
                let owned = allocated(image)?;
                (
                    Some(host_free),
                    pool_free.min(host_free + (owned - chunks.raw_used - pending)),
                )
            }
        };
        Ok(Space {
            capacity: chunks.device_size,
            used: chunks.data_used,
            free,
            pool_free,
            host_free,
            unallocated: chunks.unallocated,
            metadata_total: chunks.metadata_total,
            metadata_used: chunks.metadata_used,
        })
    }
}

/// Data bytes that btrfs can still take: room in its data chunks, and unallocated space less what metadata will want of it.
fn writable(chunks: &ChunkSpace) -> Bytes {
    let metadata_free = chunks.metadata_total - chunks.metadata_used - chunks.global_reserve;
    let wanted = Bytes::from_blocks((METADATA_HEADROOM - metadata_free).as_u64(), chunks.metadata_copies);
    if metadata_free == Bytes::ZERO && chunks.unallocated < wanted {
        return Bytes::ZERO;
    }
    (chunks.data_total - chunks.data_used) + (chunks.unallocated - wanted)
}

/// What an unprivileged program could write to the file system that `path` lies on.
pub(crate) fn available(path: &Path) -> Result<Bytes, StorageError> {
    let stat =
        statvfs(path).map_err(|errno| StorageError::io("read the free space of", path.display(), errno.into()))?;
    Ok(Bytes::from_blocks(stat.f_bavail, stat.f_frsize))
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
            raw_used: Gib::new(4).bytes(),
        }
    }

    #[test]
    fn room_in_data_chunks_and_unallocated_space_can_be_written() {
        assert_eq!(writable(&chunks()), Gib::new(25).bytes());
    }

    #[test]
    fn metadata_that_runs_short_takes_its_share_of_the_unallocated_space_first() {
        let short = ChunkSpace {
            metadata_used: Bytes::from_mib(400),
            ..chunks()
        };
        assert_eq!(writable(&short), Gib::new(25).bytes() - Bytes::from_mib(2 * 80));
    }

    #[test]
    fn nothing_is_free_once_metadata_cannot_grow() {
        let dead = ChunkSpace {
            metadata_used: Bytes::from_mib(448),
            unallocated: Bytes::from_mib(10),
            ..chunks()
        };
        assert_eq!(writable(&dead), Bytes::ZERO);
    }
}
