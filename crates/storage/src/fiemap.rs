//! Which blocks a file maps, on any file system: `FS_IOC_FIEMAP` (Documentation/filesystems/fiemap.rst of the kernel).
//!
//! XFS has no extent that stays whole while a part of it is in use: what no file maps is free. So the maps of all files, laid over one another,
//! tell whose each block is.

use crate::extents::Reference;
use rustix::fd::AsFd;
use rustix::io;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

const FIEMAP: Opcode = opcode::read_write::<Head>(b'f', 11);
/// Extents that the kernel tells of at once: 14 KiB.
const BATCH: usize = 256;

const LAST: u32 = 1 << 0;
/// Where it is is not known, or it is nowhere yet: written and not allocated.
const NOWHERE: u32 = 1 << 1 | 1 << 2;

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

/// A stretch of the device that a file maps, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub(crate) inode: u64,
    pub(crate) start: u64,
    pub(crate) length: u64,
}

/// What `file`, whose number is `inode`, maps; added to `mapped`.
///
/// # Errors
/// `EOPNOTSUPP` where the file system does not tell.
pub(crate) fn read(file: impl AsFd, inode: u64, mapped: &mut Vec<Mapped>) -> io::Result<()> {
    let mut args = Box::new(Args {
        head: Head::default(),
        extents: [Extent::default(); BATCH],
    });
    let mut from = 0;
    loop {
        args.head = Head {
            start: from,
            length: u64::MAX - from,
            extent_count: BATCH as u32,
            ..Head::default()
        };
        // SAFETY: the kernel writes at most `extent_count` extents behind the head, and there is room for as many.
        unsafe { ioctl(file.as_fd(), Updater::<FIEMAP, Args>::new(&mut args))? };
        let told = &args.extents[..(args.head.mapped_extents as usize).min(BATCH)];
        mapped.extend(
            told.iter()
                .filter(|extent| extent.flags & NOWHERE == 0)
                .map(|extent| Mapped {
                    inode,
                    start: extent.physical,
                    length: extent.length,
                }),
        );
        match told.last() {
            Some(last) if last.flags & LAST == 0 => from = last.logical + last.length,
            _ => return Ok(()),
        }
    }
}

/// Cuts what files map at each other's ends, so that two pieces are the same blocks or have none in common, and hands each to `each`.
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
    fn what_overlaps_is_cut_into_pieces_that_are_the_same_or_apart() {
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
    fn a_file_s_map_is_its_data_without_its_holes() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.sync_all().unwrap();
        let mut mapped = Vec::new();
        match read(&file, 7, &mut mapped) {
            // A scratch folder in memory.
            Err(rustix::io::Errno::OPNOTSUPP) => return,
            other => other.unwrap(),
        }
        assert_eq!(mapped.iter().map(|mapped| mapped.length).sum::<u64>(), 12288);
        assert!(mapped.iter().all(|mapped| mapped.inode == 7));
    }
}
