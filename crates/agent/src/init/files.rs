//! Files of the kernel, and errors that name a file.

use std::fs;
use std::io;
use std::path::Path;

/// Reads a small file of the kernel.
pub(crate) fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(cannot("read", path))
}

/// Returns a function that converts the error of an operation on a file.
pub(crate) fn cannot(action: &str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> String {
    let what = format!("cannot {action} {}", path.as_ref().display());
    move |error| format!("{what}: {error}")
}
