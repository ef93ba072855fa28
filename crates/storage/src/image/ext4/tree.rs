//! Finds and reads files by path. Symbolic links are followed within the file system.

use super::directory::Directory;
use super::error::inconsistent;
use super::inode::Inode;
use super::layout::Layout;
use super::superblock::Fields;
use crate::error::StorageError;
use std::collections::VecDeque;
use std::fs::File;

const ROOT: u64 = 2;
/// Maximum number of followed links, as in Linux.
const MAX_LINKS: usize = 40;
/// Maximum size of a folder that is read; it has some hundred thousand entries.
const MAX_FOLDER: u64 = 16 << 20;
/// Maximum length of a link's target (`PATH_MAX`).
const MAX_TARGET: u64 = 4096;

/// The files of an image.
pub(crate) struct Tree<'i> {
    image: &'i File,
    layout: Layout,
}

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FolderEntry {
    pub(crate) name: Vec<u8>,
    pub(crate) inode: u64,
}

/// The metadata of a file, from its inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) inode: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    /// The number of the file's names.
    pub(crate) links: u16,
}

impl<'i> Tree<'i> {
    /// Reads the layout, which stays the same while files are edited.
    ///
    /// # Errors
    /// [`StorageError::FileSystem`], [`StorageError::Io`].
    pub(crate) fn open(image: &'i File) -> Result<Tree<'i>, StorageError> {
        let layout = Layout::read(image)?;
        Ok(Tree { image, layout })
    }

    /// Returns the metadata of a file; `None` when the inode is unused.
    ///
    /// # Errors
    /// [`StorageError::FileSystem`], [`StorageError::Io`].
    pub(crate) fn stat(&self, inode: u64) -> Result<Option<Stat>, StorageError> {
        Ok(self.layout.inode(self.image, inode)?.map(|bytes| stat(inode, &bytes)))
    }

    /// Returns the inode of the folder at `path` and the names in it; `None` if the folder does not
    /// exist.
    ///
    /// # Errors
    /// The same as [`Tree::stat`].
    pub(crate) fn list(&self, path: &str) -> Result<Option<(u64, Vec<FolderEntry>)>, StorageError> {
        let words = |path: &[u8]| -> Vec<Vec<u8>> {
            let words = path.split(|byte| *byte == b'/');
            words
                .filter(|word| !word.is_empty() && word != b".")
                .map(<[u8]>::to_vec)
                .collect()
        };
        let (mut left, mut links) = (VecDeque::from(words(path.as_bytes())), 0);
        let mut trail = vec![ROOT];
        while let Some(word) = left.pop_front() {
            let folder = trail.last().copied().unwrap_or(ROOT);
            if word == b".." {
                trail.truncate(trail.len().max(2) - 1);
                continue;
            }
            let Some(names) = self.names(folder)? else {
                return Ok(None);
            };
            let Some(found) = names.into_iter().find(|entry| entry.name == word) else {
                return Ok(None);
            };
            let Some(target) = self.target(found.inode)? else {
                trail.push(found.inode);
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return Ok(None);
            }
            if target.starts_with(b"/") {
                trail.truncate(1);
            }
            words(&target).into_iter().rev().for_each(|word| left.push_front(word));
        }
        let folder = trail.last().copied().unwrap_or(ROOT);
        Ok(self.names(folder)?.map(|names| (folder, names)))
    }

    /// Returns the target of a symbolic link; `None` for any other file.
    fn target(&self, inode: u64) -> Result<Option<Vec<u8>>, StorageError> {
        match self.layout.inode(self.image, inode)? {
            Some(bytes)
                if (Inode {
                    number: inode,
                    bytes: &bytes,
                })
                .is_link() =>
            {
                self.read(inode, MAX_TARGET).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Returns the names in a folder; `None` if the inode is not a folder.
    fn names(&self, inode: u64) -> Result<Option<Vec<FolderEntry>>, StorageError> {
        let Some(bytes) = self.layout.inode(self.image, inode)? else {
            return Ok(None);
        };
        let (folder, mut names) = (
            Inode {
                number: inode,
                bytes: &bytes,
            },
            Vec::new(),
        );
        if !folder.is_directory() {
            return Ok(None);
        }
        if folder.is_inline() {
            // The inode of the parent folder comes first, in place of two entries.
            let [own, more] = folder.inline();
            entries(own.get(4..).unwrap_or_default(), &mut names)?;
            entries(more, &mut names)?;
            return Ok(Some(names));
        }
        let directory = Directory::open(self.image, &self.layout, &folder)?;
        if folder.size() > MAX_FOLDER {
            return Err(StorageError::FileSystem(
                "has a folder that is too large to read".to_owned(),
            ));
        }
        for (logical, physical) in directory.blocks() {
            if !directory.holds_index(logical) {
                entries(&self.layout.block(self.image, physical)?, &mut names)?;
            }
        }
        names.retain(|entry| entry.name != b"." && entry.name != b"..");
        Ok(Some(names))
    }

    /// Reads a file of at most `max` bytes.
    ///
    /// # Errors
    /// [`StorageError::FileSystem`] when it is larger; [`StorageError::Io`].
    pub(crate) fn read(&self, inode: u64, max: u64) -> Result<Vec<u8>, StorageError> {
        let bytes = self.layout.inode(self.image, inode)?.unwrap_or_default();
        let file = Inode {
            number: inode,
            bytes: &bytes,
        };
        if file.size() > max {
            return Err(inconsistent(format!("inode {inode} is larger than {max} bytes")));
        }
        let mut content = vec![0; file.size() as usize];
        if !file.has_blocks() {
            let own = file.inline().concat();
            let length = own.len().min(content.len());
            content[..length].copy_from_slice(&own[..length]);
            return Ok(content);
        }
        let block_size = self.layout.superblock.block_size();
        let mut pieces = file.pieces(self.image, &self.layout)?;
        while let Some(piece) = pieces.next()? {
            for nth in (0..piece.length).filter(|_| piece.written) {
                let at = ((piece.logical + nth) * block_size).min(file.size()) as usize;
                let room = &mut content[at..];
                if room.is_empty() {
                    break;
                }
                let block = self.layout.block(self.image, piece.physical + nth)?;
                let length = room.len().min(block.len());
                room[..length].copy_from_slice(&block[..length]);
            }
        }
        Ok(content)
    }
}

fn stat(inode: u64, bytes: &[u8]) -> Stat {
    let (fields, file) = (Fields(bytes), Inode { number: inode, bytes });
    let two = |low: usize, high: usize| u32::from(fields.u16(low)) | u32::from(fields.u16(high)) << 16;
    Stat {
        inode,
        mode: fields.u16(0).into(),
        uid: two(0x2, 0x78),
        gid: two(0x18, 0x7a),
        size: file.size(),
        links: file.links(),
    }
}

/// Adds the names of a block of entries. The last entry may be a checksum, which looks like an
/// unused entry.
fn entries(block: &[u8], names: &mut Vec<FolderEntry>) -> Result<(), StorageError> {
    const HEAD: usize = 8;
    let mut at = 0;
    while at + HEAD <= block.len() {
        let entry = Fields(&block[at..]);
        let (inode, length) = (u64::from(entry.u32(0)), usize::from(entry.u16(4)));
        let name = at + HEAD..at + HEAD + usize::from(entry.u8(6));
        if length < HEAD || at + length > block.len() || name.end > at + length {
            return Err(inconsistent("the entries of a folder"));
        }
        if inode != 0 {
            let name = block.get(name).unwrap_or_default().to_vec();
            names.push(FolderEntry { name, inode });
        }
        at += length;
    }
    Ok(())
}
