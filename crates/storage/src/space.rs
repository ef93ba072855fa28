//! The space of a pool at one moment, for every kind of backing.

use scalebox_units::Bytes;

/// The pool's space at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Size of the pool.
    pub capacity: Bytes,
    /// Data in use, each shared block counted once.
    pub used: Bytes,
    /// Space that can be written: the smaller of the pool's and the host disk's.
    pub free: Bytes,
    /// Space that the pool alone could take.
    pub pool_free: Bytes,
    /// Free space of the host disk under the pool image; `None` for a pool without an image.
    pub host_free: Option<Bytes>,
    /// Pool space not allocated to a chunk yet. Zero on XFS, which has no chunks.
    pub unallocated: Bytes,
    /// Size of the metadata chunks. Part of their free space is btrfs' own reserve. Zero on XFS,
    /// which allocates metadata from the same space as data.
    pub metadata_total: Bytes,
    /// The used part of [`Space::metadata_total`].
    pub metadata_used: Bytes,
    /// The worst-case capacity: the data that pool and host disk can hold in total, present data
    /// included. It assumes that every block becomes an extent of its own.
    pub worst_case_capacity: Bytes,
    /// Upper bound of the unreclaimable usage, the part of `used` that disks do not map in extents
    /// of their own. It consists of templates, shared extents, and extents that a disk maps only in
    /// part. Equal to `used` without a current measurement.
    pub unreclaimable: Bytes,
}
