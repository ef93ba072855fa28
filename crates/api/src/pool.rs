//! The pool: its figures, its size, and the usage of its disks and templates.

use crate::body::{Fields, Invalid, without_byte_order_mark};
use serde::{Deserialize, Serialize};

/// The pool, as `GET /pool` and `GET /info` return it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolInfo {
    /// Mount point of the pool.
    pub path: String,
    /// Type of the file system: `btrfs` or `xfs`.
    #[serde(default)]
    pub file_system: String,
    /// Path of the pool image; null if the pool is not in an image.
    pub image: Option<String>,
    /// Device that is mounted; the loop device if the pool is in an image.
    #[serde(default)]
    pub device: String,
    /// Size of the pool's file system.
    pub capacity_bytes: u64,
    /// Space that can actually be written, limited by the pool, its metadata and the host disk.
    pub free_bytes: u64,
    /// Space in use.
    pub used_bytes: u64,
    /// Sum of the provisioned sizes of all disks.
    pub committed_bytes: u64,
    /// Maximum of `committed_bytes`: `overcommit_ratio × capacity_bytes`.
    pub commitment_limit_bytes: u64,
    /// `OVERCOMMIT_RATIO`: 1 backs every committed byte.
    pub overcommit_ratio: f64,
    /// Space reserved for operations that are running.
    pub reserved_bytes: u64,
    /// Space that is always kept free (`STORAGE_BUFFER_GIB`).
    pub buffer_bytes: u64,
    /// Free space of the pool alone, without the limit of the host disk.
    pub pool_free_bytes: u64,
    /// Free space of the file system that contains the image; null if the pool is not in an image.
    pub host_free_bytes: Option<u64>,
    /// Space that btrfs has not yet allocated to data or metadata.
    pub unallocated_bytes: u64,
    /// Space that btrfs has allocated to metadata; a part of it is the file system's own reserve.
    pub metadata_bytes: u64,
    /// Part of `metadata_bytes` that is in use.
    pub metadata_used_bytes: u64,
    /// Space that belongs to a single VM's disk; null until measured. This value and the next three
    /// add up to `used_bytes` at `measured_at`, within 1 %.
    #[serde(default)]
    pub vms_exclusive_bytes: Option<u64>,
    /// Space that belongs to a single template and its resized base images.
    #[serde(default)]
    pub templates_exclusive_bytes: Option<u64>,
    /// Space that several disks or templates share, each block counted once.
    #[serde(default)]
    pub shared_bytes: Option<u64>,
    /// All other space: the guests' kernel, partial files, deleted disks that are still open.
    #[serde(default)]
    pub other_bytes: Option<u64>,
    /// Time at which the four values were measured: RFC 3339, in UTC.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub measured_at: Option<String>,
    /// Days until `free_bytes` are used up at the rate of the last day. Null with less than an hour
    /// of history (a restart of the daemon resets it), if usage does not grow, and beyond ten
    /// years.
    #[serde(default)]
    pub days_left: Option<f64>,
    /// Number of stopped and deleted VMs whose resources could not be removed yet. The log names
    /// the reason, and removal is retried every few seconds. A deleted VM's disk stays committed
    /// until it is removed.
    #[serde(default)]
    pub cleanups_pending: u64,
}

/// The response to `POST /pool/trim` and `POST /vms/{id}/trim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Trimmed {
    /// Space that the pool, or the guest, discarded; it may include blocks that were discarded
    /// before.
    pub trimmed_bytes: u64,
}

/// Usage of a disk or a template in the pool, as last measured. The measurement is at most
/// `ACCOUNTING_SECONDS` old, by default a minute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StorageUsage {
    /// Size that the guest sees; for a template, the size of its image.
    pub provisioned_bytes: u64,
    /// Size of the blocks that the disk or template maps, shared or not.
    pub used_bytes: u64,
    /// Space that a deletion frees. It can be more than `used_bytes`, because an extent that was
    /// overwritten in part is kept whole.
    pub exclusive_bytes: u64,
    /// Time of the measurement: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub measured_at: String,
}

/// Maximum size of a pool in a request: 64 TiB.
const MAX_POOL_SIZE_GIB: u64 = 65_536;

/// The body of `POST /pool/grow` and `POST /pool/shrink`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ResizePool {
    /// New size of the pool, in GiB. Without it, the pool grows to 80 % of the space available to
    /// it on the host disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, minimum = 1, maximum = 65_536))]
    pub size_gib: Option<u64>,
}

impl ResizePool {
    /// Parses the body of `POST /pool/grow`; an empty body counts as an empty object.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse_grow(body: &[u8]) -> Result<Self, Invalid> {
        let is_empty = without_byte_order_mark(body).is_empty();
        let body = if is_empty { b"{}" } else { body };
        let size_gib = Fields::read(body, &["size_gib"])?.optional_number("size_gib", 1..=MAX_POOL_SIZE_GIB)?;
        Ok(ResizePool { size_gib })
    }

    /// Parses the body of `POST /pool/shrink`, and returns the new size in GiB.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse_shrink(body: &[u8]) -> Result<u64, Invalid> {
        let missing = Invalid::Missing {
            field: "size_gib",
            what: "send the new size of the pool in GiB",
        };
        Fields::read(body, &["size_gib"])?
            .optional_number("size_gib", 1..=MAX_POOL_SIZE_GIB)?
            .ok_or(missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_optional_to_grow_and_required_to_shrink() {
        assert_eq!(ResizePool::parse_grow(b"").unwrap().size_gib, None);
        assert_eq!(ResizePool::parse_grow(b"{}").unwrap().size_gib, None);
        assert_eq!(
            ResizePool::parse_grow(br#"{"size_gib": 80}"#).unwrap().size_gib,
            Some(80)
        );
        assert_eq!(ResizePool::parse_shrink(br#"{"size_gib": 40}"#).unwrap(), 40);
        for body in [
            &b"{}"[..],
            br#"{"size_gib": 0}"#,
            br#"{"size_gib": "40"}"#,
            br#"{"size": 40}"#,
            b"",
        ] {
            assert!(ResizePool::parse_shrink(body).is_err());
        }
        let error = ResizePool::parse_grow(br#"{"size_gib": 1.5}"#).unwrap_err().to_string();
        assert!(error.contains("size_gib") && error.contains("65536"), "{error}");
    }
}
