//! Renames files and directories.

use crate::files::folder;
use crate::files::names::encode;
use crate::server::Failure;
use rustix::fs::{fsync, renameat};
use std::path::Path;

/// Renames a file or directory as rename(2) does: a file at the new path is replaced.
///
/// # Errors
/// Those of the file system;
/// [`FailureCode::Unsupported`](scalebox_agent_api::FailureCode::Unsupported) if the new path is in
/// another file system.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    let (from_folder, from_name) = folder::split(from)?;
    let (to_folder, to_name) = folder::split(to)?;
    let renamed = folder::open(from_folder).and_then(|from_folder| {
        let to_folder = folder::open(to_folder)?;
        renameat(&from_folder, from_name, &to_folder, to_name)?;
        fsync(&to_folder)?;
        fsync(&from_folder)
    });
    renamed.map_err(Failure::io(format!("rename {} to {}", encode(from), encode(to))))
}
