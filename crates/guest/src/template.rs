//! Building a template, from a recipe to the three files that a VM boots from.

use crate::bootstrap::{Bootstrapped, bootstrap};
use crate::cache::Entry;
use crate::command::require_programs;
use crate::customize;
use crate::error::Error;
use crate::initramfs;
use crate::kernel::KernelPackage;
use crate::mke2fs;
use crate::progress::{self, Progress};
use crate::recipe::Recipe;
use crate::scratch::Scratch;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a build made. The files are there as long as this value is, or, with a cache, until someone
/// removes them from it; they are for reading: whoever imports the root file system into a pool
/// copies it.
#[derive(Debug)]
pub struct Artifacts {
    /// The root file system: a bare ext4 image, sparse, cleanly unmounted.
    pub rootfs: PathBuf,
    /// The kernel, for QEMU's `-kernel`: an ELF image (PVH), or a bzImage where it could not be
    /// unpacked.
    pub kernel: PathBuf,
    /// The initramfs, for `-initrd`.
    pub initrd: PathBuf,
    /// Keeps the files where there is no cache to keep them.
    _scratch: Option<Scratch>,
}

/// Builds the recipe's template: a minute or two, a network, root.
///
/// `work_dir` takes the installed tree (300 MB) for the time of the build, in a directory made and
/// removed by it; what an interrupted build left there is removed first. With a `cache` directory
/// the finished files are kept there, under the [fingerprint](Recipe::fingerprint) of the recipe,
/// and are returned at once when they are there already. A build that fails or is interrupted
/// leaves nothing that is taken for finished; builds at the same time do not disturb each other,
/// and of two equal ones with one cache the second waits for the first.
///
/// # Errors
/// [`Error::Recipe`] before anything is done; [`Error::Command`] with all that a failed program
/// wrote; [`Error::Io`]; [`Error::Kernel`] when the archive's kernel package is not what this crate
/// knows.
pub fn build(
    recipe: &Recipe,
    work_dir: &Path,
    cache: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<Artifacts, Error> {
    recipe.check()?;
    let Some(cache) = cache else {
        let scratch = Scratch::new(work_dir)?;
        cook(recipe, scratch.path(), scratch.path(), progress)?;
        let made = Artifacts::in_dir(scratch.path());
        return Ok(Artifacts {
            _scratch: Some(scratch),
            ..made
        });
    };
    let entry = Entry::lock(cache, &recipe.fingerprint())?;
    if let Some(finished) = entry.finished() {
        return Ok(Artifacts::in_dir(finished));
    }
    let scratch = Scratch::new(work_dir)?;
    let out = entry.start()?;
    if let Err(error) = cook(recipe, scratch.path(), out, progress) {
        if let Err(undo) = entry.discard() {
            tracing::warn!(error = %undo, "what the failed build left in the cache stays until the next one");
        }
        return Err(error);
    }
    Ok(Artifacts::in_dir(entry.finish()?))
}

impl Artifacts {
    fn in_dir(dir: &Path) -> Self {
        Artifacts {
            rootfs: dir.join(ROOTFS),
            kernel: dir.join(KERNEL),
            initrd: dir.join(INITRD),
            _scratch: None,
        }
    }
}

const ROOTFS: &str = "rootfs.ext4";
const KERNEL: &str = "vmlinux";
const INITRD: &str = "initrd.img";

/// Makes the three files in `out`, with `scratch` for everything on the way.
fn cook(recipe: &Recipe, scratch: &Path, out: &Path, progress: &mut dyn Progress) -> Result<(), Error> {
    require_programs()?;
    let Bootstrapped { root, kernel } = bootstrap(recipe, scratch, progress)?;
    let package = KernelPackage::open(&kernel)?;

    progress.step(progress::BOOT);
    write_flushed(&out.join(KERNEL), &package.image()?)?;
    write_flushed(&out.join(INITRD), &initramfs::build(&package)?)?;

    progress.step(progress::CONTENTS);
    customize::furnish(&root, &kernel, &package.version)?;

    mke2fs::write(&root, &out.join(ROOTFS), recipe.size, progress)
}

fn write_flushed(path: &Path, content: &[u8]) -> Result<(), Error> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(Error::io("write", path))
}
