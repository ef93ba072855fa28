//! Growing the file system with resize2fs.

use super::check::{check, check_work, repair};
use super::error::{CHECK_TOO_SLOW, as_host_fault, unreadable};
use super::features::RoCompat;
use super::superblock::Superblock;
use super::unchanged::{Work, require as require_unchanged};
use crate::error::StorageError;
use crate::image::e2fsprogs::run_on_image;
use crate::local::files;
use crate::programs::RESIZE2FS;
use scalebox_units::Bytes;
use std::fs::File;
use std::path::Path;

/// Growth factor per step, for a file system that cannot grow to its size at once. Each step needs
/// about as much new space for group descriptors as exists already, and `resize2fs` takes it only
/// from the existing blocks.
const STEP_FACTOR: u64 = 8;

/// Returns whether the file system fills its image.
///
/// # Errors
/// [`StorageError::FileSystem`], [`StorageError::Io`].
pub(crate) fn fills(image: &File) -> Result<bool, StorageError> {
    let superblock = Superblock::read_unchecked(image)?;
    let size = image.metadata().map_err(unreadable)?.len();
    Ok(superblock.blocks() >= size / superblock.block_size())
}

/// Returns why the file system in `image` cannot grow at all. The reason continues the sentence
/// "its file system …".
///
/// # Errors
/// [`StorageError::FileSystem`], [`StorageError::Io`].
pub(crate) fn cannot_grow(image: &File) -> Result<Option<&'static str>, StorageError> {
    // resize2fs up to 1.47 grows it only when forced, and then leaves wrong counts of free blocks.
    let bigalloc = Superblock::read_unchecked(image)?.has_ro_compat(RoCompat::BIGALLOC);
    Ok(bigalloc.then_some("has the feature bigalloc, and resize2fs cannot grow such file systems reliably"))
}

/// Grows the image `path`, open as `image`, and its file system to `size`. No file in it changes.
/// Returns a clone of the image before the growth, for [`finish_growth`].
///
/// # Errors
/// [`StorageError::FileSystem`] when it is damaged, [`StorageError::CannotGrow`] when it cannot
/// become that large, [`StorageError::Host`]. The image must then be discarded.
pub(crate) fn grow(path: &Path, image: &File, size: Bytes) -> Result<File, StorageError> {
    // Replaying the journal at the guest's next boot would undo the growth.
    repair(path)?;
    let before = files::unnamed_clone(files::parent(path), image)?;
    let superblock = Superblock::read(image)?;
    if let Err(whole) = grow_to(path, image, size.as_u64()) {
        if matches!(
            whole,
            StorageError::Host { .. } | StorageError::Io { .. } | StorageError::Program(_)
        ) {
            return Err(whole);
        }
        grow_in_steps(path, image, &before, &superblock, size)?;
    }
    require_unchanged(&before, image, &Work::Growth)?;
    Ok(before)
}

/// Checks a grown file system. `resize2fs` does not update the checksums of an orphan file, nor the
/// counts of some layouts. Those are repaired, and all files must then be as in `before`.
///
/// # Errors
/// [`StorageError::Host`], [`StorageError::Io`].
pub(crate) fn finish_growth(path: &Path, image: &File, before: &File) -> Result<(), StorageError> {
    const DOING: &str = "grow a file system";
    match check(path) {
        Err(StorageError::FileSystem(reason)) if !reason.starts_with(CHECK_TOO_SLOW) => {
            repair(path).map_err(|error| as_host_fault(error, DOING))?;
            require_unchanged(before, image, &Work::Growth)?;
            check_work(path, DOING)
        }
        other => other,
    }
}

/// Grows the file system of `before` in steps that are each small enough to succeed.
fn grow_in_steps(
    path: &Path,
    image: &File,
    before: &File,
    superblock: &Superblock,
    size: Bytes,
) -> Result<(), StorageError> {
    let failed = |error| StorageError::io("clone", path.display(), error);
    image.set_len(0).map_err(failed)?;
    files::reflink(before, image).map_err(failed)?;
    let mut next = superblock.blocks() * superblock.block_size();
    while next < size.as_u64() {
        next = next.saturating_mul(STEP_FACTOR).min(size.as_u64());
        grow_to(path, image, next).map_err(|error| match error {
            StorageError::CannotGrow { what, reason, .. } => StorageError::CannotGrow {
                what,
                size: size.ceil_gib(),
                reason,
            },
            other => other,
        })?;
    }
    Ok(())
}

pub(super) fn grow_to(path: &Path, image: &File, size: u64) -> Result<(), StorageError> {
    let resized = image.set_len(size);
    resized.map_err(|error| StorageError::io("resize", path.display(), error))?;
    let answer = run_on_image(path, RESIZE2FS, &[], None)?;
    let harmless = |line: &str| line.starts_with("The filesystem is already ");
    let complaint = answer.complaint(harmless);
    if answer.code == Some(0) && complaint.is_none() {
        return Ok(());
    }
    let reason = answer.output();
    if answer.is_fault_on_sound_image() || answer.code != Some(1) {
        return Err(StorageError::Host {
            doing: "grow a file system",
            reason,
        });
    }
    Err(StorageError::CannotGrow {
        what: "the disk".to_owned(),
        size: Bytes::new(size).ceil_gib(),
        reason,
    })
}
