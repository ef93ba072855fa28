//! Compares the files of two images of one file system, before and after a program worked on it.
//!
//! e2fsprogs can fail to write, report success, and leave a consistent file system in which a file
//! has other contents. So the result is compared with a clone made before. Blocks that both images
//! share need not be read.

use super::directory::Directory;
use super::error::{FRAGMENTED, as_host_fault, unreadable};
use super::inode::Inode;
use super::layout::Layout;
use super::ranges::within;
use crate::error::StorageError;
use crate::local::fiemap;
use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const DOING: &str = "work on a file system without changing its files";

/// Bytes read at once from each image.
const PIECE: u64 = 256 << 10;
/// Timeout of a comparison. A guest can fragment a disk into single blocks, for which it would take
/// hours.
const TIMEOUT: Duration = Duration::from_secs(300);
/// The first inode of ordinary files. Lower ones belong to the file system itself and may change:
/// bad blocks, quotas, the space for group descriptors, and others, but not the root folder and the
/// journal.
const FIRST_OF_FILES: u64 = 11;
const ROOT: u64 = 2;

/// The operation of the program.
#[derive(Debug)]
pub(crate) enum Work<'w> {
    /// Growing the file system: no file may change.
    Growth,
    /// Changing or removing these inodes, and no others.
    Edit(&'w HashSet<u64>),
}

/// Checks that each file in `before` is in `after` with the same contents. Both were sound before
/// the operation. Flushes `after`.
///
/// # Errors
/// [`StorageError::Host`] names an inode that changed; [`StorageError::Io`];
/// [`StorageError::FileSystem`] when it takes too long.
pub(crate) fn require(before: &File, after: &File, work: &Work<'_>) -> Result<(), StorageError> {
    compare(before, after, work).map_err(|error| as_host_fault(error, DOING))
}

fn compare(before: &File, after: &File, work: &Work<'_>) -> Result<(), StorageError> {
    let before = Side {
        image: before,
        layout: Layout::read(before)?,
    };
    let after = Side {
        image: after,
        layout: Layout::read(after)?,
    };
    let superblocks = (&before.layout.superblock, &after.layout.superblock);
    let (old, new) = superblocks;
    let comparable = old.block_size() == new.block_size()
        && old.inodes_per_group() == new.inodes_per_group()
        && old.inode_size() == new.inode_size()
        && before.layout.groups() <= after.layout.groups();
    if !comparable {
        return Err(changed("its layout"));
    }
    let end = old.blocks() * old.block_size();
    let unshared = fiemap::unshared(before.image, after.image, end).map_err(|errno| unreadable(errno.into()))?;
    let comparison = Comparison {
        before,
        after,
        unshared,
        work,
        begun: Instant::now(),
    };
    comparison.run()
}

fn changed(what: impl std::fmt::Display) -> StorageError {
    StorageError::Host {
        doing: DOING,
        reason: format!("{what} has changed"),
    }
}

struct Side<'i> {
    image: &'i File,
    layout: Layout,
}

impl Side<'_> {
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), StorageError> {
        self.image.read_exact_at(bytes, at).map_err(unreadable)
    }
}

struct Comparison<'i, 'w> {
    before: Side<'i>,
    after: Side<'i>,
    /// Parts of the images, in bytes, that may differ.
    unshared: Vec<Range<u64>>,
    work: &'w Work<'w>,
    begun: Instant,
}

impl Comparison<'_, '_> {
    fn run(&self) -> Result<(), StorageError> {
        // If no block of a file may differ, files with the same inode are the same.
        let contents = self.touches_files()?;
        for group in 0..self.before.layout.groups() {
            self.inodes(group, contents)?;
        }
        Ok(())
    }

    /// Returns whether blocks may differ that are neither metadata at a fixed position nor were
    /// free before.
    fn touches_files(&self) -> Result<bool, StorageError> {
        let layout = &self.before.layout;
        let (metadata, size) = (layout.metadata(), layout.superblock.block_size());
        let mut read: Option<(usize, Vec<Range<u64>>)> = None;
        for part in &self.unshared {
            let blocks = part.start / size..part.end.div_ceil(size);
            for blocks in super::ranges::without(&blocks, &metadata) {
                for group in layout.group_of(blocks.start)..=layout.group_of(blocks.end - 1) {
                    let free = match &read {
                        Some((of, free)) if *of == group => free,
                        _ => {
                            &read
                                .insert((group, layout.free_blocks(self.before.image, group, &metadata)?))
                                .1
                        }
                    };
                    let own = layout.blocks_of(group);
                    let here = blocks.start.max(own.start)..blocks.end.min(own.end);
                    if !super::ranges::without(&here, free).is_empty() {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    fn inodes(&self, group: usize, contents: bool) -> Result<(), StorageError> {
        let (before, after) = (&self.before, &self.after);
        let (old, new) = (before.layout.table_of(group), after.layout.table_of(group));
        // A shared inode table contains the same inodes.
        if !contents && old == new && within(&old, &self.unshared).next().is_none() {
            return Ok(());
        }
        let size = before.layout.superblock.inode_size();
        let (was_used, is_used) = (
            before.layout.used_inodes(before.image, group)?,
            after.layout.used_inodes(after.image, group)?,
        );
        let per_group = before.layout.superblock.inodes_per_group();
        let (first, mut nth) = (group as u64 * per_group + 1, 0);
        let mut bytes = [vec![0; PIECE as usize], vec![0; PIECE as usize]];
        while nth < per_group {
            let numbers = first + nth..first + (nth + PIECE / size as u64).min(per_group);
            let count = numbers.end - numbers.start;
            let start = nth * size as u64;
            nth += count;
            if !numbers.clone().any(|number| was_used.contains(number)) {
                continue;
            }
            self.check_deadline()?;
            let [was, is] = &mut bytes;
            let (was, is) = (&mut was[..count as usize * size], &mut is[..count as usize * size]);
            before.read(old.start + start, was)?;
            after.read(new.start + start, is)?;
            for ((was, is), number) in was.chunks_exact(size).zip(is.chunks_exact(size)).zip(numbers) {
                let inode = Inode { number, bytes: was };
                if !was_used.contains(number) || self.may_change(&inode) {
                    continue;
                }
                if !is_used.contains(number) {
                    return Err(changed(format!("inode {number}")));
                }
                self.inode(&inode, &Inode { number, bytes: is }, contents)?;
            }
        }
        Ok(())
    }

    fn may_change(&self, inode: &Inode<'_>) -> bool {
        let number = inode.number;
        let superblock = &self.before.layout.superblock;
        let journal = superblock.journal().map(u64::from);
        let reserved = number < FIRST_OF_FILES && number != ROOT && Some(number) != journal;
        let own = reserved || superblock.own_files().contains(&number);
        match self.work {
            Work::Growth => own,
            // An attribute in an inode of its own is removed with the last file that uses it.
            Work::Edit(inodes) => own || Some(number) == journal || inode.is_attribute() || inodes.contains(&number),
        }
    }

    fn inode(&self, was: &Inode<'_>, is: &Inode<'_>, contents: bool) -> Result<(), StorageError> {
        let other = || changed(format!("inode {}", was.number));
        if was.bytes != is.bytes && was.without_block_map() != is.without_block_map() {
            return Err(other());
        }
        if !contents && was.bytes == is.bytes {
            return Ok(());
        }
        if !self.same_attributes(was, is)? {
            return Err(other());
        }
        let same = match was.is_directory() && was.has_blocks() {
            true => self.same_names(was, is)?,
            false => self.same_bytes(was, is)?,
        };
        if same { Ok(()) } else { Err(other()) }
    }

    fn same_attributes(&self, was: &Inode<'_>, is: &Inode<'_>) -> Result<bool, StorageError> {
        let block = |side: &Side<'_>, inode: &Inode<'_>| match inode.attribute_block() {
            0 => Ok(Vec::new()),
            at => side.layout.block(side.image, at).map(|mut block| {
                // Files with the same attributes share a block, which counts them; its checksum
                // starts with the block number.
                block[0x4..0x8].fill(0);
                block[0x10..0x14].fill(0);
                block
            }),
        };
        let at = was.attribute_block();
        if at == is.attribute_block() && self.is_shared(at, 1) {
            return Ok(true);
        }
        Ok(block(&self.before, was)? == block(&self.after, is)?)
    }

    /// Compares two folders, ignoring remains of deleted names.
    fn same_names(&self, was: &Inode<'_>, is: &Inode<'_>) -> Result<bool, StorageError> {
        let before = Directory::open(self.before.image, &self.before.layout, was)?;
        let after = Directory::open(self.after.image, &self.after.layout, is)?;
        let (mut old, mut new) = (before.blocks(), after.blocks());
        loop {
            match (old.next(), new.next()) {
                (None, None) => return Ok(true),
                (Some((logical, was)), Some((same, is))) if logical == same => {
                    if was == is && self.is_shared(was, 1) {
                        continue;
                    }
                    let was = self.before.layout.block(self.before.image, was)?;
                    let is = self.after.layout.block(self.after.image, is)?;
                    if before.contents(logical, was)? != after.contents(logical, is)? {
                        return Ok(false);
                    }
                }
                _ => return Ok(false),
            }
        }
    }

    fn same_bytes(&self, was: &Inode<'_>, is: &Inode<'_>) -> Result<bool, StorageError> {
        let mut old = was.pieces(self.before.image, &self.before.layout)?;
        let mut new = is.pieces(self.after.image, &self.after.layout)?;
        let (mut was, mut is) = (old.next()?, new.next()?);
        let mut at = 0;
        // Advances to the next piece boundary of either file.
        while was.is_some() || is.is_some() {
            let ends = [was, is].into_iter().flatten();
            let next = ends.map(|piece| match at < piece.logical {
                true => piece.logical,
                false => piece.logical + piece.length,
            });
            let end = next.min().unwrap_or(at);
            let block = |piece: Option<super::inode::Piece>| {
                let piece = piece.filter(|piece| piece.logical <= at && piece.written);
                piece.map(|piece| piece.physical + (at - piece.logical))
            };
            if !self.same_blocks(block(was), block(is), end - at)? {
                return Ok(false);
            }
            at = end;
            if was.is_some_and(|piece| piece.logical + piece.length <= at) {
                was = old.next()?;
            }
            if is.is_some_and(|piece| piece.logical + piece.length <= at) {
                is = new.next()?;
            }
        }
        Ok(true)
    }

    /// Compares `count` blocks starting at `was` and `is`; `None` stands for zeros.
    fn same_blocks(&self, was: Option<u64>, is: Option<u64>, count: u64) -> Result<bool, StorageError> {
        if was == is && was.is_none_or(|block| self.is_shared(block, count)) {
            return Ok(true);
        }
        self.check_deadline()?;
        let size = self.before.layout.superblock.block_size();
        let bytes = count * size;
        let mut at = 0;
        while at < bytes {
            let length = PIECE.min(bytes - at);
            let read = |side: &Side<'_>, block: Option<u64>| {
                let mut piece = vec![0; length as usize];
                match block {
                    Some(block) => side.read(block * size + at, &mut piece).map(|()| piece),
                    None => Ok(piece),
                }
            };
            if read(&self.before, was)? != read(&self.after, is)? {
                return Ok(false);
            }
            at += length;
        }
        Ok(true)
    }

    /// Returns whether the images share these blocks.
    fn is_shared(&self, block: u64, count: u64) -> bool {
        let size = self.before.layout.superblock.block_size();
        within(&(block * size..(block + count) * size), &self.unshared)
            .next()
            .is_none()
    }

    fn check_deadline(&self) -> Result<(), StorageError> {
        if self.begun.elapsed() < TIMEOUT {
            return Ok(());
        }
        Err(StorageError::FileSystem(format!(
            "{FRAGMENTED} comparing its files takes longer than {} s",
            TIMEOUT.as_secs()
        )))
    }
}
