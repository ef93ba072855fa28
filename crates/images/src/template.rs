//! Builds a template, from a recipe to the files that a VM boots from.

use crate::bootstrap::{Bootstrapped, bootstrap};
use crate::cache::CacheEntry;
use crate::customize;
use crate::error::Error;
use crate::initramfs;
use crate::kernel::KernelPackage;
use crate::mke2fs;
use crate::programs::require_programs;
use crate::progress::{self, Progress};
use crate::recipe::Recipe;
use crate::scratch::Scratch;
use scalebox_units::{Bytes, Gib};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The result of a build. Without a cache the files exist as long as this value; with a cache,
/// until they are removed from it. Do not modify them: a pool imports a copy of the root file
/// system.
#[derive(Debug)]
pub struct Artifacts {
    /// The root file system: a bare, sparse ext4 image, cleanly unmounted.
    pub rootfs: PathBuf,
    /// The kernel, for QEMU's `-kernel`: an ELF image (PVH), or a bzImage if the ELF image could
    /// not be extracted.
    pub kernel: PathBuf,
    /// The drivers of the initramfs. A guest boots it with [`agent_archive`](crate::agent_archive)
    /// appended.
    pub initrd: PathBuf,
    /// The modules drive: an ext4 file system with the kernel's modules, as below
    /// `/lib/modules/VERSION`.
    pub modules: PathBuf,
    /// Keeps the files if there is no cache.
    _scratch: Option<Scratch>,
}

/// Builds the recipe's template. Takes a minute or two, and needs network access and root.
///
/// During the build, a temporary directory in `work_dir` holds the installed tree (300 MB);
/// leftovers of interrupted builds are removed first. With a `cache` directory, the finished files
/// are kept there under the recipe's [fingerprint](Recipe::fingerprint), and are returned at once
/// if they exist. A failed or interrupted build leaves nothing that counts as finished. Concurrent
/// builds do not interfere; of two equal builds with the same cache, the second waits for the
/// first.
///
/// # Errors
/// [`Error::Recipe`] before anything is done; [`Error::Program`] with the output of a failed
/// program; [`Error::Io`]; [`Error::Kernel`] if the archive's kernel package lacks expected
/// content.
pub fn build(
    recipe: &Recipe,
    work_dir: &Path,
    cache: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<Artifacts, Error> {
    recipe.check()?;
    let Some(cache) = cache else {
        let scratch = Scratch::new(work_dir)?;
        build_files(recipe, scratch.path(), scratch.path(), progress)?;
        let artifacts = Artifacts::in_dir(scratch.path());
        return Ok(Artifacts {
            _scratch: Some(scratch),
            ..artifacts
        });
    };
    let entry = CacheEntry::lock(cache, &recipe.fingerprint())?;
    if let Some(finished) = entry.finished() {
        return Ok(Artifacts::in_dir(finished));
    }
    let scratch = Scratch::new(work_dir)?;
    let out = entry.start()?;
    if let Err(error) = build_files(recipe, scratch.path(), out, progress) {
        if let Err(undo) = entry.discard() {
            tracing::warn!(error = %undo, "cannot remove a failed build from the cache; the next build removes it");
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
            modules: dir.join(MODULES),
            _scratch: None,
        }
    }
}

const ROOTFS: &str = "rootfs.ext4";
const KERNEL: &str = "vmlinux";
const INITRD: &str = "initrd.img";
const MODULES: &str = "modules.img";

/// Creates the files in `out`, using `scratch` for intermediate files.
fn build_files(recipe: &Recipe, scratch: &Path, out: &Path, progress: &mut dyn Progress) -> Result<(), Error> {
    require_programs()?;
    let Bootstrapped { root, kernel } = bootstrap(recipe, scratch, progress)?;
    let package = KernelPackage::open(&kernel)?;

    progress.step(progress::BOOT);
    write_flushed(&out.join(KERNEL), &package.image()?)?;
    write_flushed(&out.join(INITRD), &initramfs::drivers(&package)?)?;

    progress.step(progress::CUSTOMIZE);
    customize::customize(&root, &kernel, &package.version)?;
    mke2fs::write_modules(&customize::modules_dir(&root, &package.version), &out.join(MODULES))?;

    let size = recipe.size.max(image_size(&root)?);
    mke2fs::write(&root, &out.join(ROOTFS), size, progress)
}

/// Returns the smallest whole GiB in which the tree below `root` leaves a third of the blocks free.
fn image_size(root: &Path) -> Result<Bytes, Error> {
    let used = mke2fs::tree_size(root)?.as_u64();
    Ok(Gib::new(used.saturating_mul(3).div_ceil(2).div_ceil(1 << 30)).bytes())
}

fn write_flushed(path: &Path, content: &[u8]) -> Result<(), Error> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(Error::io("write", path))
}
