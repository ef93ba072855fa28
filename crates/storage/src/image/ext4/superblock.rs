//! The superblock of an ext4 file system (Documentation/filesystems/ext4/super.rst of the kernel).

use super::crc32c::crc32c;
use super::error::{inconsistent, unreadable};
use super::features::{Compat, Incompat, RoCompat};
use crate::error::StorageError;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The offset and length of the superblock, in bytes.
pub(super) const START: u64 = 1024;
pub(super) const LENGTH: usize = 1024;
const MAGIC: u16 = 0xef53;
/// Block numbers have 48 bits.
const MAX_BLOCKS: u64 = 1 << 48;

/// Little-endian fields of a structure on disk. Fields outside of it read as zero.
pub(super) struct Fields<'b>(pub(super) &'b [u8]);

impl Fields<'_> {
    pub(super) fn u8(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or_default()
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.u8(at), self.u8(at + 1)])
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }
}

/// A superblock with consistent fields.
#[derive(Debug, Clone)]
pub(crate) struct Superblock {
    bytes: [u8; LENGTH],
}

impl Superblock {
    /// Reads the superblock and checks that its fields are consistent.
    ///
    /// # Errors
    /// [`StorageError::FileSystem`], whose reason continues the sentence "its file system …";
    /// [`StorageError::Io`].
    pub(crate) fn read(image: &File) -> Result<Superblock, StorageError> {
        let superblock = Superblock::read_unchecked(image)?;
        let (bits, groups) = (superblock.block_size() * 8, superblock.groups());
        let fits = superblock.block_size() <= 4096
            && superblock.blocks() <= MAX_BLOCKS
            && superblock.blocks() > superblock.first_data_block()
            && (1..=bits * superblock.cluster_ratio()).contains(&superblock.blocks_per_group())
            && superblock.blocks_per_group() % superblock.cluster_ratio() == 0
            && (1..=bits).contains(&superblock.inodes_per_group())
            && (128..=superblock.block_size() as usize).contains(&superblock.inode_size())
            && superblock.inode_size().is_power_of_two()
            && (32..=superblock.block_size() as usize).contains(&superblock.descriptor_size())
            && superblock.descriptor_size().is_power_of_two()
            && groups * superblock.inodes_per_group() <= u64::from(u32::MAX);
        if fits {
            Ok(superblock)
        } else {
            Err(inconsistent("its superblock"))
        }
    }

    /// Reads a superblock and checks only its magic number.
    ///
    /// # Errors
    /// The same as [`Superblock::read`].
    pub(super) fn read_unchecked(image: &File) -> Result<Superblock, StorageError> {
        let mut bytes = [0; LENGTH];
        match image.read_exact_at(&mut bytes, START) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(StorageError::FileSystem("is truncated".to_owned()));
            }
            other => other.map_err(unreadable)?,
        }
        let superblock = Superblock { bytes };
        if superblock.fields().u16(0x38) != MAGIC {
            // e2fsprogs would use a copy instead, which was not inspected.
            let damaged = "has a damaged superblock; repair it first";
            return Err(StorageError::FileSystem(damaged.to_owned()));
        }
        Ok(superblock)
    }

    pub(super) fn fields(&self) -> Fields<'_> {
        Fields(&self.bytes)
    }

    pub(super) fn has_compat(&self, feature: Compat) -> bool {
        self.fields().u32(Compat::FIELD) & feature.0 != 0
    }

    pub(super) fn has_incompat(&self, feature: Incompat) -> bool {
        self.fields().u32(Incompat::FIELD) & feature.0 != 0
    }

    pub(super) fn has_ro_compat(&self, feature: RoCompat) -> bool {
        self.fields().u32(RoCompat::FIELD) & feature.0 != 0
    }

    /// Returns the size of a block, in bytes; larger than the image if the field is invalid.
    pub(crate) fn block_size(&self) -> u64 {
        1024 << self.fields().u32(0x18).min(32)
    }

    /// Returns the total number of blocks.
    pub(crate) fn blocks(&self) -> u64 {
        let high = match self.has_incompat(Incompat::BITS_64) {
            true => self.fields().u32(0x150),
            false => 0,
        };
        u64::from(self.fields().u32(0x4)) | u64::from(high) << 32
    }

    pub(super) fn first_data_block(&self) -> u64 {
        self.fields().u32(0x14).into()
    }

    /// Returns the block that contains the superblock.
    pub(super) fn own_block(&self) -> u64 {
        START / self.block_size()
    }

    /// Returns the number of blocks per bit of a bitmap.
    pub(super) fn cluster_ratio(&self) -> u64 {
        match self.has_ro_compat(RoCompat::BIGALLOC) {
            true => 1 << self.fields().u32(0x1c).saturating_sub(self.fields().u32(0x18)).min(32),
            false => 1,
        }
    }

    pub(super) fn blocks_per_group(&self) -> u64 {
        self.fields().u32(0x20).into()
    }

    pub(super) fn inodes_per_group(&self) -> u64 {
        self.fields().u32(0x28).into()
    }

    pub(super) fn groups(&self) -> u64 {
        let blocks = self.blocks().saturating_sub(self.first_data_block());
        blocks.div_ceil(self.blocks_per_group().max(1))
    }

    pub(super) fn group_start(&self, group: u64) -> u64 {
        self.first_data_block() + group * self.blocks_per_group()
    }

    pub(super) fn inode_size(&self) -> usize {
        const FIRST_REVISION: u32 = 0;
        match self.fields().u32(0x4c) {
            FIRST_REVISION => 128,
            _ => self.fields().u16(0x58).into(),
        }
    }

    /// Returns the number of blocks of one inode table.
    pub(super) fn table_blocks(&self) -> u64 {
        let bytes = self.inodes_per_group() * self.inode_size() as u64;
        bytes.div_ceil(self.block_size())
    }

    pub(super) fn descriptor_size(&self) -> usize {
        match self.has_incompat(Incompat::BITS_64) {
            true => self.fields().u16(0xfe).into(),
            false => 32,
        }
    }

    pub(super) fn reserved_descriptor_blocks(&self) -> u64 {
        match self.has_compat(Compat::RESIZE_INODE) {
            true => self.fields().u16(0xce).into(),
            false => 0,
        }
    }

    pub(super) fn first_meta_group(&self) -> u64 {
        self.fields().u32(0x104).into()
    }

    /// Returns the inode of the journal, if there is one.
    pub(super) fn journal(&self) -> Option<u32> {
        let inode = self.fields().u32(0xe0);
        (self.has_compat(Compat::HAS_JOURNAL) && inode != 0).then_some(inode)
    }

    /// Returns the inodes of the file system's own files that are not among the first inodes. These
    /// are project quotas, and the list of deleted but open files.
    pub(super) fn own_files(&self) -> [u64; 2] {
        [0x26c, 0x280].map(|at| self.fields().u32(at).into())
    }

    /// Returns whether a group contains a copy of the superblock (`ext2fs_bg_has_super` of
    /// e2fsprogs).
    pub(super) fn holds_copy(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.has_compat(Compat::SPARSE_SUPER2) {
            return [0x24c, 0x250]
                .map(|at| u64::from(self.fields().u32(at)))
                .contains(&group);
        }
        if group == 1 || !self.has_ro_compat(RoCompat::SPARSE_SUPER) {
            return true;
        }
        [3u64, 5, 7].into_iter().any(|base| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        })
    }

    /// Returns the initial value of metadata checksums.
    pub(super) fn checksum_seed(&self) -> Option<u32> {
        if !self.has_ro_compat(RoCompat::METADATA_CSUM) {
            return None;
        }
        Some(match self.has_incompat(Incompat::CSUM_SEED) {
            true => self.fields().u32(0x270),
            false => crc32c(!0, &self.bytes[0x68..0x78]),
        })
    }
}
