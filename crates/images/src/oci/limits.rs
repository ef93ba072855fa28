//! Limits of images, and deadlines of registries.

use scalebox_units::Bytes;
use std::time::Duration;

/// Limits of one image. An image that exceeds them is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of entries in all layers together.
    pub max_entries: u64,
    /// Maximum size of all layers together, as the registry or the archive stores them.
    pub max_stored: Bytes,
    /// Maximum size of all layers together, uncompressed.
    pub max_unpacked: Bytes,
    /// Maximum size of a layer divided by its compressed size. Checked from 64 MiB on.
    pub max_ratio: u64,
    /// Maximum size of the resulting disk.
    pub max_disk: Bytes,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_entries: 1_000_000,
            max_stored: Bytes::from_mib(32 << 10),
            max_unpacked: Bytes::from_mib(64 << 10),
            max_ratio: 200,
            max_disk: Bytes::from_mib(100 << 10),
        }
    }
}

/// Deadlines of the communication with a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// For a connection, including TLS.
    pub connect: Duration,
    /// For a manifest, a token, or the head of any response.
    pub request: Duration,
    /// For the next bytes of a response.
    pub stall: Duration,
    /// Pause before the first retry; it doubles with each further one.
    pub backoff: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            connect: Duration::from_secs(10),
            request: Duration::from_secs(60),
            stall: Duration::from_secs(30),
            backoff: Duration::from_millis(500),
        }
    }
}

/// Maximum size of a manifest, a token or an image configuration, in bytes.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;
/// Maximum size of the settings that a template keeps of an image, as JSON, in bytes. Each of its
/// VMs keeps them too.
pub(crate) const MAX_SETTINGS: usize = 128 << 10;
/// Maximum number of layers. Container engines build at most 127.
pub(crate) const MAX_LAYERS: usize = 512;
/// Number of attempts at one request, without progress between them.
pub(crate) const MAX_ATTEMPTS: u32 = 4;
/// The same at a mirror: without it, the registry itself is next.
pub(crate) const MAX_MIRROR_ATTEMPTS: u32 = 2;
/// Number of redirects that one request follows.
pub(crate) const MAX_REDIRECTS: u32 = 5;
/// Minimum average speed of a blob, in bytes per second, after the first ten minutes.
pub(crate) const MIN_SPEED: u64 = 64 << 10;
/// Time for each blob in addition to the time for its size at [`MIN_SPEED`].
pub(crate) const BLOB_GRACE: Duration = Duration::from_secs(600);
