//! Files of the guest.

use serde::{Deserialize, Serialize};

/// Maximum number of entries in one [`Listing`].
pub const MAX_ENTRIES: usize = 10_000;

/// Maximum length of a file that the kernel generates, as in `/proc`, in bytes.
pub const MAX_GENERATED: u64 = 16 << 20;
/// Maximum number of entries in an archive that the agent unpacks.
pub const MAX_UNPACKED: u64 = 1_000_000;

/// The headers of a response with a file's content.
pub mod headers {
    /// The permissions, in octal.
    pub const MODE: &str = "x-scalebox-mode";
    /// The owner's number.
    pub const UID: &str = "x-scalebox-uid";
    /// The group's number.
    pub const GID: &str = "x-scalebox-gid";
    /// The time of the last change of the content, in milliseconds since 1970.
    pub const MODIFIED_MS: &str = "x-scalebox-modified-ms";
    /// The size at the time of opening, in bytes. The stream has this size, even if the file
    /// becomes longer while it is read; if it becomes shorter, the stream ends with an error.
    /// Absent for files that the kernel generates, as in `/proc`: their streams end with the
    /// content, or with an error after [`MAX_GENERATED`](super::MAX_GENERATED) bytes.
    pub const SIZE: &str = "x-scalebox-size";
}

/// A file and its properties.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// The name, or the path in the request; bytes that are not UTF-8 are percent-encoded, and so
    /// is `%`.
    pub name: String,
    /// The kind; of a symbolic link, not of its target.
    pub kind: FileKind,
    /// The size in bytes.
    pub size: u64,
    /// The permissions: the lowest 12 bits of the mode.
    pub mode: u32,
    /// The owner's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// The time of the last change of the content, in milliseconds since 1970.
    pub modified_ms: i64,
    /// The target of a symbolic link, encoded like `name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// The kind of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, FIFO or socket.
    #[serde(other)]
    Other,
}

/// The entries of a directory, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// The entries; at most [`MAX_ENTRIES`].
    pub entries: Vec<FileInfo>,
    /// `true` if the directory has more entries.
    pub truncated: bool,
}
