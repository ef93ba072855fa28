//! Zeroes the unused space of a file system, so that deleted data cannot be read from its image.
//!
//! Zeroed are: free blocks and the space after the end of the file system; blocks that are reserved
//! for files but not written, and metadata that was never written; unused inodes, which can contain
//! short links, small files and attributes; remains of deleted names in folders; and the journal,
//! whose blocks are copies of others. Then all of it is read again, and must contain only zeros.

use super::directory::Directory;
use super::error::{FRAGMENTED, inconsistent, unreadable};
use super::inode::{Inode, RESIZE_INODE};
use super::layout::Layout;
use crate::error::StorageError;
use crate::local::files;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use scalebox_fault_points::fault_point;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Bytes read at once.
const PIECE: u64 = 256 << 10;
/// Maximum number of pieces of all files, where each is kept in memory: 64 MiB in total.
const MAX_USED: usize = 1 << 22;
/// Timeout of one pass. A guest can fragment a disk into single blocks, for which a pass would take
/// hours.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Zeroes all unused space of the file system in `image`, which must be sound and have its journal
/// replayed.
///
/// # Errors
/// [`StorageError::FileSystem`], [`StorageError::Io`]; [`StorageError::Host`] when data is left.
pub(crate) fn zero(image: &File) -> Result<(), StorageError> {
    Pass::new(image, Mode::Zero)?.run()?;
    fault_point("snapshot: unused blocks zeroed").map_err(StorageError::step)?;
    Pass::new(image, Mode::Verify)?.run()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Zero,
    Verify,
}

struct Pass<'i> {
    image: &'i File,
    size: u64,
    layout: Layout,
    mode: Mode,
    begun: Instant,
    /// All blocks of files and of their block maps. The list is only filled if bitmaps are not
    /// sufficient: a cluster in use can have unused blocks.
    used: RefCell<Vec<Range<u64>>>,
}

impl Pass<'_> {
    fn new(image: &File, mode: Mode) -> Result<Pass<'_>, StorageError> {
        Ok(Pass {
            image,
            size: image.metadata().map_err(unreadable)?.len(),
            layout: Layout::read(image)?,
            mode,
            begun: Instant::now(),
            used: RefCell::default(),
        })
    }

    fn run(&self) -> Result<(), StorageError> {
        for group in 0..self.layout.groups() {
            self.inodes(group)?;
        }
        self.free_blocks()
    }

    /// Zeroes the unused inodes of a group, and the unused space of the used ones.
    fn inodes(&self, group: usize) -> Result<(), StorageError> {
        let (table, size) = (self.layout.table_of(group), self.layout.superblock.inode_size());
        let used = self.layout.used_inodes(self.image, group)?;
        let first = group as u64 * self.layout.superblock.inodes_per_group() + 1;
        let mut bytes = vec![0; PIECE as usize];
        self.each_data(&table, |data| {
            // The loop covers whole inodes, counted from the start of the table.
            let mut nth = (data.start - table.start) / size as u64;
            let end = (data.end - table.start).div_ceil(size as u64);
            while nth < end {
                let count = (end - nth).min(PIECE / size as u64);
                let start = table.start + nth * size as u64;
                let piece = &mut bytes[..count as usize * size];
                self.image.read_exact_at(piece, start).map_err(unreadable)?;
                let mut unused = Vec::new();
                for (bytes, nth) in piece.chunks_exact(size).zip(nth..) {
                    let (number, at) = (first + nth, table.start + nth * size as u64);
                    if used.contains(number) {
                        self.used_inode(&Inode { number, bytes })?;
                    } else if bytes.iter().any(|&byte| byte != 0) {
                        unused.push(at..at + size as u64);
                    }
                }
                for range in super::ranges::normalize(unused) {
                    self.clear(range)?;
                }
                nth += count;
            }
            Ok(())
        })
    }

    fn used_inode(&self, inode: &Inode<'_>) -> Result<(), StorageError> {
        self.check_deadline()?;
        if self.layout.has_clusters() {
            self.note_used(inode)?;
        }
        let number = u32::try_from(inode.number).unwrap_or_default();
        if number == RESIZE_INODE {
            return Ok(());
        }
        if self.layout.superblock.journal() == Some(number) {
            return self.journal(inode);
        }
        if inode.is_directory() && inode.has_blocks() {
            self.directory(inode)?;
        }
        let mut pieces = inode.pieces(self.image, &self.layout)?;
        while let Some(piece) = pieces.next()? {
            if !piece.written {
                self.clear_data(piece.physical..piece.physical + piece.length)?;
            }
        }
        Ok(())
    }

    fn note_used(&self, inode: &Inode<'_>) -> Result<(), StorageError> {
        let (mut used, attributes) = (self.used.borrow_mut(), inode.attribute_block());
        if attributes != 0 {
            used.push(attributes..attributes + 1);
        }
        let mut pieces = inode.pieces(self.image, &self.layout)?;
        while let Some(piece) = pieces.next()? {
            used.push(piece.physical..piece.physical + piece.length);
        }
        used.extend(pieces.nodes.iter().map(|&node| node..node + 1));
        match used.len() {
            0..=MAX_USED => Ok(()),
            _ => Err(inconsistent("its files have too many pieces")),
        }
    }

    /// Zeroes the journal except its first block, which states that there is nothing to replay. A
    /// new journal looks the same.
    fn journal(&self, inode: &Inode<'_>) -> Result<(), StorageError> {
        let mut pieces = inode.pieces(self.image, &self.layout)?;
        while let Some(piece) = pieces.next()? {
            let head = u64::from(piece.logical == 0);
            self.clear_data(piece.physical + head..piece.physical + piece.length)?;
        }
        Ok(())
    }

    fn directory(&self, inode: &Inode<'_>) -> Result<(), StorageError> {
        let directory = Directory::open(self.image, &self.layout, inode)?;
        for (logical, physical) in directory.blocks() {
            let mut block = self.layout.block(self.image, physical)?;
            if !directory.wipe(logical, &mut block)? {
                continue;
            }
            let at = physical * self.layout.superblock.block_size();
            match self.mode {
                Mode::Verify => return Err(left(at)),
                Mode::Zero => self.image.write_all_at(&block, at).map_err(unwritable)?,
            }
        }
        Ok(())
    }

    /// Zeroes free blocks, and the space after the last block.
    fn free_blocks(&self) -> Result<(), StorageError> {
        let metadata = self.layout.metadata();
        let mut used = self.used.take();
        used.extend_from_slice(&metadata);
        let used = super::ranges::normalize(used);
        for group in 0..self.layout.groups() {
            self.check_deadline()?;
            let free = match self.layout.has_clusters() {
                true => super::ranges::without(&self.layout.blocks_of(group), &used),
                false => self.layout.free_blocks(self.image, group, &metadata)?,
            };
            for blocks in free.into_iter().chain(self.layout.unused_metadata(group)) {
                self.clear_data(blocks)?;
            }
        }
        let end = self.layout.superblock.blocks() * self.layout.superblock.block_size();
        match end < self.size {
            true => self.each_data(&(end..self.size), |data| self.clear(data)),
            false => Ok(()),
        }
    }

    /// Zeroes the data in these blocks.
    fn clear_data(&self, blocks: Range<u64>) -> Result<(), StorageError> {
        let size = self.layout.superblock.block_size();
        self.each_data(&(blocks.start * size..blocks.end * size), |data| self.clear(data))
    }

    /// Calls `each` for the parts of `range` that are not holes of the image.
    fn each_data(
        &self,
        range: &Range<u64>,
        mut each: impl FnMut(Range<u64>) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let mut at = range.start;
        while at < range.end {
            let Some(start) = files::seek_or_end(self.image, SeekFrom::Data(at)).map_err(unreadable)? else {
                break;
            };
            if start >= range.end {
                break;
            }
            let end = files::seek_or_end(self.image, SeekFrom::Hole(start)).map_err(unreadable)?;
            let end = end.unwrap_or(self.size).min(range.end);
            each(start..end)?;
            at = end;
        }
        Ok(())
    }

    fn clear(&self, range: Range<u64>) -> Result<(), StorageError> {
        match self.mode {
            Mode::Zero => {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let punched = fallocate(self.image, punch, range.start, range.end - range.start);
                punched.map_err(|errno| unwritable(errno.into()))
            }
            Mode::Verify => self.require_zeros(range),
        }
    }

    fn require_zeros(&self, range: Range<u64>) -> Result<(), StorageError> {
        let mut bytes = vec![0; PIECE.min(range.end - range.start) as usize];
        let mut at = range.start;
        while at < range.end {
            let piece = &mut bytes[..PIECE.min(range.end - at) as usize];
            self.image.read_exact_at(piece, at).map_err(unreadable)?;
            if let Some(nth) = piece.iter().position(|&byte| byte != 0) {
                return Err(left(at + nth as u64));
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn check_deadline(&self) -> Result<(), StorageError> {
        if self.begun.elapsed() < TIMEOUT {
            return Ok(());
        }
        Err(StorageError::FileSystem(format!(
            "{FRAGMENTED} zeroing its unused blocks takes longer than {} s",
            TIMEOUT.as_secs()
        )))
    }
}

fn unwritable(error: io::Error) -> StorageError {
    StorageError::Host {
        doing: "zero the unused blocks of an image",
        reason: error.to_string(),
    }
}

fn left(at: u64) -> StorageError {
    StorageError::Host {
        doing: "zero the unused blocks of an image",
        reason: format!("data is left at byte {at}"),
    }
}
