//! The error of a program that cannot read an image.

use crate::oci::{OciError, quoted};
use scalebox_programs::ProgramError;
use std::path::Path;

/// Returns the error of a program that cannot read the image `source`. The path in its output is
/// one of this host, and is replaced.
pub(super) fn unreadable(error: ProgramError, source: &Path) -> OciError {
    match error {
        // The image may be fine.
        ProgramError::Failed { output, .. } if !output.contains("No space left on device") => {
            let output = output.replace(&*source.to_string_lossy(), "the image");
            OciError::Disk(quoted(output.trim().as_bytes()))
        }
        other => OciError::Program(other),
    }
}
