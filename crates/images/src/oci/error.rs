//! The reason why an image could not be fetched or turned into a file system.

use scalebox_programs::ProgramError;
use scalebox_units::Bytes;
use std::io;
use std::path::{Path, PathBuf};

/// Maximum length of a text from a registry or an archive in a message, in characters.
const MAX_QUOTED: usize = 200;

/// The reason why an image could not be fetched or turned into a file system. Nothing is left
/// behind except complete, verified layers in the cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    /// The reference is malformed.
    #[error("{reference:?} is not an image reference: {reason}; write [REGISTRY/]NAME[:TAG][@sha256:DIGEST]")]
    Reference {
        /// The reference.
        reference: String,
        /// The cause.
        reason: String,
    },
    /// The registry cannot be reached, or closes connections, after all retries.
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// The host, and its port.
        host: String,
        /// The cause.
        reason: String,
    },
    /// The host sent nothing for too long, after all retries.
    #[error("{host} sent nothing for {seconds} s")]
    Stalled {
        /// The host, and its port.
        host: String,
        /// The deadline.
        seconds: u64,
    },
    /// A response took too long as a whole.
    #[error("{host} did not send {what} within {seconds} s")]
    Deadline {
        /// The host, and its port.
        host: String,
        /// The content that was requested.
        what: String,
        /// The deadline.
        seconds: u64,
    },
    /// The host responded with an error.
    #[error("{host} responded with {status}: {message}")]
    Status {
        /// The host, and its port.
        host: String,
        /// The HTTP status.
        status: u16,
        /// The host's message, shortened.
        message: String,
    },
    /// The registry requires credentials, or rejects the given ones.
    #[error(
        "{registry} denies access: {reason}; check the user name and the password, and that they allow pulling the image"
    )]
    Unauthorized {
        /// The registry.
        registry: String,
        /// The cause.
        reason: String,
    },
    /// The registry does not have the image.
    #[error("{registry} does not have {what}; check the name and the tag, and log in if it is private")]
    NotFound {
        /// The registry.
        registry: String,
        /// The image or the blob.
        what: String,
    },
    /// The registry redirects to an address that must not be reached through it.
    #[error("{host} redirects to {target:?}, which is not followed: {reason}")]
    Redirect {
        /// The host that redirects.
        host: String,
        /// The target.
        target: String,
        /// The cause.
        reason: &'static str,
    },
    /// A name has an address that must not be reached through this registry.
    #[error("{host} has the address {address}, which must not be reached through the registry")]
    ForbiddenAddress {
        /// The host name.
        host: String,
        /// The address.
        address: String,
    },
    /// Something is larger than allowed.
    #[error("{what} is larger than {limit}")]
    TooLarge {
        /// The object.
        what: String,
        /// The limit.
        limit: Bytes,
    },
    /// A blob is longer or shorter than its size in the manifest.
    #[error("{what} has {} {actual} bytes, and {expected} in the manifest", if actual > expected { "at least" } else { "only" })]
    WrongSize {
        /// The blob.
        what: String,
        /// The size in the manifest, in bytes.
        expected: u64,
        /// The received size, in bytes.
        actual: u64,
    },
    /// The content does not have its digest.
    #[error("{what} has the digest {actual} instead of {expected}: it is damaged or forged")]
    WrongDigest {
        /// The object.
        what: String,
        /// The expected digest.
        expected: String,
        /// The digest of the content.
        actual: String,
    },
    /// A manifest or an image configuration is malformed or has an unsupported kind.
    #[error("cannot use {what}: {reason}")]
    Manifest {
        /// The object.
        what: String,
        /// The cause.
        reason: String,
    },
    /// The image does not exist for this platform.
    #[error("{image} does not exist for linux/amd64, only for: {platforms}")]
    Platform {
        /// The image.
        image: String,
        /// The platforms that exist.
        platforms: String,
    },
    /// A layer is damaged or cut off.
    #[error("layer {layer} is damaged or cut off: {reason}")]
    Layer {
        /// The number of the layer, beginning with 1.
        layer: usize,
        /// The cause.
        reason: String,
    },
    /// A layer has an entry with an invalid path.
    #[error("layer {layer} has an entry with the path \"{path}\", which {reason}")]
    Path {
        /// The number of the layer.
        layer: usize,
        /// The path, escaped.
        path: String,
        /// The cause, continuing the sentence.
        reason: &'static str,
    },
    /// A layer has an entry of a kind that is not allowed.
    #[error("layer {layer} contains {kind}, \"{path}\", which is not allowed in an image")]
    Kind {
        /// The number of the layer.
        layer: usize,
        /// The path, escaped.
        path: String,
        /// The kind, such as "a block device".
        kind: &'static str,
    },
    /// The target of a hard link does not exist.
    #[error("layer {layer} has a hard link \"{path}\" to \"{target}\", which {reason}")]
    HardLink {
        /// The number of the layer.
        layer: usize,
        /// The path, escaped.
        path: String,
        /// The target, escaped.
        target: String,
        /// The cause, continuing the sentence.
        reason: &'static str,
    },
    /// The extended attributes of an entry are too large.
    #[error("layer {layer} has an entry \"{path}\" with extended attributes of more than {limit} bytes")]
    Xattrs {
        /// The number of the layer.
        layer: usize,
        /// The path, escaped.
        path: String,
        /// The limit.
        limit: usize,
    },
    /// The image has too many entries, or too complex ones.
    #[error("the image has {what}; the limit is {limit}")]
    TooMany {
        /// The exceeded quantity, such as "too many entries".
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A layer is compressed implausibly well.
    #[error(
        "layer {layer} is more than {limit} times as large as its compressed form: it looks like a decompression bomb"
    )]
    Ratio {
        /// The number of the layer.
        layer: usize,
        /// The limit.
        limit: u64,
    },
    /// A disk image cannot be converted.
    #[error("cannot use the disk image: {0}")]
    Disk(String),
    /// An image did not arrive completely.
    #[error("the image is incomplete: {0}; send it again")]
    Incomplete(io::Error),
    /// The caller refused the space that the image needs.
    #[error(transparent)]
    Refused(Box<dyn std::error::Error + Send + Sync>),
    /// The caller cancelled the task.
    #[error("cancelled")]
    Cancelled,
    /// The file system was not written as planned.
    #[error("the host cannot write the file system of the image: {0}")]
    FileSystem(String),
    /// A file operation on the host failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// An outside program is missing or failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
}

impl OciError {
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> OciError {
        let path = path.as_ref().to_owned();
        move |source| OciError::Io { action, path, source }
    }

    pub(crate) fn layer(layer: usize, reason: impl ToString) -> OciError {
        OciError::Layer {
            layer,
            reason: reason.to_string(),
        }
    }

    /// Returns whether another attempt can succeed.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            OciError::Unreachable { .. } | OciError::Stalled { .. } => true,
            OciError::Status { status, .. } => *status >= 500 || *status == 429,
            _ => false,
        }
    }
}

impl From<crate::Error> for OciError {
    fn from(error: crate::Error) -> OciError {
        match error {
            crate::Error::Program(error) => OciError::Program(error),
            crate::Error::Io { action, path, source } => OciError::Io { action, path, source },
            other => OciError::FileSystem(other.to_string()),
        }
    }
}

/// Returns an untrusted text in a form that is safe in a message: printable and short.
pub(crate) fn quoted(text: &[u8]) -> String {
    let printable: String = text.escape_ascii().map(char::from).take(MAX_QUOTED + 1).collect();
    match printable.len() > MAX_QUOTED {
        true => format!("{}…", &printable[..MAX_QUOTED]),
        false => printable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_texts_are_printable_and_short() {
        assert_eq!(quoted(b"a\x1b[31m\n\xff"), r"a\x1b[31m\n\xff");
        let long = quoted(&[b'x'; 5000]);
        assert_eq!(long.chars().count(), MAX_QUOTED + 1);
    }
}
