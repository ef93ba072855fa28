//! The errors of rejected settings.

use std::io;
use std::path::PathBuf;

/// The errors of rejected settings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// A value does not have the expected form.
    #[error("{key}={value:?} cannot be used: {expected}")]
    Value {
        /// The name of the setting.
        key: &'static str,
        /// The value.
        value: String,
        /// The expected form.
        expected: String,
    },
    /// A required setting is missing.
    #[error("{key} is not set: {expected}")]
    Missing {
        /// The name of the setting.
        key: &'static str,
        /// The value that is required, and a way to set it.
        expected: &'static str,
    },
    /// The file cannot be read.
    #[error("cannot read the settings in {}: {source}", path.display())]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A line of the file is not `KEY=VALUE`, or its key is unknown.
    #[error("{} line {number}: {problem}", path.display())]
    Line {
        /// The path of the file.
        path: PathBuf,
        /// The number of the line, starting at one.
        number: usize,
        /// The problem with the line.
        problem: String,
    },
}
