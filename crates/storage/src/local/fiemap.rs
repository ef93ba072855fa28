//! The blocks a file maps, on any file system: `FS_IOC_FIEMAP`
//! (Documentation/filesystems/fiemap.rst of the kernel).
//!
//! On XFS, unlike btrfs, blocks that no file maps are free. So the maps of all files together show
//! the owner of each block.

use crate::local::extents::Reference;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::fs::File;
use std::iter::Peekable;
use std::ops::Range;

const FIEMAP: Opcode = opcode::read_write::<Head>(b'f', 11);
/// Extents per call: 14 KiB.
const BATCH: usize = 256;

const LAST: u32 = 1 << 0;
/// Flags of an extent whose location is unknown, or not allocated yet.
const NOWHERE: u32 = 1 << 1 | 1 << 2;
/// Flags of an extent that is compressed, encrypted or not in whole blocks. Two such extents at one
/// location may differ.
const ENCODED: u32 = 1 << 3 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10;
const UNWRITTEN: u32 = 1 << 11;
/// Makes the kernel flush the file first.
const SYNC: u32 = 1;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Head {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Args {
    head: Head,
    extents: [Extent; BATCH],
}

/// A range of the device that a file maps, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub(crate) inode: u64,
    pub(crate) start: u64,
    pub(crate) length: u64,
}

/// Adds the ranges that `file` maps to `mapped`; `inode` is the file's inode number.
///
/// # Errors
/// `EOPNOTSUPP` where the file system does not report it.
pub(crate) fn read(file: &File, inode: u64, mapped: &mut Vec<Mapped>) -> io::Result<()> {
    each(file, 0, |extent| {
        if extent.flags & NOWHERE == 0 {
            mapped.push(Mapped {
                inode,
                start: extent.physical,
                length: extent.length,
            });
        }
    })
}

/// Returns the parts of the first `length` bytes in which two files do not share blocks. Only there
/// can they differ. Flushes both files first.
///
/// # Errors
/// `EOPNOTSUPP` where the file system does not report it; any error of the flush.
pub(crate) fn unshared(one: impl AsFd, other: impl AsFd, length: u64) -> io::Result<Vec<Range<u64>>> {
    let extents = |file: BorrowedFd<'_>| {
        let mut extents = Vec::new();
        each(file, SYNC, |extent| extents.push(*extent)).map(|()| extents)
    };
    let (one, other) = (extents(one.as_fd())?, extents(other.as_fd())?);
    Ok(differing(&one, &other, length))
}

fn differing(one: &[Extent], other: &[Extent], length: u64) -> Vec<Range<u64>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut at = 0;
    while at < length {
        let (first, first_end) = place(&mut one, at);
        let (second, second_end) = place(&mut other, at);
        let end = first_end.min(second_end).min(length);
        // Holes in both files read as zeros.
        let same = matches!((first, second), (Place::Hole, Place::Hole))
            || matches!((first, second), (Place::At(a), Place::At(b)) if a == b);
        match parts.last_mut() {
            _ if same => {}
            Some(last) if last.end == at => last.end = end,
            _ => parts.push(at..end),
        }
        at = end;
    }
    parts
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Hole,
    /// Byte offset on the device, and whether the extent was written.
    At((u64, bool)),
    Unknown,
}

/// Returns where the byte `at` of a file is, and the end of that range. Skips extents before it.
fn place<'e>(extents: &mut Peekable<impl Iterator<Item = &'e Extent>>, at: u64) -> (Place, u64) {
    while let Some(extent) = extents.peek() {
        let end = extent.logical.saturating_add(extent.length);
        if end <= at {
            extents.next();
        } else if at < extent.logical {
            return (Place::Hole, extent.logical);
        } else if extent.flags & (NOWHERE | ENCODED) != 0 {
            return (Place::Unknown, end);
        } else {
            let physical = extent.physical + (at - extent.logical);
            return (Place::At((physical, extent.flags & UNWRITTEN == 0)), end);
        }
    }
    (Place::Hole, u64::MAX)
}

/// Calls `each` for all extents of a file, in order.
fn each(file: impl AsFd, flags: u32, mut each: impl FnMut(&Extent)) -> io::Result<()> {
    let mut args = Box::new(Args {
        head: Head::default(),
        extents: [Extent::default(); BATCH],
    });
    let mut from = 0;
    loop {
        args.head = Head {
            start: from,
            length: u64::MAX - from,
            flags,
            extent_count: BATCH as u32,
            ..Head::default()
        };
        // SAFETY: the kernel writes at most `extent_count` extents after the head, and there is
        // room for them.
        unsafe { ioctl(file.as_fd(), Updater::<FIEMAP, Args>::new(&mut args))? };
        let found = &args.extents[..(args.head.mapped_extents as usize).min(BATCH)];
        found.iter().for_each(&mut each);
        match found.last() {
            Some(last) if last.flags & LAST == 0 => from = last.logical + last.length,
            _ => return Ok(()),
        }
    }
}

/// Splits mapped ranges at each other's boundaries, and calls `each` for each piece. Any two pieces
/// are then either the same blocks or disjoint.
pub(crate) fn cut(mapped: &[Mapped], mut each: impl FnMut(Reference)) {
    let mut ends: Vec<u64> = mapped
        .iter()
        .flat_map(|mapped| [mapped.start, mapped.start + mapped.length])
        .collect();
    ends.sort_unstable();
    ends.dedup();
    for &Mapped { inode, start, length } in mapped {
        let first = ends.partition_point(|&end| end <= start);
        let mut from = start;
        for &end in ends[first..].iter().take_while(|&&end| end <= start + length) {
            each(Reference {
                inode,
                start: from,
                size: end - from,
                mapped: end - from,
            });
            from = end;
        }
    }
}

const _: () = assert!(size_of::<Head>() == 32 && size_of::<Extent>() == 56);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_are_split_into_equal_or_disjoint_pieces() {
        let mapped = [(1, 0, 100), (2, 40, 20), (2, 200, 10), (3, 50, 100)].map(|(inode, start, length)| Mapped {
            inode,
            start,
            length,
        });
        let mut pieces = Vec::new();
        cut(&mapped, |piece| {
            assert_eq!(piece.size, piece.mapped);
            pieces.push((piece.inode, piece.start, piece.size));
        });
        assert_eq!(
            pieces,
            [
                (1, 0, 40),
                (1, 40, 10),
                (1, 50, 10),
                (1, 60, 40),
                (2, 40, 10),
                (2, 50, 10),
                (2, 200, 10),
                (3, 50, 10),
                (3, 60, 40),
                (3, 100, 50)
            ]
        );
        cut(&[], |_| panic!("nothing"));
    }

    #[test]
    fn files_differ_where_they_do_not_share_blocks() {
        let extents = |parts: &[(u64, u64, u64, u32)]| -> Vec<Extent> {
            let extent = |&(logical, physical, length, flags)| Extent {
                logical,
                physical,
                length,
                flags,
                ..Extent::default()
            };
            parts.iter().map(extent).collect()
        };
        let one = extents(&[(0, 1000, 100, 0), (200, 2000, 100, 0), (400, 4000, 100, UNWRITTEN)]);
        assert_eq!(differing(&one, &one, 500), []);
        // Split differently, and partly rewritten.
        let other = extents(&[
            (0, 1000, 50, 0),
            (50, 1050, 50, 0),
            (200, 2000, 40, 0),
            (240, 9000, 10, 0),
            (250, 2050, 50, 0),
            (400, 4000, 100, 0),
        ]);
        assert_eq!(differing(&one, &other, 500), [240..250, 400..500]);
        assert_eq!(
            differing(&one, &extents(&[(0, 1000, 100, NOWHERE)]), 250),
            [0..100, 200..250]
        );
        assert_eq!(differing(&one, &[], 450), [0..100, 200..300, 400..450]);
        assert_eq!(differing(&[], &[], 150), []);
    }

    #[test]
    fn a_file_maps_its_data_without_holes() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.sync_all().unwrap();
        let mut mapped = Vec::new();
        match read(&file, 7, &mut mapped) {
            // tmpfs does not support it.
            Err(rustix::io::Errno::OPNOTSUPP) => return,
            other => other.unwrap(),
        }
        assert_eq!(mapped.iter().map(|mapped| mapped.length).sum::<u64>(), 12288);
        assert!(mapped.iter().all(|mapped| mapped.inode == 7));
    }
}
