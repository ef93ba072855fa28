//! Folders that the daemon keeps beside the pool.

use crate::host::error::ServiceError;
use scalebox_units::VmId;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// Creates a folder that only root may enter, with its parents.
///
/// # Errors
/// 500.
pub(crate) fn make_private_dir(dir: &Path) -> Result<(), ServiceError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| ServiceError::Internal(format!("cannot create {}: {error}", dir.display())))
}

/// Removes a folder and its contents. A missing folder is not an error.
pub(crate) fn remove_dir(dir: &Path) -> Result<(), ServiceError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(ServiceError::Internal(format!(
            "cannot remove {}: {error}",
            dir.display()
        ))),
        _ => Ok(()),
    }
}

/// Lists the VM ids that `folder` has a folder for. Ignores other names.
pub(crate) fn vm_folders(folder: &Path) -> Result<Vec<VmId>, ServiceError> {
    let failed = |error: io::Error| ServiceError::Internal(format!("cannot list {}: {error}", folder.display()));
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        ids.extend(name.to_str().and_then(|name| name.parse::<VmId>().ok()));
    }
    Ok(ids)
}
