//! The source of a setting, for messages about it.

use std::fmt;
use std::path::PathBuf;

/// The place that a setting was read from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Flag,
    Environment,
    File(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Flag => f.write_str("--token"),
            Source::Environment => f.write_str("SCALEBOX_TOKEN"),
            Source::File(path) => path.display().fmt(f),
        }
    }
}
