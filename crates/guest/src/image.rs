//! Writing the root file system's image, by e2fsprogs in user space: nothing is mounted.

use crate::command::{Program, run};
use crate::error::Error;
use crate::progress::{self, Progress};
use scalebox_units::Bytes;
use std::fs::File;
use std::path::Path;

/// The features, spelled out, so that a template does not depend on the host's `mke2fs.conf`.
/// `resize_inode` reserves what growing a mounted file system needs: at 2 GiB, up to 2 TiB.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,sparse_super,large_file,huge_file,filetype,extent,\
                        flex_bg,64bit,metadata_csum,dir_nlink,extra_isize";

/// The journal is written in a ring: all of it becomes each VM's own, whatever it shares otherwise.
/// MiB.
const JOURNAL_MIB: &str = "size=32";

/// Block groups that keep their bitmaps and inode tables together: those of 32 GiB. A disk that is
/// grown to 100 GiB has a stretch of metadata for each such lot, and each stretch is an extent that
/// every clone copies and flushes: 68 in all, where mke2fs' default of 16 groups makes 109.
const FLEX_GROUPS: &str = "256";

/// Reserved for root, so that a full disk still lets its owner log in and tidy up. Per cent.
const RESERVED: &str = "1";

/// Writes the tree below `root` as an ext4 file system of `size` (sparse) to the new file `image`,
/// and checks it.
pub(crate) fn write(root: &Path, image: &Path, size: Bytes, progress: &mut dyn Progress) -> Result<(), Error> {
    progress.step(progress::IMAGE);
    let file = File::create_new(image).map_err(Error::io("create", image))?;
    file.set_len(size.as_u64())
        .map_err(Error::io("set the size of", image))?;
    let (root, path) = (root.to_string_lossy(), image.to_string_lossy());
    // mke2fs finds that the new file reads as zeros and marks the inode tables as zeroed: no clone
    // zeroes them at first boot.
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
            RESERVED,
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
    // `noinit_itable` as a default mount option: a grown clone has inode tables that nobody zeroed,
    // for 100 GiB 1.6 GB of them, which the kernel would write in the background (and while
    // growing). They lie in holes and read as zeros as it is.
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
