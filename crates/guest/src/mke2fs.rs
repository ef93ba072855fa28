//! Writes the image of the root file system with e2fsprogs in user space: nothing is mounted.

use crate::command::{Program, run};
use crate::error::Error;
use crate::progress::{self, Progress};
use scalebox_units::Bytes;
use std::fs::File;
use std::path::Path;

/// The ext4 features, listed explicitly, so that a template does not depend on the host's
/// `mke2fs.conf`. `resize_inode` reserves space for growing a mounted file system: at 2 GiB, up to
/// 2 TiB.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,sparse_super,large_file,huge_file,filetype,extent,\
                        flex_bg,64bit,metadata_csum,dir_nlink,extra_isize";

/// Journal size in MiB. The journal is written as a ring: all of it becomes exclusive to each VM,
/// whatever else is shared.
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
    let file = File::create_new(image).map_err(Error::io("create", image))?;
    file.set_len(size.as_u64())
        .map_err(Error::io("set the size of", image))?;
    let (root, path) = (root.to_string_lossy(), image.to_string_lossy());
    // mke2fs detects that the new file reads as zeros and marks the inode tables as zeroed, so that
    // no clone zeroes them at its first boot.
    run(
        Program::Mke2fs,
        [
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
            "-d",
            &root,
            &path,
        ],
    )?;
    progress.fraction(0.3);
    // `noinit_itable` becomes a default mount option. The inode tables that growth adds (1.6
    // GB for 100 GiB) are not marked as zeroed, and the kernel would write them in the background,
    // and while growing. They are holes, which read as zeros anyway.
    run(
        Program::Tune2fs,
        ["-e", "remount-ro", "-E", "mount_opts=noinit_itable", &path],
    )?;
    run(Program::E2fsck, ["-f", "-n", &path])?;
    progress.fraction(0.5);
    file.sync_all().map_err(Error::io("flush", image))?;
    progress.fraction(1.0);
    Ok(())
}
