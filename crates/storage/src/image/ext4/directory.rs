//! Blocks of folders, and the remains of deleted names in them.
//!
//! A deleted entry becomes part of the entry before it, and its name stays until the space is
//! needed (Documentation/filesystems/ext4/directory.rst of the kernel). Older kernels and e2fsprogs
//! leave it; Linux wipes it since 5.13.

use super::crc32c::crc32c;
use super::error::inconsistent;
use super::inode::{Inode, Piece};
use super::layout::Layout;
use super::superblock::Fields;
use crate::error::StorageError;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;

/// Length of an entry before its name.
const HEAD: usize = 8;
/// Length of the entry with the checksum, which ends a block with one.
const TAIL: usize = 12;
const TAIL_MARK: u8 = 0xde;
/// Maximum number of pieces of a folder. With more it would have hundreds of millions of entries.
const MAX_PIECES: usize = 1 << 20;

/// The blocks of one folder.
pub(super) struct Directory<'i> {
    image: &'i File,
    layout: &'i Layout,
    pieces: Vec<Piece>,
    /// The blocks that contain an index instead of names, and the offset of the index in each.
    index: HashMap<u64, usize>,
    /// The initial value of a block's checksum.
    seed: Option<u32>,
    /// `true` if the folder's names are encrypted; some of them are then followed by a hash.
    encrypted: bool,
}

impl<'i> Directory<'i> {
    /// Finds the blocks of a folder.
    pub(super) fn open(image: &'i File, layout: &'i Layout, inode: &Inode<'_>) -> Result<Directory<'i>, StorageError> {
        let (mut pieces, mut all) = (Vec::new(), inode.pieces(image, layout)?);
        while let Some(piece) = all.next()? {
            if pieces.len() == MAX_PIECES {
                return Err(inconsistent("a folder has too many pieces"));
            }
            pieces.push(piece);
        }
        let seed = layout.superblock.checksum_seed().map(|seed| {
            let seed = crc32c(seed, &(inode.number as u32).to_le_bytes());
            crc32c(seed, &inode.generation().to_le_bytes())
        });
        let mut directory = Directory {
            image,
            layout,
            pieces,
            index: HashMap::new(),
            seed,
            encrypted: inode.is_encrypted(),
        };
        if inode.is_indexed() && layout.has_indexes() {
            directory.index = directory.find_index()?;
        }
        Ok(directory)
    }

    /// Lists the blocks of the folder: the number in the folder, and the number in the image.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u64, u64)> + use<'_> {
        let written = self.pieces.iter().filter(|piece| piece.written);
        written.flat_map(|piece| (0..piece.length).map(|nth| (piece.logical + nth, piece.physical + nth)))
    }

    /// Returns whether the block with this number in the folder contains an index instead of names.
    pub(super) fn holds_index(&self, logical: u64) -> bool {
        self.index.contains_key(&logical)
    }

    fn physical(&self, logical: u64) -> Option<u64> {
        let behind = self.pieces.partition_point(|piece| piece.logical <= logical);
        let piece = self.pieces.get(behind.checked_sub(1)?)?;
        let nth = logical - piece.logical;
        (nth < piece.length).then_some(piece.physical + nth)
    }

    /// Finds the blocks of the folder's index. Empty if the first block does not begin an index:
    /// then all blocks contain names.
    fn find_index(&self) -> Result<HashMap<u64, usize>, StorageError> {
        /// Offset in the first block: after two entries, and before the entries of the index.
        const ROOT: usize = 0x18;
        const ROOT_LENGTH: u8 = 8;
        const MAX_LEVELS: u8 = 3;

        let mut index = HashMap::new();
        let root = match self.physical(0) {
            Some(block) => self.layout.block(self.image, block)?,
            None => return Ok(index),
        };
        let levels = root[ROOT + 6];
        let begins_one = Fields(&root).u32(ROOT) == 0 && root[ROOT + 5] == ROOT_LENGTH && levels <= MAX_LEVELS;
        let start = ROOT + usize::from(ROOT_LENGTH);
        if !begins_one || index_entries(&root, start).is_none() {
            return Ok(index);
        }
        index.insert(0, start);
        let mut nodes = children(&root, start);
        for _ in 0..levels {
            let mut next = Vec::new();
            for logical in nodes {
                let Some(physical) = self.physical(logical) else {
                    return Err(inconsistent("the index of a folder"));
                };
                let node = self.layout.block(self.image, physical)?;
                if index.insert(logical, HEAD).is_some() || index_entries(&node, HEAD).is_none() {
                    return Err(inconsistent("the index of a folder"));
                }
                next.extend(children(&node, HEAD));
            }
            nodes = next;
        }
        Ok(index)
    }

    /// Wipes the remains of deleted names in the block with this number in the folder, and updates
    /// its checksum. Returns whether there were any.
    pub(super) fn wipe(&self, logical: u64, block: &mut [u8]) -> Result<bool, StorageError> {
        if self.encrypted {
            return Ok(false);
        }
        if let Some(start) = self.index.get(&logical) {
            let entries = index_entries(block, *start).ok_or_else(|| inconsistent("the index of a folder"))?;
            // The checksum of such a block does not cover the space after its entries.
            return Ok(zero(block, entries.end..entries_end(block, *start)));
        }
        let Some(end) = self.names_end(block) else {
            return Ok(false);
        };
        let wiped = wipe_names(block, end)?;
        if let (true, Some(seed)) = (wiped, self.seed) {
            let sum = crc32c(seed, &block[..end]);
            block[end + HEAD..end + TAIL].copy_from_slice(&sum.to_le_bytes());
        }
        Ok(wiped)
    }

    /// Returns the end of a block's entries; `None` if the block should have a checksum but does
    /// not.
    fn names_end(&self, block: &[u8]) -> Option<usize> {
        if self.seed.is_none() {
            return Some(block.len());
        }
        let end = block.len() - TAIL;
        let tail = Fields(block.get(end..)?);
        let is_tail = tail.u32(0) == 0 && tail.u16(4) == TAIL as u16 && tail.u16(6) == u16::from(TAIL_MARK) << 8;
        is_tail.then_some(end)
    }

    /// Returns the block reduced to the folder's contents: without remains of deleted names and the
    /// checksum.
    pub(super) fn contents(&self, logical: u64, mut block: Vec<u8>) -> Result<Vec<u8>, StorageError> {
        self.wipe(logical, &mut block)?;
        if self.seed.is_some() {
            let sum = block.len() - 4;
            block[sum..].fill(0);
        }
        Ok(block)
    }
}

/// Returns the range of used entries of an index at `start`; `None` if their number is invalid.
fn index_entries(block: &[u8], start: usize) -> Option<Range<usize>> {
    const ENTRY: usize = 8;
    let (limit, count) = (Fields(block).u16(start), Fields(block).u16(start + 2));
    let end = start + usize::from(count) * ENTRY;
    (count > 0 && count <= limit && start + usize::from(limit) * ENTRY <= block.len()).then_some(start..end)
}

/// Returns the end of the space for entries of an index.
fn entries_end(block: &[u8], start: usize) -> usize {
    start + usize::from(Fields(block).u16(start)) * 8
}

/// Returns the blocks, counted in the folder, that an index refers to.
fn children(block: &[u8], start: usize) -> Vec<u64> {
    const NUMBER: u32 = 0x0fff_ffff;
    let entries = index_entries(block, start).unwrap_or_default();
    let entries = entries.step_by(8);
    entries
        .map(|at| u64::from(Fields(block).u32(at + 4) & NUMBER))
        .collect()
}

fn wipe_names(block: &mut [u8], end: usize) -> Result<bool, StorageError> {
    let (mut at, mut wiped) = (0, false);
    while at < end {
        let entry = Fields(&block[at..end]);
        let length = usize::from(entry.u16(4));
        let used = match entry.u32(0) {
            0 => HEAD,
            _ => HEAD + usize::from(entry.u8(6)),
        };
        if length < HEAD + 4 || !length.is_multiple_of(4) || used > length || at + length > end {
            return Err(inconsistent("the entries of a folder"));
        }
        wiped |= zero(block, at + used..at + length);
        at += length;
    }
    Ok(wiped)
}

/// Zeroes a part of a block. Returns whether it contained anything else.
fn zero(block: &mut [u8], part: Range<usize>) -> bool {
    let Some(part) = block.get_mut(part) else { return false };
    let dirty = part.iter().any(|&byte| byte != 0);
    part.fill(0);
    dirty
}
