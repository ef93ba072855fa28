//! Which file refers to which extent of a btrfs: one walk over a subvolume's tree, by ioctl.
//!
//! FIEMAP shows what a file maps, not what it holds: an extent that was overwritten in part stays whole on disk for as long as anybody
//! refers to a block of it. The tree has both numbers in each `EXTENT_DATA` item. It is read in batches, each from a consistent tree;
//! what a guest writes meanwhile may be in or not. Layouts: `include/uapi/linux/btrfs.h` and `btrfs_tree.h` of the kernel.

use rustix::fd::AsFd;
use rustix::io;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

const TREE_SEARCH_V2: Opcode = opcode::read_write::<SearchHead>(0x94, 17);
/// The kernel holds the tree for one batch: about two thousand items.
const BATCH: usize = 256 << 10;

const FIRST_INODE: u64 = 256;
const EXTENT_DATA: u32 = 108;
/// A file so small that it lies in the tree itself.
const INLINE: u8 = 0;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SearchKey {
    /// 0: the subvolume that the file asked through lies in.
    tree_id: u64,
    min_objectid: u64,
    max_objectid: u64,
    min_offset: u64,
    max_offset: u64,
    min_transid: u64,
    max_transid: u64,
    min_type: u32,
    max_type: u32,
    nr_items: u32,
    unused: u32,
    reserved: [u64; 4],
}

#[repr(C)]
struct SearchHead {
    key: SearchKey,
    buf_size: u64,
}

#[repr(C)]
struct SearchArgs {
    head: SearchHead,
    buf: [u8; BATCH],
}

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

/// Hands every reference of the subvolume that `file` lies in to `each`, holes and inline data left out.
///
/// # Errors
/// `ENOTTY` when it is no btrfs, `EPERM` without `CAP_SYS_ADMIN`.
pub(crate) fn walk(file: impl AsFd, mut each: impl FnMut(Reference)) -> io::Result<()> {
    let mut args = Box::new(SearchArgs {
        head: SearchHead {
            key: SearchKey::default(),
            buf_size: BATCH as u64,
        },
        buf: [0; BATCH],
    });
    let mut from = Some((FIRST_INODE, 0, 0));
    while let Some((objectid, kind, offset)) = from {
        args.head.key = SearchKey {
            min_objectid: objectid,
            min_type: kind,
            min_offset: offset,
            max_objectid: u64::MAX,
            max_type: u32::MAX,
            max_offset: u64::MAX,
            max_transid: u64::MAX,
            nr_items: u32::MAX,
            ..SearchKey::default()
        };
        // SAFETY: the kernel writes at most `buf_size` bytes behind the head, and `buf` has as many.
        unsafe { ioctl(file.as_fd(), Updater::<TREE_SEARCH_V2, SearchArgs>::new(&mut args))? };
        let last = read_batch(&args.buf, args.head.key.nr_items, &mut each);
        from = last.and_then(following);
    }
    Ok(())
}

type Key = (u64, u32, u64);

/// Reads the items of one batch; returns the key of the last.
fn read_batch(mut buf: &[u8], items: u32, each: &mut impl FnMut(Reference)) -> Option<Key> {
    let mut last = None;
    for _ in 0..items {
        // Header: transid, objectid, offset, then type and length; in the machine's own byte order.
        let (head, rest) = buf.split_at_checked(32)?;
        let objectid = u64::from_ne_bytes(field(head, 8)?);
        let offset = u64::from_ne_bytes(field(head, 16)?);
        let kind = u32::from_ne_bytes(field(head, 24)?);
        let length = u32::from_ne_bytes(field(head, 28)?);
        let (item, rest) = rest.split_at_checked(length as usize)?;
        if kind == EXTENT_DATA {
            extent_data(objectid, item).into_iter().for_each(&mut *each);
        }
        last = Some((objectid, kind, offset));
        buf = rest;
    }
    last
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

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// The least key after `key`; `None` after the last there can be.
fn following((objectid, kind, offset): Key) -> Option<Key> {
    if let Some(offset) = offset.checked_add(1) {
        Some((objectid, kind, offset))
    } else if let Some(kind) = kind.checked_add(1) {
        Some((objectid, kind, 0))
    } else {
        Some((objectid.checked_add(1)?, 0, 0))
    }
}

const _: () = assert!(size_of::<SearchKey>() == 104 && size_of::<SearchHead>() == 112);

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

    #[test]
    fn keys_follow_one_another_to_the_end() {
        assert_eq!(following((256, 108, 5)), Some((256, 108, 6)));
        assert_eq!(following((256, 108, u64::MAX)), Some((256, 109, 0)));
        assert_eq!(following((256, u32::MAX, u64::MAX)), Some((257, 0, 0)));
        assert_eq!(following((u64::MAX, u32::MAX, u64::MAX)), None);
    }
}
