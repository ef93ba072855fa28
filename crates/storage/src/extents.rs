//! Which file refers to which extent of a btrfs: one walk over a subvolume's tree, by ioctl.
//!
//! FIEMAP shows what a file maps, not what it holds: an extent that was overwritten in part stays
//! whole on disk for as long as anybody refers to a block of it. The tree has both numbers in each
//! `EXTENT_DATA` item. It is read in batches, each from a consistent tree; what a guest writes
//! meanwhile may be in or not. Layouts: `include/uapi/linux/btrfs.h` and `btrfs_tree.h` of the
//! kernel.

use crate::tree_search::{self, FIRST, LAST, field};
use rustix::fd::AsFd;
use rustix::io;

/// The kernel holds the tree for one batch: about two thousand items.
const BATCH: usize = 256 << 10;

const FIRST_INODE: u64 = 256;
const EXTENT_DATA: u32 = 108;
/// A file so small that it lies in the tree itself.
const INLINE: u8 = 0;
/// The subvolume that the file asked through lies in.
const OWN_TREE: u64 = 0;

/// One reference of a file to an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reference {
    /// The file.
    pub(crate) inode: u64,
    /// Where the extent begins, in the file system's own address space: it names the extent.
    pub(crate) start: u64,
    /// What the whole extent takes, in bytes.
    pub(crate) size: u64,
    /// How much of it the file maps here, in bytes.
    pub(crate) mapped: u64,
}

/// Hands every reference of the subvolume that `file` lies in to `each`, holes and inline data left
/// out.
///
/// # Errors
/// `ENOTTY` when it is no btrfs, `EPERM` without `CAP_SYS_ADMIN`.
pub(crate) fn walk(file: impl AsFd, mut each: impl FnMut(Reference)) -> io::Result<()> {
    let all = (FIRST_INODE, FIRST.1, FIRST.2)..=LAST;
    tree_search::search::<BATCH>(file, OWN_TREE, all, |(inode, kind, _), item| {
        if kind == EXTENT_DATA {
            extent_data(inode, item).into_iter().for_each(&mut each);
        }
    })
}

/// `struct btrfs_file_extent_item`, little-endian and packed.
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
    fn an_extent_is_whole_though_a_file_maps_a_part_of_it() {
        let seen = extent_data(257, &item(1, 4096, 1 << 20, 8192, 4096)).unwrap();
        assert_eq!(
            (seen.inode, seen.start, seen.size, seen.mapped),
            (257, 4096, 1 << 20, 4096)
        );
    }

    #[test]
    fn holes_inline_data_and_what_is_cut_off_are_no_extents() {
        assert_eq!(extent_data(257, &item(1, 0, 0, 0, 4096)), None);
        assert_eq!(extent_data(257, &item(INLINE, 1, 1, 1, 1)), None);
        assert_eq!(extent_data(257, &item(1, 4096, 4096, 0, 4096)[..40]), None);
    }
}
