//! The location of an ext4 file system's metadata, and its used blocks and inodes.
//!
//! Fields and formulas are from Documentation/filesystems/ext4 of the kernel. Only file systems
//! that were just checked are read. An inconsistency is an error nevertheless, never a panic or a
//! read outside the image.

use super::crc32c::crc32c;
use super::error::{inconsistent, unreadable};
use super::features::{Compat, Incompat, RoCompat};
use super::ranges::{normalize, without};
use super::superblock::{Fields, Superblock};
use crate::error::StorageError;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

const INODE_UNINIT: u16 = 0x1;
const BLOCK_UNINIT: u16 = 0x2;
/// Twice the number of groups of 16 TiB with blocks of 1 KiB.
const MAX_GROUPS: u64 = 1 << 22;

/// The fields of a group descriptor.
#[derive(Debug, Clone, Copy)]
struct Group {
    block_bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    flags: u16,
    /// Checksums of the two bitmaps. Short descriptors contain only the lower halves.
    block_bitmap_sum: u32,
    inode_bitmap_sum: u32,
}

/// The layout of a file system. Block numbers count from the start of the image.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) superblock: Superblock,
    groups: Vec<Group>,
}

impl Layout {
    /// Reads superblock and group descriptors.
    ///
    /// # Errors
    /// [`StorageError::FileSystem`], [`StorageError::Io`].
    pub(crate) fn read(image: &File) -> Result<Layout, StorageError> {
        let superblock = Superblock::read(image)?;
        let count = superblock.groups();
        if count > MAX_GROUPS {
            return Err(inconsistent(format!("it has {count} block groups")));
        }
        let mut layout = Layout {
            superblock,
            groups: Vec::new(),
        };
        let size = layout.superblock.descriptor_size();
        for nth in 0..layout.descriptor_blocks() {
            let block = layout.block(image, layout.descriptor_block(nth))?;
            for descriptor in block.chunks_exact(size) {
                if (layout.groups.len() as u64) < count {
                    layout.groups.push(layout.group(&Fields(descriptor))?);
                }
            }
        }
        Ok(layout)
    }

    /// Returns the number of block groups.
    pub(crate) fn groups(&self) -> usize {
        self.groups.len()
    }

    fn group(&self, descriptor: &Fields<'_>) -> Result<Group, StorageError> {
        let block = |low: usize, high: usize| {
            let high = match descriptor.0.len() {
                32 => 0,
                _ => descriptor.u32(high),
            };
            u64::from(descriptor.u32(low)) | u64::from(high) << 32
        };
        let half = |low: usize, high: usize| match descriptor.0.len() {
            32 => descriptor.u16(low).into(),
            _ => u32::from(descriptor.u16(low)) | u32::from(descriptor.u16(high)) << 16,
        };
        let group = Group {
            block_bitmap: block(0x0, 0x20),
            inode_bitmap: block(0x4, 0x24),
            inode_table: block(0x8, 0x28),
            flags: descriptor.u16(0x12),
            block_bitmap_sum: half(0x18, 0x38),
            inode_bitmap_sum: half(0x1a, 0x3a),
        };
        let end = self.superblock.blocks();
        let table_end = group.inode_table.saturating_add(self.superblock.table_blocks());
        if group.block_bitmap < end && group.inode_bitmap < end && table_end <= end {
            Ok(group)
        } else {
            Err(inconsistent("the descriptor of a block group"))
        }
    }

    /// Reads one block.
    pub(super) fn block(&self, image: &File, block: u64) -> Result<Vec<u8>, StorageError> {
        if block >= self.superblock.blocks() {
            return Err(inconsistent(format!("block {block} is beyond its end")));
        }
        let size = self.superblock.block_size();
        let mut bytes = vec![0; size as usize];
        image.read_exact_at(&mut bytes, block * size).map_err(unreadable)?;
        Ok(bytes)
    }

    /// Returns the number of blocks with group descriptors.
    fn descriptor_blocks(&self) -> u64 {
        self.superblock.groups().div_ceil(self.descriptors_per_block())
    }

    fn descriptors_per_block(&self) -> u64 {
        self.superblock.block_size() / self.superblock.descriptor_size() as u64
    }

    /// Returns the position of the `nth` block of group descriptors. It is after the superblock, or
    /// with `meta_bg` in the groups it describes.
    fn descriptor_block(&self, nth: u64) -> u64 {
        let superblock = &self.superblock;
        if !superblock.has_incompat(Incompat::META_BG) || nth < superblock.first_meta_group() {
            return superblock.own_block() + 1 + nth;
        }
        let group = nth * self.descriptors_per_block();
        self.own_start(group) + u64::from(superblock.holds_copy(group))
    }

    /// Returns the first possible block of a group's metadata. In the first group it follows the
    /// boot sector.
    fn own_start(&self, group: u64) -> u64 {
        match group {
            0 => self.superblock.own_block(),
            _ => self.superblock.group_start(group),
        }
    }

    /// Returns all blocks with metadata at a fixed position. These are superblocks, group
    /// descriptors and the space reserved for them, bitmaps, and inode tables.
    pub(crate) fn metadata(&self) -> Vec<Range<u64>> {
        let mut blocks = Vec::new();
        for (number, group) in self.groups.iter().enumerate() {
            blocks.extend(self.copies(number as u64));
            blocks.push(group.block_bitmap..group.block_bitmap + 1);
            blocks.push(group.inode_bitmap..group.inode_bitmap + 1);
            blocks.push(group.inode_table..group.inode_table + self.superblock.table_blocks());
        }
        // The boot sector is before the first group if blocks have 1 KiB.
        blocks.push(0..self.superblock.own_block());
        normalize(blocks)
    }

    /// Returns a group's copies of the superblock and the group descriptors
    /// (`ext2fs_super_and_bgd_loc2` of e2fsprogs).
    fn copies(&self, group: u64) -> [Range<u64>; 2] {
        let superblock = &self.superblock;
        let start = self.own_start(group);
        let copy = u64::from(superblock.holds_copy(group));
        let meta = superblock.has_incompat(Incompat::META_BG);
        let per_block = self.descriptors_per_block();
        let descriptors = if !meta || group / per_block < superblock.first_meta_group() {
            let kept = match meta {
                true => superblock.first_meta_group(),
                false => self.descriptor_blocks() + superblock.reserved_descriptor_blocks(),
            };
            copy * kept
        } else {
            // The first, second and last group of each meta group contain one block.
            u64::from([0, 1, per_block - 1].contains(&(group % per_block)))
        };
        let behind = start + copy;
        [start..behind, behind..behind + descriptors]
    }

    /// Verifies the checksums of the bitmaps, which `e2fsck -n` does not. A guest's kernel does not
    /// use a group with a wrong one.
    ///
    /// # Errors
    /// [`StorageError::FileSystem`], [`StorageError::Io`].
    pub(super) fn check_bitmaps(&self, image: &File) -> Result<(), StorageError> {
        let superblock = &self.superblock;
        let Some(seed) = superblock.checksum_seed() else {
            return Ok(());
        };
        let mask = match superblock.descriptor_size() {
            32 => 0xffff,
            _ => !0,
        };
        let clusters = superblock.blocks_per_group() / superblock.cluster_ratio();
        for (number, group) in self.groups.iter().enumerate() {
            let bitmaps = [
                (
                    "block",
                    BLOCK_UNINIT,
                    group.block_bitmap,
                    clusters,
                    group.block_bitmap_sum,
                ),
                (
                    "inode",
                    INODE_UNINIT,
                    group.inode_bitmap,
                    superblock.inodes_per_group(),
                    group.inode_bitmap_sum,
                ),
            ];
            for (kind, uninitialized, at, bits, expected) in bitmaps {
                if self.is_marked(group, uninitialized) {
                    continue;
                }
                let bitmap = self.block(image, at)?;
                let covered = bitmap.get(..(bits / 8) as usize).unwrap_or(&bitmap);
                if crc32c(seed, covered) & mask != expected {
                    return Err(StorageError::FileSystem(format!(
                        "is damaged; repair it first.\nThe checksum of the {kind} bitmap of group {number} is wrong"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Returns the blocks of a group that are used by neither files nor metadata. `metadata` is
    /// [`Layout::metadata`].
    pub(crate) fn free_blocks(
        &self,
        image: &File,
        group: usize,
        metadata: &[Range<u64>],
    ) -> Result<Vec<Range<u64>>, StorageError> {
        let superblock = &self.superblock;
        let own = self.blocks_of(group);
        let Some(described) = self.groups.get(group) else {
            return Ok(Vec::new());
        };
        if self.is_marked(described, BLOCK_UNINIT) {
            return Ok(without(&own, metadata));
        }
        let bitmap = self.block(image, described.block_bitmap)?;
        let ratio = superblock.cluster_ratio();
        let clusters = (own.end - own.start).div_ceil(ratio);
        let free = clear_bits(&bitmap, clusters).into_iter().flat_map(|run| {
            let blocks = own.start + run.start * ratio..(own.start + run.end * ratio).min(own.end);
            without(&blocks, metadata)
        });
        Ok(free.collect())
    }

    /// Returns metadata blocks with meaningless contents: bitmaps of unused groups, and reserved
    /// blocks after the copies of group descriptors.
    pub(super) fn unused_metadata(&self, group: usize) -> Vec<Range<u64>> {
        let Some(described) = self.groups.get(group) else {
            return Vec::new();
        };
        let mut blocks = Vec::new();
        if self.is_marked(described, BLOCK_UNINIT) {
            blocks.push(described.block_bitmap..described.block_bitmap + 1);
        }
        if self.is_marked(described, INODE_UNINIT) {
            blocks.push(described.inode_bitmap..described.inode_bitmap + 1);
        }
        // In the first group, they contain addresses of the others.
        if group > 0 && !self.superblock.has_incompat(Incompat::META_BG) {
            let [_, descriptors] = self.copies(group as u64);
            let used = descriptors.start + self.descriptor_blocks();
            blocks.push(used.min(descriptors.end)..descriptors.end);
        }
        blocks
    }

    /// Returns the blocks of a group.
    pub(crate) fn blocks_of(&self, group: usize) -> Range<u64> {
        let start = self.superblock.group_start(group as u64);
        let end = start + self.superblock.blocks_per_group();
        start..end.min(self.superblock.blocks())
    }

    /// Returns whether a bit in a bitmap represents a cluster of blocks, which a file can use in
    /// part.
    pub(super) fn has_clusters(&self) -> bool {
        self.superblock.cluster_ratio() > 1
    }

    /// Returns the group of a block.
    pub(crate) fn group_of(&self, block: u64) -> usize {
        let behind = block.saturating_sub(self.superblock.first_data_block());
        (behind / self.superblock.blocks_per_group()) as usize
    }

    /// Reads the used inodes of a group.
    pub(crate) fn used_inodes(&self, image: &File, group: usize) -> Result<UsedInodes, StorageError> {
        let first = group as u64 * self.superblock.inodes_per_group() + 1;
        let bitmap = match self.groups.get(group) {
            Some(described) if !self.is_marked(described, INODE_UNINIT) => self.block(image, described.inode_bitmap)?,
            _ => Vec::new(),
        };
        Ok(UsedInodes { first, bitmap })
    }

    /// Returns the position of a group's inode table in the image, in bytes.
    pub(crate) fn table_of(&self, group: usize) -> Range<u64> {
        let start = self.groups.get(group).map_or(0, |group| group.inode_table) * self.superblock.block_size();
        let size = self.superblock.inodes_per_group() * self.superblock.inode_size() as u64;
        start..start + size
    }

    /// Reads an inode; `None` when it is unused.
    pub(super) fn inode(&self, image: &File, number: u64) -> Result<Option<Vec<u8>>, StorageError> {
        let per_group = self.superblock.inodes_per_group();
        let Some(index) = number.checked_sub(1) else {
            return Ok(None);
        };
        let group = usize::try_from(index / per_group).unwrap_or(usize::MAX);
        if group >= self.groups() || !self.used_inodes(image, group)?.contains(number) {
            return Ok(None);
        }
        let mut bytes = vec![0; self.superblock.inode_size()];
        let at = self.table_of(group).start + index % per_group * bytes.len() as u64;
        image.read_exact_at(&mut bytes, at).map_err(unreadable)?;
        Ok(Some(bytes))
    }

    /// Returns whether a flag of a group is set. Flags are valid only if descriptors have
    /// checksums.
    fn is_marked(&self, group: &Group, flag: u16) -> bool {
        let superblock = &self.superblock;
        let checked = superblock.has_ro_compat(RoCompat::GDT_CSUM) || superblock.has_ro_compat(RoCompat::METADATA_CSUM);
        checked && group.flags & flag != 0
    }

    /// Returns whether folders can have an index.
    pub(crate) fn has_indexes(&self) -> bool {
        self.superblock.has_compat(Compat::DIR_INDEX)
    }
}

/// The used inodes of a group.
#[derive(Debug)]
pub(crate) struct UsedInodes {
    first: u64,
    bitmap: Vec<u8>,
}

impl UsedInodes {
    /// Returns whether an inode of this group is used. Inodes below 11 belong to the file system
    /// itself and count as used.
    pub(crate) fn contains(&self, number: u64) -> bool {
        const FIRST_OF_FILES: u64 = 11;
        let index = number.saturating_sub(self.first);
        let byte = self.bitmap.get((index / 8) as usize).copied().unwrap_or_default();
        number < FIRST_OF_FILES || byte & 1 << (index % 8) != 0
    }
}

/// Returns the ranges of clear bits among the first `count`.
fn clear_bits(bitmap: &[u8], count: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut push = |run: Range<u64>| match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    };
    for (nth, byte) in bitmap.iter().enumerate() {
        let start = nth as u64 * 8;
        if start >= count {
            break;
        }
        match byte {
            0 => push(start..(start + 8).min(count)),
            0xff => {}
            _ => (0..8)
                .filter(|bit| byte & 1 << bit == 0 && start + bit < count)
                .for_each(|bit| push(start + bit..start + bit + 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clear_bits_are_found_up_to_the_given_count() {
        let runs = |bitmap: &[u8], count| -> Vec<(u64, u64)> {
            let runs = clear_bits(bitmap, count);
            runs.into_iter().map(|run| (run.start, run.end)).collect()
        };
        assert_eq!(runs(&[0, 0], 16), [(0, 16)]);
        assert_eq!(runs(&[0, 0], 11), [(0, 11)]);
        assert_eq!(runs(&[0xff, 0b1111_0111], 16), [(11, 12)]);
        assert_eq!(runs(&[0b0000_1111, 0xf0], 16), [(4, 12)]);
        assert_eq!(runs(&[0xff], 8), []);
    }
}
