//! Reads the trees of a btrfs by ioctl, in batches, each from a consistent tree. Requires
//! `CAP_SYS_ADMIN`.
//!
//! Layouts: `include/uapi/linux/btrfs.h` and `btrfs_tree.h` of the kernel.

use rustix::fd::AsFd;
use rustix::io;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::ops::RangeInclusive;

const TREE_SEARCH_V2: Opcode = opcode::read_write::<SearchHead>(0x94, 17);

/// The key of an item: object id, type, offset.
pub(crate) type Key = (u64, u32, u64);
/// The smallest possible key.
pub(crate) const FIRST: Key = (0, 0, 0);
/// The largest possible key.
pub(crate) const LAST: Key = (u64::MAX, u32::MAX, u64::MAX);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SearchKey {
    /// 0: the subvolume of the file passed to the ioctl.
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
struct SearchArgs<const BATCH: usize> {
    head: SearchHead,
    buf: [u8; BATCH],
}

/// Calls `each` for every item of `tree` whose key is in `keys`, reading `BATCH` bytes at a time.
/// Tree 0 is the subvolume that contains `file`.
///
/// # Errors
/// `ENOTTY` when it is not a btrfs, `ENOENT` when it has no such tree, `EPERM` without
/// `CAP_SYS_ADMIN`.
pub(crate) fn search<const BATCH: usize>(
    file: impl AsFd,
    tree: u64,
    keys: RangeInclusive<Key>,
    mut each: impl FnMut(Key, &[u8]),
) -> io::Result<()> {
    let mut args = Box::new(SearchArgs {
        head: SearchHead {
            key: SearchKey::default(),
            buf_size: BATCH as u64,
        },
        buf: [0; BATCH],
    });
    let (max_objectid, max_type, max_offset) = *keys.end();
    let mut from = Some(*keys.start());
    while let Some((min_objectid, min_type, min_offset)) = from.filter(|from| from <= keys.end()) {
        args.head.key = SearchKey {
            tree_id: tree,
            min_objectid,
            min_type,
            min_offset,
            max_objectid,
            max_type,
            max_offset,
            max_transid: u64::MAX,
            nr_items: u32::MAX,
            ..SearchKey::default()
        };
        // SAFETY: the kernel writes at most `buf_size` bytes after the head, the size of `buf`.
        unsafe {
            ioctl(
                file.as_fd(),
                Updater::<TREE_SEARCH_V2, SearchArgs<BATCH>>::new(&mut args),
            )?
        };
        let last = read_batch(&args.buf, args.head.key.nr_items, &mut each);
        from = last.and_then(following);
    }
    Ok(())
}

/// Reads the items of one batch; returns the last key.
fn read_batch(mut buf: &[u8], items: u32, each: &mut impl FnMut(Key, &[u8])) -> Option<Key> {
    let mut last = None;
    for _ in 0..items {
        // Header: transid, objectid, offset, then type and length, in native byte order.
        let (head, rest) = buf.split_at_checked(32)?;
        let objectid = u64::from_ne_bytes(field(head, 8)?);
        let offset = u64::from_ne_bytes(field(head, 16)?);
        let kind = u32::from_ne_bytes(field(head, 24)?);
        let length = u32::from_ne_bytes(field(head, 28)?);
        let (item, rest) = rest.split_at_checked(length as usize)?;
        each((objectid, kind, offset), item);
        last = Some((objectid, kind, offset));
        buf = rest;
    }
    last
}

/// Returns `N` bytes of an item; `None` if it is too short.
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// Returns the next key after `key`; `None` after the last one.
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

    #[test]
    fn keys_increase_up_to_the_last() {
        assert_eq!(following((256, 108, 5)), Some((256, 108, 6)));
        assert_eq!(following((256, 108, u64::MAX)), Some((256, 109, 0)));
        assert_eq!(following((256, u32::MAX, u64::MAX)), Some((257, 0, 0)));
        assert_eq!(following(LAST), None);
    }
}
