//! Checks whether a guest can grow the file system on its disk while it is mounted.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Offset of the superblock in bytes, and of its fields used here (`struct ext4_super_block`,
/// little-endian; Documentation/filesystems/ext4/super.rst of the kernel).
const SUPERBLOCK: u64 = 1024;
const LENGTH: usize = 0x68;
const MAGIC: (usize, u32) = (0x38, 0xef53);
const COMPAT: usize = 0x5c;
const INCOMPAT: usize = 0x60;

const RESIZE_INODE: u32 = 0x10;
const SPARSE_SUPER2: u32 = 0x200;
const META_BG: u32 = 0x10;

/// Returns why a guest's kernel may be unable to grow the mounted file system on `disk`. Returns
/// `None` without a known obstacle.
pub(crate) fn obstacle(disk: &File) -> io::Result<Option<&'static str>> {
    let mut block = [0; LENGTH];
    disk.read_exact_at(&mut block, SUPERBLOCK)?;
    let word = |at: usize| {
        block
            .iter()
            .skip(at)
            .take(4)
            .rev()
            .fold(0, |sum, byte| sum << 8 | u32::from(*byte))
    };
    let (compat, incompat) = (word(COMPAT), word(INCOMPAT));
    Ok(if word(MAGIC.0) & 0xffff != MAGIC.1 {
        None
    } else if compat & SPARSE_SUPER2 != 0 {
        // `ext4_resize_begin` in fs/ext4/resize.c.
        Some("Linux does not grow a mounted ext4 with the feature sparse_super2")
    } else if compat & RESIZE_INODE == 0 && incompat & META_BG == 0 {
        // No space is reserved for the descriptors of more block groups, and not every kernel
        // allocates some (`ext4_convert_meta_bg`).
        Some("not every Linux grows a mounted ext4 without the feature resize_inode")
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn obstacles_to_live_growth_are_detected() {
        for (options, feature) in [
            ("^sparse_super2", None),
            ("sparse_super2", Some("sparse_super2")),
            ("^resize_inode", Some("resize_inode")),
            ("^resize_inode,meta_bg", None),
        ] {
            let image = tempfile::NamedTempFile::new().unwrap();
            image.as_file().set_len(32 << 20).unwrap();
            let mut mke2fs = Command::new("mke2fs");
            let made = mke2fs
                .args(["-q", "-t", "ext4", "-O", options])
                .arg(image.path())
                .output();
            assert!(made.unwrap().status.success());
            let found = obstacle(image.as_file()).unwrap();
            assert_eq!(found.is_some(), feature.is_some(), "{options}: {found:?}");
            assert!(found.unwrap_or_default().contains(feature.unwrap_or_default()));
        }
        let other = tempfile::NamedTempFile::new().unwrap();
        other.as_file().set_len(4096).unwrap();
        assert_eq!(obstacle(other.as_file()).unwrap(), None);
    }
}
