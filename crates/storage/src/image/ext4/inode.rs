//! Inodes, and the blocks that contain a file's data.

use super::error::inconsistent;
use super::layout::Layout;
use super::superblock::Fields;
use crate::error::StorageError;
use std::fs::File;

/// The inode that reserves space for group descriptors. It is not a file, and growth changes it.
pub(super) const RESIZE_INODE: u32 = 7;

/// Offset and length of the block map or the inline data.
const MAP: usize = 0x28;
const MAP_LENGTH: usize = 60;

const KIND: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const REGULAR: u16 = 0o100_000;
const LINK: u16 = 0o120_000;

const ENCRYPTED: u32 = 0x800;
const INDEXED: u32 = 0x1000;
const EXTENTS: u32 = 0x8_0000;
const ATTRIBUTE: u32 = 0x20_0000;
const INLINE: u32 = 0x1000_0000;

/// An inode as stored in its table.
#[derive(Clone, Copy)]
pub(super) struct Inode<'b> {
    pub(super) number: u64,
    pub(super) bytes: &'b [u8],
}

impl Inode<'_> {
    fn fields(&self) -> Fields<'_> {
        Fields(self.bytes)
    }

    fn flags(&self) -> u32 {
        self.fields().u32(0x20)
    }

    fn is(&self, kind: u16) -> bool {
        self.fields().u16(0) & KIND == kind
    }

    pub(super) fn is_directory(&self) -> bool {
        self.is(DIRECTORY)
    }

    pub(super) fn is_link(&self) -> bool {
        self.is(LINK)
    }

    /// Returns whether the file's data is in the inode itself.
    pub(super) fn is_inline(&self) -> bool {
        self.flags() & INLINE != 0
    }

    /// Returns the size of the file, in bytes.
    pub(super) fn size(&self) -> u64 {
        u64::from(self.fields().u32(0x4)) | u64::from(self.fields().u32(0x6c)) << 32
    }

    /// Returns the data in the inode itself. The first part is in place of the block map, the rest
    /// in the attribute `system.data`.
    pub(super) fn inline(&self) -> [&[u8]; 2] {
        let own = self.bytes.get(MAP..MAP + MAP_LENGTH).unwrap_or_default();
        let more = if self.is_inline() {
            self.inline_attribute()
        } else {
            None
        };
        [own, more.unwrap_or_default()]
    }

    /// Returns the value of `system.data` (Documentation/filesystems/ext4/attributes.rst of the
    /// kernel).
    fn inline_attribute(&self) -> Option<&[u8]> {
        const START: usize = 128;
        const MAGIC: u32 = 0xea02_0000;
        const SYSTEM: u8 = 7;
        const ENTRY: usize = 16;
        let head = START + usize::from(self.fields().u16(START));
        if self.fields().u32(head) != MAGIC {
            return None;
        }
        let first = head + 4;
        let mut at = first;
        // Four zeros end the list.
        while self.fields().u32(at) != 0 {
            let entry = Fields(self.bytes.get(at..)?);
            let length = usize::from(entry.u8(0));
            let name = self.bytes.get(at + ENTRY..at + ENTRY + length)?;
            if entry.u8(1) == SYSTEM && name == b"data" {
                let value = first + usize::from(entry.u16(2));
                return self.bytes.get(value..value + entry.u32(8) as usize);
            }
            at += ENTRY + length.next_multiple_of(4);
        }
        None
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.flags() & ENCRYPTED != 0
    }

    pub(super) fn is_indexed(&self) -> bool {
        self.flags() & INDEXED != 0
    }

    /// Returns whether the inode is not a file, but an extended attribute of files (`ea_inode`).
    pub(super) fn is_attribute(&self) -> bool {
        self.flags() & ATTRIBUTE != 0
    }

    pub(super) fn generation(&self) -> u32 {
        self.fields().u32(0x64)
    }

    pub(super) fn links(&self) -> u16 {
        self.fields().u16(0x1a)
    }

    /// Returns the block of the inode's extended attributes; 0 for none.
    pub(super) fn attribute_block(&self) -> u64 {
        u64::from(self.fields().u32(0x68)) | u64::from(self.fields().u16(0x76)) << 32
    }

    /// Returns whether the file has data in blocks, rather than in the inode itself or none.
    pub(super) fn has_blocks(&self) -> bool {
        let short = self.size() < MAP_LENGTH as u64;
        let long_link = self.is(LINK) && (self.flags() & EXTENTS != 0 || !short);
        !self.is_inline() && (self.is(REGULAR) || self.is(DIRECTORY) || long_link)
    }

    /// Returns the inode without the fields that may change while its file stays the same. These
    /// are location and number of its blocks, and checksums.
    pub(super) fn without_block_map(&self) -> Vec<u8> {
        let mut bytes = self.bytes.to_vec();
        let mut forget = |at: usize, length: usize| {
            if let Some(field) = bytes.get_mut(at..at + length) {
                field.fill(0);
            }
        };
        // i_blocks, i_file_acl and i_checksum, each in two parts.
        for (at, length) in [(0x1c, 4), (0x74, 2), (0x68, 4), (0x76, 2), (0x7c, 2)] {
            forget(at, length);
        }
        if self.fields().u16(0x80) >= 4 {
            forget(0x82, 2);
        }
        if self.has_blocks() {
            forget(MAP, MAP_LENGTH);
        }
        bytes
    }

    /// Returns the pieces of the file in order. Empty unless [`Inode::has_blocks`].
    pub(super) fn pieces<'i>(&self, image: &'i File, layout: &'i Layout) -> Result<Pieces<'i>, StorageError> {
        let map = self.bytes.get(MAP..MAP + MAP_LENGTH).unwrap_or_default();
        let entries = if !self.has_blocks() {
            Vec::new()
        } else if self.flags() & EXTENTS != 0 {
            extents(map, None)?
        } else {
            addresses_of_inode(map, layout.superblock.block_size())
        };
        let mut pieces = Pieces {
            image,
            layout,
            pending: Vec::new(),
            position: 0,
            nodes: Vec::new(),
        };
        pieces.push(entries);
        Ok(pieces)
    }
}

/// A run of blocks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The first block, counted from the start of the file.
    pub(super) logical: u64,
    /// The first block, counted from the start of the image.
    pub(super) physical: u64,
    pub(super) length: u64,
    /// `true` if these blocks were written. Unwritten blocks read as zeros and can contain any
    /// data.
    pub(super) written: bool,
}

enum MapEntry {
    Piece(Piece),
    /// A block with extents, of a tree with this depth below it.
    Extents {
        block: u64,
        depth: u16,
    },
    /// A block with block addresses, with this number of levels, for the file from `logical` on.
    Addresses {
        block: u64,
        levels: u32,
        logical: u64,
    },
}

/// The pieces of a file, read on demand.
pub(super) struct Pieces<'i> {
    image: &'i File,
    layout: &'i Layout,
    /// Entries still to be read, the next at the end: at most one block of entries per level.
    pending: Vec<MapEntry>,
    position: u64,
    /// The blocks of the block map read so far.
    pub(super) nodes: Vec<u64>,
}

impl Pieces<'_> {
    fn push(&mut self, entries: Vec<MapEntry>) {
        self.pending.extend(entries.into_iter().rev());
    }

    /// Returns the next piece. Each is after the previous one and within the image.
    pub(super) fn next(&mut self) -> Result<Option<Piece>, StorageError> {
        while let Some(entry) = self.pending.pop() {
            match entry {
                MapEntry::Piece(piece) => {
                    let end = piece.physical.saturating_add(piece.length);
                    if piece.logical < self.position || end > self.layout.superblock.blocks() {
                        return Err(inconsistent("the block map of a file"));
                    }
                    self.position = piece.logical + piece.length;
                    return Ok(Some(piece));
                }
                MapEntry::Extents { block, depth } => {
                    self.nodes.push(block);
                    let block = self.layout.block(self.image, block)?;
                    self.push(extents(&block, Some(depth))?);
                }
                MapEntry::Addresses { block, levels, logical } => {
                    self.nodes.push(block);
                    let block = self.layout.block(self.image, block)?;
                    let numbers = block.chunks_exact(4).map(|number| Fields(number).u32(0));
                    self.push(addresses(numbers, levels - 1, logical, block.len() as u64 / 4));
                }
            }
        }
        Ok(None)
    }
}

/// Parses a node of extents (Documentation/filesystems/ext4/ifork.rst). `expected` is the depth
/// according to its parent.
fn extents(node: &[u8], expected: Option<u16>) -> Result<Vec<MapEntry>, StorageError> {
    const MAGIC: u16 = 0xf30a;
    const ENTRY: usize = 12;
    const MAX_DEPTH: u16 = 5;
    /// The number that is added to the length of an extent that is not written yet.
    const UNWRITTEN: u64 = 32768;

    let head = Fields(node);
    let (count, depth) = (usize::from(head.u16(2)), head.u16(6));
    let fits = head.u16(0) == MAGIC
        && depth <= MAX_DEPTH
        && expected.is_none_or(|expected| depth == expected)
        && (count + 1) * ENTRY <= node.len();
    if !fits {
        return Err(inconsistent("the extents of a file"));
    }
    let entries = node.chunks_exact(ENTRY).skip(1).take(count).map(Fields);
    Ok(entries
        .map(|entry| {
            let high = |at: usize| u64::from(entry.u16(at)) << 32;
            if depth > 0 {
                return MapEntry::Extents {
                    block: u64::from(entry.u32(4)) | high(8),
                    depth: depth - 1,
                };
            }
            let length = u64::from(entry.u16(4));
            MapEntry::Piece(Piece {
                logical: entry.u32(0).into(),
                physical: u64::from(entry.u32(8)) | high(6),
                length: if length > UNWRITTEN { length - UNWRITTEN } else { length },
                written: length <= UNWRITTEN,
            })
        })
        .collect())
}

/// Parses a block map of ext2 and ext3: twelve block addresses, then blocks of addresses with one
/// to three levels.
fn addresses_of_inode(map: &[u8], block_size: u64) -> Vec<MapEntry> {
    const DIRECT: u64 = 12;
    let per_block = block_size / 4;
    let number = |nth: u64| Fields(map).u32(nth as usize * 4);
    let mut entries = addresses((0..DIRECT).map(number), 0, 0, per_block);
    let mut logical = DIRECT;
    for levels in 1..=3 {
        let block = number(DIRECT + u64::from(levels) - 1);
        if block != 0 {
            entries.push(MapEntry::Addresses {
                block: block.into(),
                levels,
                logical,
            });
        }
        logical += per_block.pow(levels);
    }
    entries
}

/// Converts block addresses to entries, joining consecutive data blocks. Below each address are
/// `levels` more levels.
fn addresses(numbers: impl Iterator<Item = u32>, levels: u32, logical: u64, per_block: u64) -> Vec<MapEntry> {
    let mut entries: Vec<MapEntry> = Vec::new();
    for (nth, number) in (0u64..).zip(numbers).filter(|(_, number)| *number != 0) {
        let (block, logical) = (u64::from(number), logical + nth * per_block.pow(levels));
        match entries.last_mut() {
            _ if levels > 0 => entries.push(MapEntry::Addresses { block, levels, logical }),
            Some(MapEntry::Piece(last))
                if last.logical + last.length == logical && last.physical + last.length == block =>
            {
                last.length += 1;
            }
            _ => entries.push(MapEntry::Piece(Piece {
                logical,
                physical: block,
                length: 1,
                written: true,
            })),
        }
    }
    entries
}
