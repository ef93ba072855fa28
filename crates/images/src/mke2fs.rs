//! Writes the image of the root file system with e2fsprogs in user space: nothing is mounted.

use crate::error::Error;
use crate::programs::{E2FSCK, MKE2FS, TUNE2FS, run};
use crate::progress::{self, Progress};
use scalebox_units::Bytes;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The ext4 features, listed explicitly, so that a template does not depend on the host's
/// `mke2fs.conf`. `resize_inode` reserves space for growing a mounted file system: at 2 GiB, up to
/// 2 TiB.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,sparse_super,large_file,huge_file,filetype,extent,\
                        flex_bg,64bit,metadata_csum,dir_nlink,extra_isize";

/// Journal size in MiB. The journal is written as a ring, so all of it becomes exclusive to each
/// VM.
const JOURNAL_MIB: &str = "size=32";

/// Number of block groups that share one place for bitmaps and inode tables: 32 GiB of groups. A
/// disk grown to 100 GiB has one stretch of metadata per such unit, and each stretch is an extent
/// that every clone copies and flushes: 68 in total, compared to 109 with mke2fs' default of 16
/// groups.
const FLEX_GROUPS: &str = "256";

/// Percentage of blocks reserved for root. On a full disk its owner can still log in and clean up.
const RESERVED_PERCENT: &str = "1";

/// Writes the tree below `root` to the new file `image`, as a sparse ext4 file system of `size`.
/// Checks the result.
pub(crate) fn write(root: &Path, image: &Path, size: Bytes, progress: &mut dyn Progress) -> Result<(), Error> {
    progress.step(progress::IMAGE);
    create(image, size, Some(root))?;
    progress.fraction(0.3);
    finish(image)?;
    progress.fraction(1.0);
    Ok(())
}

/// Writes the tree below `root`, or nothing, to the new file `image`, as a sparse ext4 file system
/// of `size`.
pub(crate) fn create(image: &Path, size: Bytes, root: Option<&Path>) -> Result<(), Error> {
    let file = File::create_new(image).map_err(Error::io("create", image))?;
    file.set_len(size.as_u64())
        .map_err(Error::io("set the size of", image))?;
    // mke2fs detects that the new file reads as zeros and marks the inode tables as zeroed, so that
    // no clone zeroes them at its first boot.
    let mut mke2fs = run(MKE2FS).args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-I",
        "256",
        "-i",
        "16384",
        "-m",
        RESERVED_PERCENT,
        "-G",
        FLEX_GROUPS,
        "-J",
        JOURNAL_MIB,
        "-L",
        "scalebox-root",
        "-O",
        FEATURES,
    ]);
    if let Some(root) = root {
        mke2fs = mke2fs.args(["-d".as_ref(), root.as_os_str()]);
    }
    mke2fs.args([image]).stdout()?;
    Ok(())
}

/// Sets the options of a filled image, checks it, and flushes it.
pub(crate) fn finish(image: &Path) -> Result<(), Error> {
    // `noinit_itable` becomes a default mount option. The inode tables that growth adds (1.6
    // GB for 100 GiB) are not marked as zeroed, and the kernel would write them in the background,
    // and while growing. They are holes, which read as zeros anyway.
    run(TUNE2FS)
        .args(["-e", "remount-ro", "-E", "mount_opts=noinit_itable"])
        .args([image])
        .stdout()?;
    run(E2FSCK).args(["-f", "-n"]).args([image]).stdout()?;
    let file = File::open(image).map_err(Error::io("open", image))?;
    file.sync_all().map_err(Error::io("flush", image))
}

/// The features of the modules drive, which is never written: no journal, nothing for growth.
const MODULES_FEATURES: &str = "none,filetype,extent,dir_index,sparse_super,large_file,huge_file";

/// The size of a block of the modules drive.
const BLOCK: u64 = 4096;

/// Writes the tree below `modules` to the new file `image`, as an ext4 file system that just holds
/// it. Checks the result.
pub(crate) fn write_modules(modules: &Path, image: &Path) -> Result<(), Error> {
    let tree = measure(modules)?;
    // In addition to the files: inodes of 256 bytes, and a few bitmaps and indexes.
    let size = tree.bytes + tree.bytes / 20 + tree.entries * 256 + (4 << 20);
    let file = File::create_new(image).map_err(Error::io("create", image))?;
    file.set_len(size.next_multiple_of(1 << 20))
        .map_err(Error::io("set the size of", image))?;
    let (root, path) = (modules.to_string_lossy(), image.to_string_lossy());
    let inodes = (tree.entries + 64).to_string();
    run(MKE2FS)
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-I",
            "256",
            "-N",
            &inodes,
            "-m",
            "0",
            "-L",
            "scalebox-mod",
            "-O",
            MODULES_FEATURES,
            "-d",
            &root,
            &path,
        ])
        .stdout()?;
    run(E2FSCK).args(["-f", "-n", &path]).stdout()?;
    file.sync_all().map_err(Error::io("flush", image))
}

/// Returns the size of the files below `root`, each in whole blocks.
pub(crate) fn tree_size(root: &Path) -> Result<Bytes, Error> {
    Ok(Bytes::new(measure(root)?.bytes))
}

/// The contents of a folder.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tree {
    /// The size of the files, each in whole blocks.
    bytes: u64,
    /// The number of files and folders.
    entries: u64,
}

fn measure(dir: &Path) -> Result<Tree, Error> {
    let mut tree = Tree::default();
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let meta = path.symlink_metadata().map_err(Error::io("read", &path))?;
        tree.entries += 1;
        tree.bytes += meta.size().next_multiple_of(BLOCK);
        if meta.is_dir() {
            let below = measure(&path)?;
            tree.entries += below.entries;
            tree.bytes += below.bytes;
        }
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_modules_drive_holds_the_whole_tree() {
        let scratch = tempfile::tempdir().unwrap();
        let (modules, image) = (scratch.path().join("modules"), scratch.path().join("modules.img"));
        fs::create_dir_all(modules.join("kernel/net")).unwrap();
        fs::write(modules.join("modules.dep"), "kernel/net/a.ko:\n").unwrap();
        for number in 0..500 {
            fs::write(
                modules.join(format!("kernel/net/{number}.ko")),
                vec![number as u8; 9000],
            )
            .unwrap();
        }
        write_modules(&modules, &image).unwrap();
        let read = |path: &str| {
            let image = image.to_str().unwrap();
            let output = Command::new("debugfs")
                .args(["-R", &format!("cat {path}"), image])
                .output();
            output.unwrap().stdout
        };
        assert_eq!(read("/modules.dep"), b"kernel/net/a.ko:\n");
        assert_eq!(read("/kernel/net/499.ko"), vec![499_u32 as u8; 9000]);
        let size = image.metadata().unwrap().len();
        assert!(size < 12 << 20, "{size}");
    }
}
