//! Every request that has a body. `parse` reads one from a client's bytes; what it returns holds in
//! every field.

use crate::body::{Fields, Invalid, without_mark};
use crate::types::AutoExtend;
use crate::{IdempotencyKey, SshPublicKey, TemplateName, VmName};
use serde::Serialize;
use std::ops::RangeInclusive;

/// What a host allows, from its settings and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `MAX_DISK_SIZE_GIB`; at least 1.
    pub max_disk_size_gib: u64,
    /// Processors of the host.
    pub max_vcpus: u32,
    /// The least memory, in MiB, with which a guest boots.
    pub min_mem_mib: u64,
    /// The most memory, in MiB, that the host has for one guest.
    pub max_mem_mib: u64,
}

/// What a limit on a disk or a network card may be; the largest is more than any has.
const RATES: RangeInclusive<u64> = 1..=1_000_000;
const DISK_IOPS: &str = "disk_iops";
const DISK_MBPS: &str = "disk_mbps";
const NET_MBPS: &str = "net_mbps";
const AUTOSTART: &str = "autostart";

/// `POST /vms`. What is left out is the host's choice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// What its disk is cloned from.
    pub template: TemplateName,
    /// What the account `user` of the guest accepts.
    pub ssh_public_key: SshPublicKey,
    /// Otherwise three words.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub name: Option<VmName>,
    /// Processors of the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub vcpu_count: Option<u32>,
    /// Memory of the guest, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub mem_size_mib: Option<u64>,
    /// Size of its disk, in GiB; otherwise the larger of the host's default and the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub disk_size_gib: Option<u64>,
    /// Extends the disk when the guest's root file system fills up; otherwise it stays as large as
    /// it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub disk_auto_extend: Option<AutoExtend>,
    /// Requests a second that the guest may make of its disk; otherwise as many as it can.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, minimum = 1, maximum = 1_000_000))]
    pub disk_iops: Option<u64>,
    /// Megabytes (10⁶ bytes) a second that it may read and write.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, minimum = 1, maximum = 1_000_000))]
    pub disk_mbps: Option<u64>,
    /// Megabits (10⁶ bits) a second that it may send, and that it may receive.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, minimum = 1, maximum = 1_000_000))]
    pub net_mbps: Option<u64>,
    /// Whether it is started again after a reboot of the host in which it ran.
    #[serde(skip_serializing_if = "is_true")]
    #[cfg_attr(feature = "openapi", schema(required = false, default = true))]
    pub autostart: bool,
    /// False makes the VM and leaves it stopped.
    #[cfg_attr(feature = "openapi", schema(required = false, default = true))]
    pub start: bool,
    /// Sent as the header `Idempotency-Key`: while the VM exists, the same request with the same
    /// key gives it again instead of another.
    #[serde(skip)]
    pub idempotency_key: Option<IdempotencyKey>,
}

/// What is left out: a field that every server knows from its silence. It also keeps the text of a
/// request, and so the digest that goes with an idempotency key, what it was before there was such
/// a field.
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

    /// A request for a running VM with the host's choice of everything else.
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

    /// Reads a client's body. Whether the template exists, the name is free and the disk is large
    /// enough for the template is for the caller to see.
    ///
    /// # Errors
    /// The first thing wrong, as a sentence that names the field and what it may be.
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, Invalid> {
        const TEMPLATE: &str = "name one of those that GET /templates lists";
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

/// `PATCH /vms/{id or name}`. What is left out stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(min_properties = 1))]
#[serde(deny_unknown_fields)]
pub struct UpdateVm {
    // What can be null in JSON is `Some(None)` here.
    /// The new size of its disk, in GiB; disks do not shrink.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub disk_size_gib: Option<u64>,
    /// Whether and how its disk extends itself from now on; null for not at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<AutoExtend>))]
    pub disk_auto_extend: Option<Option<AutoExtend>>,
    /// Requests a second that the guest may make of its disk; null for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000))]
    pub disk_iops: Option<Option<u64>>,
    /// Megabytes (10⁶ bytes) a second that it may read and write; null for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000))]
    pub disk_mbps: Option<Option<u64>>,
    /// Megabits (10⁶ bits) a second that it may send, and that it may receive; null for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000))]
    pub net_mbps: Option<Option<u64>>,
    /// Whether it is started again after a reboot of the host in which it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub autostart: Option<bool>,
}

impl UpdateVm {
    /// A change of the disk's size alone.
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

    /// Reads a client's body. Whether the disk would become smaller is for the caller to see.
    ///
    /// # Errors
    /// The first thing wrong, as a sentence that names the field and what it may be.
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

/// `Some(None)` for null, else what `read` reads, if it is there.
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
        let percent = "send the share of the guest's root file system that may be in use, in percent";
        Ok(Some(AutoExtend {
            threshold_percent: fields.number(Self::THRESHOLD, 1..=99, percent)?,
            increment_gib: fields.number(
                Self::INCREMENT,
                sizes.clone(),
                "send by how much the disk grows, in GiB",
            )?,
            limit_gib: fields.number(Self::LIMIT, sizes, "send how large the disk may become, in GiB")?,
        }))
    }
}

/// `POST /vms/{id or name}/snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotVm {
    /// What the template is to be called; there must be none of that name.
    pub template_name: TemplateName,
}

impl SnapshotVm {
    /// Reads a client's body. Whether the name is free is for the caller to see.
    ///
    /// # Errors
    /// The first thing wrong, as a sentence that names the field and what it may be.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &["template_name"])?;
        Ok(SnapshotVm {
            template_name: fields.text("template_name", "send the name of the template to be made")?,
        })
    }
}

/// The largest pool that is ever asked for, in GiB: 64 TiB.
const LARGEST_POOL_GIB: u64 = 65_536;

/// `POST /pool/grow` and `POST /pool/shrink`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ResizePool {
    /// The new size of the pool, in GiB. Growing without it takes 80 % of what the host disk can
    /// hold today.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, minimum = 1, maximum = 65_536))]
    pub size_gib: Option<u64>,
}

impl ResizePool {
    /// Reads the body of `POST /pool/grow`; none at all is as good as an empty object.
    ///
    /// # Errors
    /// The first thing wrong, as a sentence that names the field and what it may be.
    pub fn parse_grow(body: &[u8]) -> Result<Self, Invalid> {
        let none = without_mark(body).is_empty();
        let body = if none { b"{}" } else { body };
        let size_gib = Fields::read(body, &["size_gib"])?.optional_number("size_gib", 1..=LARGEST_POOL_GIB)?;
        Ok(ResizePool { size_gib })
    }

    /// Reads the body of `POST /pool/shrink`, and returns the size in GiB.
    ///
    /// # Errors
    /// The first thing wrong, as a sentence that names the field and what it may be.
    pub fn parse_shrink(body: &[u8]) -> Result<u64, Invalid> {
        let missing = Invalid::Missing {
            field: "size_gib",
            what: "send the new size of the pool in GiB",
        };
        Fields::read(body, &["size_gib"])?
            .optional_number("size_gib", 1..=LARGEST_POOL_GIB)?
            .ok_or(missing)
    }
}

#[cfg(test)]
mod pool_tests {
    use super::*;

    #[test]
    fn a_snapshot_names_its_template_and_nothing_else() {
        let named = SnapshotVm::parse(br#"{"template_name": "my-golden"}"#).unwrap();
        assert_eq!(named.template_name.as_str(), "my-golden");
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
    fn a_pool_is_grown_with_or_without_a_size_and_shrunk_with_one() {
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
