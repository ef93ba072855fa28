//! What a file or a device holds, by its signatures.

use crate::command::{self, Program};
use crate::error::StorageError;
use std::ffi::OsStr;
use std::fmt;
use std::path::Path;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Signature {
    /// The type of a file system, such as `btrfs`, or `a gpt partition table`.
    pub(crate) kind: String,
    pub(crate) label: Option<String>,
    pub(crate) uuid: Option<String>,
}

impl Signature {
    /// Whether it is a file system that was made to be a pool.
    pub(crate) fn is_pool(&self) -> bool {
        self.kind == "btrfs" && self.label.as_deref() == Some("scalebox")
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.label {
            Some(label) => write!(f, "{} (label {label:?})", self.kind),
            None => f.write_str(&self.kind),
        }
    }
}

/// Looks for signatures; `None` when there is none.
///
/// # Errors
/// [`StorageError::Command`].
pub(crate) fn probe(path: &Path) -> Result<Option<Signature>, StorageError> {
    // Exit code 2: no signature was found; 8: several that contradict each other.
    let args = ["-p", "-o", "export", "--"].map(OsStr::new);
    let (code, output) = command::run_accepting(Program::Blkid, args.into_iter().chain([path.as_os_str()]), |code| {
        matches!(code, 0 | 2 | 8)
    })?;
    let value = |key: &str| {
        output
            .lines()
            .find_map(|line| line.strip_prefix(key).map(str::to_owned))
    };
    let kind = if code == 8 {
        Some("several file systems at once".to_owned())
    } else {
        value("TYPE=").or_else(|| value("PTTYPE=").map(|table| format!("a {table} partition table")))
    };
    Ok(kind.map(|kind| Signature {
        kind,
        label: value("LABEL="),
        uuid: value("UUID="),
    }))
}
