//! Checking and repairing the file system with e2fsck.

use super::error::{CHECK_TOO_SLOW, as_host_fault};
use super::features::{Incompat, RoCompat};
use super::layout::Layout;
use super::refuse;
use super::superblock::Superblock;
use crate::error::StorageError;
use crate::image::e2fsprogs::run_on_image;
use crate::local::files;
use crate::programs::E2FSCK;
use scalebox_programs::ProgramError;
use std::fs::File;
use std::path::Path;

/// Replays the journal and makes the repairs that are safe.
///
/// # Errors
/// [`StorageError::FileSystem`] when it has other damage, or a feature that is not supported;
/// [`StorageError::Host`].
pub(crate) fn repair(image: &Path) -> Result<(), StorageError> {
    replay(image)?;
    e2fsck(image, &["-f", "-p"])
}

/// Checks the file system without changing it: there must be no finding.
///
/// # Errors
/// The same as [`repair`].
pub(crate) fn check(image: &Path) -> Result<(), StorageError> {
    require_plain(image)?;
    e2fsck(image, &["-f", "-n"])?;
    let file = open(image)?;
    Layout::read(&file)?.check_bitmaps(&file)
}

/// Checks a file system that was sound before an operation of the host: any damage is the host's
/// fault.
///
/// # Errors
/// [`StorageError::Host`]; otherwise the same as [`check`].
pub(crate) fn check_work(image: &Path, doing: &'static str) -> Result<(), StorageError> {
    check(image).map_err(|error| as_host_fault(error, doing))
}

/// Returns whether the file system keeps quotas itself.
pub(crate) fn keeps_quotas(image: &File) -> Result<bool, StorageError> {
    let superblock = Superblock::read_unchecked(image)?;
    Ok([RoCompat::QUOTA, RoCompat::PROJECT]
        .map(|feature| superblock.has_ro_compat(feature))
        .contains(&true))
}

/// Replays the journal if it is not empty. It may contain another superblock, which is then
/// inspected too.
fn replay(image: &Path) -> Result<(), StorageError> {
    if require_plain(image)?.has_incompat(Incompat::RECOVER) {
        e2fsck(image, &["-E", "journal_only", "-p"])?;
        require_plain(image)?;
    }
    Ok(())
}

/// Runs e2fsck. Exit code 1 means that errors were corrected, 4 that some were not (e2fsck(8)).
/// Others are faults of the host, except for a feature that this e2fsck does not support.
fn e2fsck(image: &Path, options: &[&str]) -> Result<(), StorageError> {
    const CORRECTED: i32 = 1;
    const UNCORRECTED: i32 = 4;
    const ERROR: i32 = 8;
    let answer = match run_on_image(image, E2FSCK, options, None) {
        Err(ProgramError::Killed { why, .. }) => {
            return Err(StorageError::FileSystem(format!("{CHECK_TOO_SLOW}: the check {why}")));
        }
        other => other?,
    };
    let output = answer.output();
    if let Some((_, features)) = output.split_once("has unsupported feature(s): ") {
        let features = features.lines().next().unwrap_or_default();
        return Err(StorageError::FileSystem(format!(
            "has features that e2fsck does not support: {features}"
        )));
    }
    match answer.code {
        _ if answer.is_fault_of_host() => {}
        // e2fsck reports this when it updates quotas.
        Some(0 | CORRECTED) if answer.complaint(|line| line.starts_with("[QUOTA WARNING]")).is_none() => return Ok(()),
        // e2fsck combines this code with 8 when it aborts because of a finding. With 8 alone, it
        // cannot interpret the superblock.
        Some(code) if code & UNCORRECTED != 0 || code == ERROR && output.contains("super") => {
            return Err(StorageError::FileSystem(format!(
                "is damaged; repair it first.\n{output}"
            )));
        }
        _ => {}
    }
    Err(StorageError::Host {
        doing: "check a file system",
        reason: format!("e2fsck exited with {}: {output}", answer.status),
    })
}

fn open(image: &Path) -> Result<File, StorageError> {
    files::open_read(image).map_err(|error| StorageError::io("read", image.display(), error))
}

/// Rejects file systems that make e2fsprogs wait, or look for something outside the image, and
/// those that guests cannot use.
fn require_plain(image: &Path) -> Result<Superblock, StorageError> {
    let file = open(image)?;
    let superblock = Superblock::read_unchecked(&file)?;
    match refuse::reason(&superblock) {
        Some(reason) => Err(StorageError::FileSystem(reason)),
        None => Ok(superblock),
    }
}
