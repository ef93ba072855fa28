//! The extents of a btrfs and the files that refer to them: one walk over a subvolume's tree, by
//! ioctl.
//!
//! FIEMAP shows the blocks that a file maps, not the extents that it keeps in use: a partly
//! overwritten extent stays whole on disk as long as any file refers to a block of it. The tree has
//! both numbers in each `EXTENT_DATA` item. It is read in batches, each from a consistent tree;
//! concurrent writes may or may not be included. Layouts: `include/uapi/linux/btrfs.h` and
//! `btrfs_tree.h` of the kernel.

use crate::local::tree_search::{self, FIRST, LAST, field};
use rustix::fd::AsFd;
use rustix::io;

/// Bytes per batch, about two thousand items; the kernel locks the tree for one batch.
const BATCH: usize = 256 << 10;

const FIRST_INODE: u64 = 256;
const EXTENT_DATA: u32 = 108;
/// Type of an extent whose data is in the tree itself, because the file is small.
const INLINE: u8 = 0;
/// The number that stands for the subvolume of the file passed to the ioctl.
const OWN_TREE: u64 = 0;

/// A reference of a file to an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reference {
    /// The inode of the file.
    pub(crate) inode: u64,
    /// The start of the extent in the file system's address space, which identifies it.
    pub(crate) start: u64,
    /// The size of the whole extent, in bytes.
    pub(crate) size: u64,
    /// Number of bytes of the extent that this reference maps.
    pub(crate) mapped: u64,
}

/// Calls `each` for every reference in the subvolume that contains `file`, except holes and inline
/// data.
///
/// # Errors
/// `ENOTTY` when it is not a btrfs, `EPERM` without `CAP_SYS_ADMIN`.
pub(crate) fn walk(file: impl AsFd, mut each: impl FnMut(Reference)) -> io::Result<()> {
    let all = (FIRST_INODE, FIRST.1, FIRST.2)..=LAST;
    tree_search::search::<BATCH>(file, OWN_TREE, all, |(inode, kind, _), item| {
        if kind == EXTENT_DATA {
            extent_data(inode, item).into_iter().for_each(&mut each);
        }
    })
}

/// Parses a `struct btrfs_file_extent_item`, little-endian and packed.
fn extent_data(inode: u64, item: &[u8]) -> Option<Reference> {
    if *item.get(20)? == INLINE {
        return None;
    }
    let reference = Reference {
        inode,
        start: u64::from_le_bytes(field(item, 21)?),
        size: u64::from_le_bytes(field(item, 29)?),
        mapped: u64::from_le_bytes(field(item, 45)?),
    };
    // An address of 0 is a hole.
    (reference.start != 0).then_some(reference)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(kind: u8, start: u64, size: u64, offset: u64, mapped: u64) -> Vec<u8> {
        let mut item = vec![0; 20];
        item.push(kind);
        for number in [start, size, offset, mapped] {
            item.extend(number.to_le_bytes());
        }
        item
    }

    #[test]
    fn an_extent_counts_in_full_when_a_file_maps_part_of_it() {
        let seen = extent_data(257, &item(1, 4096, 1 << 20, 8192, 4096)).unwrap();
        assert_eq!(
            (seen.inode, seen.start, seen.size, seen.mapped),
            (257, 4096, 1 << 20, 4096)
        );
    }

    #[test]
    fn holes_inline_data_and_truncated_items_are_not_extents() {
        assert_eq!(extent_data(257, &item(1, 0, 0, 0, 4096)), None);
        assert_eq!(extent_data(257, &item(INLINE, 1, 1, 1, 1)), None);
        assert_eq!(extent_data(257, &item(1, 4096, 4096, 0, 4096)[..40]), None);
    }
}
