//! Why the settings are rejected.

use std::io;
use std::path::PathBuf;

/// Why the settings are rejected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// A value does not have the expected form.
    #[error("{key}={value:?} cannot be used: {expected}")]
    Value {
        /// The setting.
        key: &'static str,
        /// The value.
        value: String,
        /// The expected form.
        expected: String,
    },
    /// A required setting is missing.
    #[error("{key} is not set: {expected}")]
    Missing {
        /// The setting.
        key: &'static str,
        /// How to set it.
        expected: &'static str,
    },
    /// The file cannot be read.
    #[error("cannot read the settings in {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A line of the file is not `KEY=VALUE`, or its key is unknown.
    #[error("{} line {number}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The number of the line, starting at one.
        number: usize,
        /// The problem with the line.
        problem: String,
    },
}
