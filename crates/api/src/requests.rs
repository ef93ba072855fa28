//! Every request that has a body. The `parse` functions validate a client's body completely: each
//! field of the value they return is valid.

use crate::body::{Fields, Invalid, without_byte_order_mark};
use crate::idempotency::IdempotencyKey;
use crate::types::AutoExtend;
use scalebox_units::{SshPublicKey, TemplateName, VmName};
use serde::Serialize;
use std::ops::RangeInclusive;

/// Limits of a host, from its settings and its hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `MAX_DISK_SIZE_GIB`; at least 1.
    pub max_disk_size_gib: u64,
    /// Maximum number of processors of a guest.
    pub max_vcpus: u32,
    /// Minimum memory with which a guest boots, in MiB.
    pub min_mem_mib: u64,
    /// Maximum memory of a guest, in MiB.
    pub max_mem_mib: u64,
}

/// Valid limits on a disk or a network card. The maximum is more than any device can do.
const RATES: RangeInclusive<u64> = 1..=1_000_000;
const DISK_IOPS: &str = "disk_iops";
const DISK_MBPS: &str = "disk_mbps";
const NET_MBPS: &str = "net_mbps";
const AUTOSTART: &str = "autostart";

/// The body of `POST /vms`. The host chooses the value of an absent field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// Template to clone the disk from.
    pub template: TemplateName,
    /// SSH public key that may log in to the guest's account `user`.
    pub ssh_public_key: SshPublicKey,
    /// Name of the VM; by default generated from three words.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub name: Option<VmName>,
    /// Number of processors of the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub vcpu_count: Option<u32>,
    /// Memory of the guest, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub mem_size_mib: Option<u64>,
    /// Size of the disk, in GiB; by default the larger of the host's default and the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub disk_size_gib: Option<u64>,
    /// Extends the disk automatically when the guest's root file system fills up; off by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub disk_auto_extend: Option<AutoExtend>,
    /// Limit on disk requests per second, reads and writes together; no limit by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, minimum = 1, maximum = 1_000_000))]
    pub disk_iops: Option<u64>,
    /// Limit on disk throughput in megabytes (10⁶ bytes) per second, reads and writes together; no
    /// limit by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, minimum = 1, maximum = 1_000_000))]
    pub disk_mbps: Option<u64>,
    /// Limit on network throughput in megabits (10⁶ bits) per second, in each direction; no limit
    /// by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, minimum = 1, maximum = 1_000_000))]
    pub net_mbps: Option<u64>,
    /// Whether the VM starts again after a reboot of the host if it was running.
    #[serde(skip_serializing_if = "is_true")]
    #[cfg_attr(feature = "openapi", schema(required = false, default = true))]
    pub autostart: bool,
    /// Whether to start the VM; false creates it stopped.
    #[cfg_attr(feature = "openapi", schema(required = false, default = true))]
    pub start: bool,
    /// Sent as the header `Idempotency-Key`: while the VM exists, the same request with the same
    /// key returns it instead of creating another.
    #[serde(skip)]
    pub idempotency_key: Option<IdempotencyKey>,
}

/// Omits a field with its default value. The request then has the same text, and the same digest
/// for its idempotency key, as before the field existed.
fn is_true(value: &bool) -> bool {
    *value
}

impl CreateVm {
    const FIELDS: [&str; 12] = [
        "template",
        "ssh_public_key",
        "name",
        "vcpu_count",
        "mem_size_mib",
        "disk_size_gib",
        "disk_auto_extend",
        "disk_iops",
        "disk_mbps",
        "net_mbps",
        "autostart",
        "start",
    ];

    /// Creates a request for a running VM; the host chooses everything else.
    pub fn new(template: TemplateName, ssh_public_key: SshPublicKey) -> Self {
        CreateVm {
            template,
            ssh_public_key,
            name: None,
            vcpu_count: None,
            mem_size_mib: None,
            disk_size_gib: None,
            disk_auto_extend: None,
            disk_iops: None,
            disk_mbps: None,
            net_mbps: None,
            autostart: true,
            start: true,
            idempotency_key: None,
        }
    }

    /// Parses a client's body. The caller checks whether the template exists, the name is free and
    /// the disk is large enough for the template.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, Invalid> {
        const TEMPLATE: &str = "send the name of a template; GET /templates lists them";
        const KEY: &str = "send an OpenSSH public key, such as: ssh-ed25519 AAAAC3Nza... me@laptop";
        let fields = Fields::read(body, &Self::FIELDS)?;
        fields.require("template", TEMPLATE)?;
        fields.require("ssh_public_key", KEY)?;
        let mem_mib = limits.min_mem_mib..=limits.max_mem_mib;
        let vcpus = fields.optional_number("vcpu_count", 1..=limits.max_vcpus.into())?;
        Ok(CreateVm {
            disk_size_gib: fields.optional_disk_size(limits.max_disk_size_gib)?,
            disk_auto_extend: AutoExtend::read(&fields, limits)?,
            vcpu_count: vcpus.and_then(|count| count.try_into().ok()),
            mem_size_mib: fields.optional_number("mem_size_mib", mem_mib)?,
            disk_iops: fields.optional_number(DISK_IOPS, RATES)?,
            disk_mbps: fields.optional_number(DISK_MBPS, RATES)?,
            net_mbps: fields.optional_number(NET_MBPS, RATES)?,
            autostart: fields.optional_bool(AUTOSTART)?.unwrap_or(true),
            start: fields.optional_bool("start")?.unwrap_or(true),
            template: fields.text("template", TEMPLATE)?,
            name: fields.optional_text("name")?,
            ssh_public_key: fields.text("ssh_public_key", KEY)?,
            idempotency_key: None,
        })
    }
}

/// The body of `PATCH /vms/{id or name}`. Absent fields are not changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(min_properties = 1))]
#[serde(deny_unknown_fields)]
pub struct UpdateVm {
    // In fields of type `Option<Option<…>>`, `Some(None)` stands for null.
    /// New size of the disk, in GiB; disks cannot shrink.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub disk_size_gib: Option<u64>,
    /// Automatic extension of the disk; null turns it off.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<AutoExtend>))]
    pub disk_auto_extend: Option<Option<AutoExtend>>,
    /// Limit on disk requests per second, reads and writes together; null removes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000))]
    pub disk_iops: Option<Option<u64>>,
    /// Limit on disk throughput in megabytes (10⁶ bytes) per second, reads and writes together;
    /// null removes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000))]
    pub disk_mbps: Option<Option<u64>>,
    /// Limit on network throughput in megabits (10⁶ bits) per second, in each direction; null
    /// removes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000))]
    pub net_mbps: Option<Option<u64>>,
    /// Whether the VM starts again after a reboot of the host if it was running.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub autostart: Option<bool>,
}

impl UpdateVm {
    /// Creates a request that changes only the disk's size.
    pub fn grow(disk_size_gib: u64) -> Self {
        UpdateVm {
            disk_size_gib: Some(disk_size_gib),
            ..UpdateVm::default()
        }
    }

    const FIELDS: [&str; 6] = [
        "disk_size_gib",
        AutoExtend::FIELD,
        DISK_IOPS,
        DISK_MBPS,
        NET_MBPS,
        AUTOSTART,
    ];

    /// Parses a client's body. The caller checks whether the disk would shrink.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &Self::FIELDS)?;
        if fields.is_empty() {
            return Err(Invalid::Nothing { known: &Self::FIELDS });
        }
        let rate = |field| or_null(&fields, field, || fields.optional_number(field, RATES));
        Ok(UpdateVm {
            disk_size_gib: fields.optional_disk_size(limits.max_disk_size_gib)?,
            disk_auto_extend: or_null(&fields, AutoExtend::FIELD, || AutoExtend::read(&fields, limits))?,
            disk_iops: rate(DISK_IOPS)?,
            disk_mbps: rate(DISK_MBPS)?,
            net_mbps: rate(NET_MBPS)?,
            autostart: fields.optional_bool(AUTOSTART)?,
        })
    }
}

/// Returns `Some(None)` if the field is null, and otherwise what `read` returns.
fn or_null<T>(
    fields: &Fields<'_>,
    field: &'static str,
    read: impl FnOnce() -> Result<Option<T>, Invalid>,
) -> Result<Option<Option<T>>, Invalid> {
    match fields.is_null(field) {
        true => Ok(Some(None)),
        false => Ok(read()?.map(Some)),
    }
}

impl AutoExtend {
    const FIELD: &str = "disk_auto_extend";
    const THRESHOLD: &str = "disk_auto_extend.threshold_percent";
    const INCREMENT: &str = "disk_auto_extend.increment_gib";
    const LIMIT: &str = "disk_auto_extend.limit_gib";

    fn read(fields: &Fields<'_>, limits: &Limits) -> Result<Option<Self>, Invalid> {
        let known = &[Self::THRESHOLD, Self::INCREMENT, Self::LIMIT];
        let Some(fields) = fields.optional_object(Self::FIELD, known)? else {
            return Ok(None);
        };
        let sizes = 1..=limits.max_disk_size_gib;
        let threshold = "send the usage of the guest's root file system at which the disk grows, in percent";
        let increment = "send the size to add each time, in GiB";
        let limit = "send the maximum size of the disk, in GiB";
        Ok(Some(AutoExtend {
            threshold_percent: fields.number(Self::THRESHOLD, 1..=99, threshold)?,
            increment_gib: fields.number(Self::INCREMENT, sizes.clone(), increment)?,
            limit_gib: fields.number(Self::LIMIT, sizes, limit)?,
        }))
    }
}

/// The body of `POST /vms/{id or name}/snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotVm {
    /// Name of the new template; it must not exist yet.
    pub template_name: TemplateName,
}

impl SnapshotVm {
    /// Parses a client's body. The caller checks whether the name is free.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &["template_name"])?;
        Ok(SnapshotVm {
            template_name: fields.text("template_name", "send the name of the new template")?,
        })
    }
}

/// Maximum size of a pool in a request: 64 TiB.
const MAX_POOL_SIZE_GIB: u64 = 65_536;

/// The body of `POST /pool/grow` and `POST /pool/shrink`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ResizePool {
    /// New size of the pool, in GiB. Without it, the pool grows to 80 % of what the host disk can
    /// hold today.
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
mod pool_tests {
    use super::*;

    #[test]
    fn snapshot_requests_have_only_a_template_name() {
        let named = SnapshotVm::parse(br#"{"template_name": "my-template"}"#).unwrap();
        assert_eq!(named.template_name.as_str(), "my-template");
        for body in [
            &b"{}"[..],
            b"",
            br#"{"template_name": "../x"}"#,
            br#"{"template_name": 7}"#,
            br#"{"template_name": "x", "vm": "y"}"#,
        ] {
            assert!(SnapshotVm::parse(body).is_err());
        }
    }

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
