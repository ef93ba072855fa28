//! VMs as the API returns them, and the requests that create and change them.
//!
//! Sizes are whole numbers, and the field's name ends in their unit (`_bytes`, `_mib`, `_gib`). The
//! `parse` functions validate a client's body completely: each field of the value they return is
//! valid.

use crate::body::{Fields, Invalid};
use crate::command;
use crate::idempotency::IdempotencyKey;
use crate::limits::Limits;
use crate::main_process::{CreateMain, MainProcess};
use crate::pool::StorageUsage;
use scalebox_units::{ImageReference, InvalidFormat, SshPublicKey, TemplateName, VmName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

/// A VM, as `POST /vms` and `GET /vms/{id or name}` return it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Vm {
    /// `vm-` and twelve lower-case hex digits; see [`VmId`](crate::VmId).
    #[cfg_attr(feature = "openapi", schema(pattern = "^vm-[0-9a-f]{12}$"))]
    pub id: String,
    /// Name, unique among the VMs of the host; also the guest's host name.
    pub name: String,
    /// Template that the disk was cloned from.
    pub template: String,
    /// Address of the host (`HOST_IP`), to use with `ssh_port`.
    pub ip: String,
    /// Port of the host that is forwarded to the guest's port 22.
    pub ssh_port: u16,
    /// Command to log in: `ssh -p PORT user@HOST_IP`.
    pub ssh: String,
    /// URL of a guest's HTTP service. Reserved; always null.
    #[serde(default)]
    pub url: Option<String>,
    /// Present status.
    pub status: VmStatus,
    /// Reason for the status, such as the cause of a failure; absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_reason: Option<String>,
    /// Time of creation: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub created_at: String,
    /// Number of processors of the guest.
    pub vcpu_count: u32,
    /// Memory of the guest, in MiB.
    pub mem_size_mib: u64,
    /// Provisioned size of the disk, in GiB.
    pub disk_size_gib: u64,
    /// Automatic extension of the disk; absent if it is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_auto_extend: Option<AutoExtend>,
    /// Limit on disk requests per second, reads and writes together; absent without a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_iops: Option<u64>,
    /// Limit on disk throughput in megabytes (10⁶ bytes) per second, reads and writes together;
    /// absent without a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mbps: Option<u64>,
    /// Limit on network throughput in megabits (10⁶ bits) per second, in each direction; absent
    /// without a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_mbps: Option<u64>,
    /// `true` starts the VM again after a reboot of the host if it was running.
    #[serde(default = "default_autostart")]
    pub autostart: bool,
    /// The main process; absent if the VM has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub main: Option<MainProcess>,
    /// Growth of the guest's file system; only in the response to a change of the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// Disk usage in the pool; absent until measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageUsage>,
}

/// Returns the value for servers that do not send the field.
fn default_autostart() -> bool {
    true
}

/// A policy to extend a disk automatically. It needs a guest agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AutoExtend {
    /// Usage of the guest's root file system at which the disk grows: 1 to 99 %. Computed as by
    /// `df` in the guest.
    pub threshold_percent: u64,
    /// Size to add each time, in GiB; less if the limit or the pool allows only less.
    pub increment_gib: u64,
    /// Maximum size, in GiB. A request may grow the disk beyond it.
    pub limit_gib: u64,
}

/// The growth of a guest's root file system after its disk has grown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Disk {
    /// `true` if the file system is known to have grown with the disk.
    pub confirmed: bool,
    /// Size of the root file system as the guest's agent reports it, without the file system's own
    /// overhead. Null if no agent responded.
    pub guest_total_bytes: Option<u64>,
    /// Reason why the growth is not confirmed, and the remedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// The status of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum VmStatus {
    /// The machine's process exists and its processors run.
    Running,
    /// The disk exists, but no process.
    Stopped,
    /// The machine's process exists, but its processors are paused.
    Paused,
    /// The machine ended unexpectedly or could not be started; see `status_reason`.
    Failed,
}

impl VmStatus {
    /// Returns the API's string for the status.
    pub const fn as_str(self) -> &'static str {
        match self {
            VmStatus::Running => "running",
            VmStatus::Stopped => "stopped",
            VmStatus::Paused => "paused",
            VmStatus::Failed => "failed",
        }
    }
}

impl fmt::Display for VmStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The response to `GET /vms`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VmList {
    /// All VMs of the host.
    pub vms: Vec<Vm>,
}

/// Valid limits on a disk or a network card. The maximum is more than any device can do.
const RATES: RangeInclusive<u64> = 1..=1_000_000;
const DISK_IOPS: &str = "disk_iops";
const DISK_MBPS: &str = "disk_mbps";
const NET_MBPS: &str = "net_mbps";
const AUTOSTART: &str = "autostart";

/// The origin of a new VM's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VmSource {
    /// A template.
    Template(TemplateName),
    /// The template of an image in a registry, which is pulled if it does not exist. Its name is
    /// [`ImageReference::template_name`].
    Image(ImageReference),
}

impl VmSource {
    const TEMPLATE: &str = "template";
    const IMAGE: &str = "image";

    fn read(fields: &Fields<'_>) -> Result<Self, Invalid> {
        const HINT: &str = "send the name of a template, which GET /templates lists, or an image";
        match fields.optional_text(Self::IMAGE)? {
            None => fields.text(Self::TEMPLATE, HINT).map(VmSource::Template),
            Some(_) if fields.require(Self::TEMPLATE, HINT).is_ok() => Err(Invalid::Form {
                field: Self::IMAGE,
                form: InvalidFormat::new("cannot be combined with template: send one of them"),
            }),
            Some(image) => Ok(VmSource::Image(image)),
        }
    }
}

/// The body of `POST /vms`. The host chooses the value of an absent field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// The origin of the disk. In JSON, it is the field `template` or the field `image`.
    #[serde(flatten)]
    #[cfg_attr(feature = "openapi", schema(ignore))]
    pub source: VmSource,
    /// SSH public key that may log in to the guest's account `user`. Without a key, logins over SSH
    /// are not possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub ssh_public_key: Option<SshPublicKey>,
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
    /// `true` starts the VM again after a reboot of the host if it was running.
    #[serde(skip_serializing_if = "is_true")]
    #[cfg_attr(feature = "openapi", schema(required = false, default = true))]
    pub autostart: bool,
    /// The environment of all commands in the VM, in addition to that of its image. It is stored,
    /// but not shown again, and not part of snapshots.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "openapi", schema(required = false))]
    pub env: BTreeMap<String, String>,
    /// How the main process is run; only for images without an init system.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub main: Option<CreateMain>,
    /// `true` starts the VM; `false` creates it stopped.
    #[cfg_attr(feature = "openapi", schema(required = false, default = true))]
    pub start: bool,
    /// Key that makes it safe to repeat the request; sent as the header `Idempotency-Key`. While
    /// the VM exists, the same request with the same key returns it instead of creating another.
    #[serde(skip)]
    pub idempotency_key: Option<IdempotencyKey>,
}

/// Omits a field with its default value. The request then has the same text, and the same digest
/// for its idempotency key, as before the field existed.
fn is_true(value: &bool) -> bool {
    *value
}

impl CreateVm {
    const FIELDS: [&str; 15] = [
        VmSource::TEMPLATE,
        VmSource::IMAGE,
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
        "env",
        CreateMain::FIELD,
        "start",
    ];

    /// Maximum size of `env`, in bytes, with two for each variable.
    pub const MAX_ENV_BYTES: usize = 64 << 10;

    /// Creates a request for a running VM of a template; the host chooses everything else.
    pub fn new(template: TemplateName, ssh_public_key: Option<SshPublicKey>) -> Self {
        CreateVm::from_source(VmSource::Template(template), ssh_public_key)
    }

    /// Creates a request like [`CreateVm::new`], of a template or an image.
    pub fn from_source(source: VmSource, ssh_public_key: Option<SshPublicKey>) -> Self {
        CreateVm {
            source,
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
            env: BTreeMap::new(),
            main: None,
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
        let fields = Fields::read(body, &Self::FIELDS)?;
        let source = VmSource::read(&fields)?;
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
            env: Self::read_env(&fields)?,
            main: CreateMain::read(&fields)?,
            start: fields.optional_bool("start")?.unwrap_or(true),
            source,
            name: fields.optional_text("name")?,
            ssh_public_key: fields.optional_text("ssh_public_key")?,
            idempotency_key: None,
        })
    }

    fn read_env(fields: &Fields<'_>) -> Result<BTreeMap<String, String>, Invalid> {
        let env = command::read_env(fields)?;
        match command::size_of_env(&env) <= Self::MAX_ENV_BYTES {
            true => Ok(env),
            false => Err(command::form(
                "env",
                format!("must have at most {} bytes", Self::MAX_ENV_BYTES),
            )),
        }
    }
}

/// The query of `POST /vms`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CreateVmQuery {
    /// The event after which the response is sent; none for the start of the machine.
    pub wait: Option<WaitFor>,
    /// Maximum time to wait for the pull of an image, and then once more for the event: 1 to
    /// [`MAX_WAIT_SECONDS`](Self::MAX_WAIT_SECONDS); by default
    /// [`DEFAULT_WAIT_SECONDS`](Self::DEFAULT_WAIT_SECONDS).
    pub wait_seconds: Option<u64>,
}

/// An event after which the response to `POST /vms` is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitFor {
    /// The agent in the guest responds (`wait=agent`).
    Agent,
}

impl CreateVmQuery {
    /// The default of `wait_seconds`.
    pub const DEFAULT_WAIT_SECONDS: u64 = 120;
    /// The maximum of `wait_seconds`.
    pub const MAX_WAIT_SECONDS: u64 = 600;

    const FIELDS: [&str; 2] = ["wait", "wait_seconds"];

    /// Parses the decoded parameters of a query.
    ///
    /// # Errors
    /// An unknown or repeated parameter, or an invalid value.
    pub fn parse<'q>(parameters: impl IntoIterator<Item = (&'q str, &'q str)>) -> Result<Self, Invalid> {
        let mut query = CreateVmQuery::default();
        for (name, value) in parameters {
            let is_repeated = match name {
                "wait" => query.wait.replace(WaitFor::read(value)?).is_some(),
                "wait_seconds" => query.wait_seconds.replace(wait_seconds(value)?).is_some(),
                other => return Err(Invalid::unknown(other, &Self::FIELDS)),
            };
            if is_repeated {
                return Err(Invalid::Duplicate(name.to_owned()));
            }
        }
        Ok(query)
    }

    /// Checks that the query fits its request.
    ///
    /// # Errors
    /// `wait` for a VM that is not started, or `wait_seconds` without anything to wait for.
    pub fn check(&self, request: &CreateVm) -> Result<(), Invalid> {
        let invalid = |field, form| {
            let form = InvalidFormat::new(form);
            Err(Invalid::Form { field, form })
        };
        let may_pull = matches!(request.source, VmSource::Image(_));
        match self.wait {
            Some(_) if !request.start => {
                invalid("wait", "needs a VM that is started: omit it, or send \"start\": true")
            }
            None if self.wait_seconds.is_some() && !may_pull => {
                invalid("wait_seconds", "is only valid together with wait=agent or an image")
            }
            _ => Ok(()),
        }
    }

    /// Returns the maximum time to wait for a pull, and for an agent.
    pub fn max_wait(&self) -> Duration {
        Duration::from_secs(self.wait_seconds.unwrap_or(Self::DEFAULT_WAIT_SECONDS))
    }
}

impl WaitFor {
    /// Returns the value of the parameter `wait`.
    pub const fn as_str(self) -> &'static str {
        match self {
            WaitFor::Agent => "agent",
        }
    }

    fn read(value: &str) -> Result<Self, Invalid> {
        match value {
            "agent" => Ok(WaitFor::Agent),
            _ => Err(Invalid::Form {
                field: "wait",
                form: InvalidFormat::new("must be agent"),
            }),
        }
    }
}

fn wait_seconds(value: &str) -> Result<u64, Invalid> {
    let range = 1..=CreateVmQuery::MAX_WAIT_SECONDS;
    let is_number = value.bytes().all(|byte| byte.is_ascii_digit());
    let seconds = value
        .parse()
        .ok()
        .filter(|seconds| is_number && range.contains(seconds));
    seconds.ok_or(Invalid::Number {
        field: "wait_seconds",
        min: *range.start(),
        max: *range.end(),
    })
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
    /// `true` starts the VM again after a reboot of the host if it was running.
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

/// Returns `Some(None)` if the field is null, and otherwise the result of `read`.
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vm() -> Vm {
        Vm {
            id: "vm-0123456789ab".into(),
            name: "very-silly-penguin".into(),
            template: "debian-base".into(),
            ip: "192.0.2.7".into(),
            ssh_port: 22001,
            ssh: "ssh -p 22001 user@192.0.2.7".into(),
            url: None,
            status: VmStatus::Running,
            status_reason: None,
            created_at: "2026-01-02T03:04:05Z".into(),
            vcpu_count: 1,
            mem_size_mib: 512,
            disk_size_gib: 10,
            disk_auto_extend: None,
            disk_iops: None,
            disk_mbps: None,
            net_mbps: None,
            autostart: true,
            main: None,
            disk: None,
            storage: None,
        }
    }

    #[test]
    fn a_vm_serializes_to_exactly_the_documented_fields() {
        let expected = json!({
            "id": "vm-0123456789ab", "name": "very-silly-penguin", "template": "debian-base", "ip": "192.0.2.7",
            "ssh_port": 22001, "ssh": "ssh -p 22001 user@192.0.2.7", "url": null, "status": "running",
            "created_at": "2026-01-02T03:04:05Z", "vcpu_count": 1, "mem_size_mib": 512, "disk_size_gib": 10,
            "autostart": true,
        });
        assert_eq!(serde_json::to_value(vm()).unwrap(), expected);
        assert_eq!(serde_json::from_value::<Vm>(expected).unwrap(), vm());
    }

    #[test]
    fn the_query_of_a_creation_is_parsed_strictly() {
        let parse = |pairs: &[(&'static str, &'static str)]| CreateVmQuery::parse(pairs.iter().copied());
        assert_eq!(parse(&[]), Ok(CreateVmQuery::default()));
        let wait = Some(WaitFor::Agent);
        for (seconds, wait_seconds) in [("1", 1), ("600", 600), ("007", 7)] {
            let parsed = parse(&[("wait_seconds", seconds), ("wait", "agent")]);
            let wait_seconds = Some(wait_seconds);
            assert_eq!(parsed, Ok(CreateVmQuery { wait, wait_seconds }));
        }
        for (pairs, field) in [
            (&[("wait", "ssh")][..], Some("wait")),
            (&[("wait", "agent"), ("wait", "agent")], Some("wait")),
            (&[("wait", "agent"), ("wait_seconds", "0")], Some("wait_seconds")),
            (&[("wait", "agent"), ("wait_seconds", "601")], Some("wait_seconds")),
            (&[("wait", "agent"), ("wait_seconds", "+5")], Some("wait_seconds")),
            (&[("wait", "agent"), ("wait_seconds", "")], Some("wait_seconds")),
            (&[("waits", "agent")], None),
        ] {
            let refused = parse(pairs).unwrap_err();
            assert_eq!(refused.field(), field, "{refused}");
        }
        let unknown = parse(&[("waits", "agent")]).unwrap_err().to_string();
        assert!(unknown.contains("did you mean wait?"), "{unknown}");
    }

    #[test]
    fn the_query_of_a_creation_fits_its_request() {
        let of_template = CreateVm::new("box".parse().unwrap(), None);
        let of_image = CreateVm::from_source(VmSource::Image("box:1".parse().unwrap()), None);
        let stopped = |request: &CreateVm| CreateVm {
            start: false,
            ..request.clone()
        };
        let field = |query: &CreateVmQuery, request: &CreateVm| {
            let refused = query.check(request).err();
            refused.and_then(|refused| refused.field().map(str::to_owned))
        };
        let [waits, seconds] = [(Some(WaitFor::Agent), None), (None, Some(5))]
            .map(|(wait, wait_seconds)| CreateVmQuery { wait, wait_seconds });
        assert_eq!(field(&waits, &of_template), None);
        assert_eq!(field(&waits, &stopped(&of_image)).as_deref(), Some("wait"));
        assert_eq!(field(&seconds, &of_template).as_deref(), Some("wait_seconds"));
        assert_eq!(field(&seconds, &stopped(&of_image)), None);
    }

    #[test]
    fn a_failed_vm_has_a_reason() {
        let failed = Vm {
            status: VmStatus::Failed,
            status_reason: Some("the process ended".into()),
            ..vm()
        };
        let json = serde_json::to_value(failed).unwrap();
        assert_eq!(
            (&json["status"], &json["status_reason"]),
            (&json!("failed"), &json!("the process ended"))
        );
    }

    #[test]
    fn unknown_fields_of_a_response_are_ignored() {
        let mut json = serde_json::to_value(vm()).unwrap();
        json["colour"] = json!("blue");
        assert_eq!(serde_json::from_value::<Vm>(json).unwrap(), vm());
    }
}
