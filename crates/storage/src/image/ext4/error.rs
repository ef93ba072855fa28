//! The errors of this folder, and the distinction between a damaged image and a fault of the host.

use crate::error::StorageError;

/// Beginnings of messages about file systems crafted to keep the host busy.
pub(super) const CHECK_TOO_SLOW: &str = "cannot be checked";
pub(super) const FRAGMENTED: &str = "is so fragmented that";

pub(super) fn inconsistent(what: impl Into<String>) -> StorageError {
    StorageError::FileSystem(format!("is inconsistent: {}", what.into()))
}

pub(super) fn unreadable(error: std::io::Error) -> StorageError {
    StorageError::io("read", "an image", error)
}

/// Turns damage into a fault of the host: a program caused it. Does not apply to file systems that
/// keep programs busy for too long.
pub(super) fn as_host_fault(error: StorageError, doing: &'static str) -> StorageError {
    match error {
        StorageError::FileSystem(reason) if !reason.starts_with(CHECK_TOO_SLOW) && !reason.starts_with(FRAGMENTED) => {
            StorageError::Host {
                doing,
                reason: format!("afterwards, the file system {reason}"),
            }
        }
        other => other,
    }
}
