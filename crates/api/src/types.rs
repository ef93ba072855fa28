//! Every response of the API. Sizes are whole numbers, and the field's name ends in their unit
//! (`_bytes`, `_mib`, `_gib`).

use serde::{Deserialize, Serialize};
use std::fmt;

/// A VM, as `POST /vms` and `GET /vms/{id or name}` return it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Vm {
    /// `vm-` and twelve lower-case hex digits; see [`is_vm_id`](crate::is_vm_id).
    #[cfg_attr(feature = "openapi", schema(pattern = "^vm-[0-9a-f]{12}$"))]
    pub id: String,
    /// Unique among the VMs of the host; also the guest's host name.
    pub name: String,
    /// Template that the disk was cloned from.
    pub template: String,
    /// Address of the host (`HOST_IP`), to use with `ssh_port`.
    pub ip: String,
    /// Port of the host that is forwarded to the guest's port 22.
    pub ssh_port: u16,
    /// Command to log in: `ssh -p PORT user@HOST_IP`.
    pub ssh: String,
    /// Always null; reserved for a guest's HTTP service.
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
    /// Whether the VM starts again after a reboot of the host if it was running.
    #[serde(default = "default_autostart")]
    pub autostart: bool,
    /// Growth of the guest's file system; only in the response to a change of the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// Disk usage in the pool; absent until measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageUsage>,
}

/// The behavior of servers that do not send the field.
fn default_autostart() -> bool {
    true
}

/// A policy to extend a disk automatically. It needs a guest agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AutoExtend {
    /// Usage of the guest's root file system at which the disk grows, as `df` in the guest shows
    /// it: 1 to 99 %.
    pub threshold_percent: u64,
    /// Size to add each time, in GiB; less if the limit or the pool allow no more.
    pub increment_gib: u64,
    /// Maximum size, in GiB. A request may grow the disk beyond it.
    pub limit_gib: u64,
}

/// Usage of a disk or a template in the pool, as last measured: at most `ACCOUNTING_SECONDS` ago,
/// by default a minute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StorageUsage {
    /// Size that the guest sees; for a template, the size of its image.
    pub provisioned_bytes: u64,
    /// Size of the blocks that it maps, shared or not.
    pub used_bytes: u64,
    /// Space that deleting it frees. It can be more than `used_bytes`, because an extent that was
    /// overwritten in part is kept whole.
    pub exclusive_bytes: u64,
    /// Time of the measurement: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub measured_at: String,
}

/// The growth of a guest's root file system after its disk has grown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Disk {
    /// Whether the file system is known to have grown with the disk.
    pub confirmed: bool,
    /// Size of the root file system as the guest's agent reports it, without the file system's own
    /// overhead; null if no agent responded.
    pub guest_total_bytes: Option<u64>,
    /// Why the growth is not confirmed, and what to do.
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

/// A template, as `GET /templates` returns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Template {
    /// Name to use in `POST /vms`.
    pub name: String,
    /// Size that a guest sees; a VM's disk is at least this large.
    pub size_bytes: u64,
    /// Size of the blocks that it maps.
    pub used_bytes: u64,
    /// Time of creation: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub created_at: String,
    /// Number of existing VMs that were cloned from it.
    pub used_by: u64,
    /// Whether the template is protected against deletion.
    pub protected: bool,
    /// Usage in the pool, with resized base images included in `exclusive_bytes`; absent until
    /// measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageUsage>,
}

/// A template created from a VM's disk, as `POST /vms/{id}/snapshot` returns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Snapshot {
    /// Name of the template.
    pub template: String,
    /// Id of the VM that the disk belongs to.
    pub source_vm: String,
    /// Size that a guest sees.
    pub size_bytes: u64,
    /// Time of creation: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub created_at: String,
    /// Time during which the guest could not write, in milliseconds, including the round trips to
    /// its agent; 0 if it was not running.
    pub stood_still_ms: u64,
    /// How writes were prevented: the agent had `frozen` the guest, the host had `paused` it, or it
    /// was `not_running`.
    pub held: String,
}

/// The response to `GET /templates`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TemplateList {
    /// All templates of the pool.
    pub templates: Vec<Template>,
}

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
    /// Space that belongs to a single VM's disk. The sum of the four values from here equals
    /// `used_bytes` at `measured_at`, within 1 %; null until measured.
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
    /// Number of stopped and deleted VMs whose resources could not be removed yet, for a reason
    /// that the log names; removal is retried every few seconds. A deleted VM's disk stays
    /// committed until it is removed.
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

/// The response to `GET /info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HostInfo {
    /// Version of the daemon.
    pub version: String,
    /// Name of the host.
    pub hostname: String,
    /// Address shown to clients (`HOST_IP`).
    pub host_ip: String,
    /// Seconds since the daemon started.
    pub uptime_seconds: u64,
    /// Hypervisor for new VMs: `qemu` or `firecracker`.
    pub vmm: String,
    /// Acceleration in use: `kvm` or `tcg` (emulation).
    pub accel: String,
    /// The pool.
    pub storage: PoolInfo,
    /// The host's memory.
    pub memory: Memory,
    /// The host's processors.
    pub cpu: Cpu,
    /// Number of VMs.
    pub vms: VmCounts,
    /// Number of templates.
    pub templates: u64,
    /// Default and maximum sizes of a VM.
    pub limits: HostLimits,
}

/// The host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Memory {
    /// Total memory.
    pub total_bytes: u64,
    /// Memory available without swapping (`MemAvailable` of `/proc/meminfo`).
    pub available_bytes: u64,
}

/// The host's processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Cpu {
    /// Number of processors that are online.
    pub count: u32,
    /// Model name in `/proc/cpuinfo`.
    pub model: String,
}

/// The number of VMs, in total and by status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VmCounts {
    /// All VMs.
    pub total: u64,
    /// VMs with status `running`.
    pub running: u64,
    /// VMs with status `stopped`.
    pub stopped: u64,
    /// VMs with status `paused`.
    pub paused: u64,
    /// VMs with status `failed`.
    pub failed: u64,
}

impl FromIterator<VmStatus> for VmCounts {
    fn from_iter<I: IntoIterator<Item = VmStatus>>(statuses: I) -> Self {
        let mut counts = VmCounts::default();
        for status in statuses {
            counts.total += 1;
            match status {
                VmStatus::Running => counts.running += 1,
                VmStatus::Stopped => counts.stopped += 1,
                VmStatus::Paused => counts.paused += 1,
                VmStatus::Failed => counts.failed += 1,
            }
        }
        counts
    }
}

/// Default and maximum sizes of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HostLimits {
    /// `DEFAULT_DISK_SIZE_GIB`; a larger template has a larger default.
    pub default_disk_size_gib: u64,
    /// `MAX_DISK_SIZE_GIB`.
    pub max_disk_size_gib: u64,
    /// `DEFAULT_VCPU_COUNT`.
    pub default_vcpu_count: u32,
    /// Limited by the host's processors and by the hypervisor.
    pub max_vcpu_count: u32,
    /// `DEFAULT_MEM_SIZE_MIB`.
    pub default_mem_size_mib: u64,
    /// Minimum with which a guest boots.
    pub min_mem_size_mib: u64,
    /// Limited by the host's memory.
    pub max_mem_size_mib: u64,
}

/// The response to `GET /health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Health {
    /// `ok`.
    pub status: String,
}

impl Health {
    /// Returns the response of a working daemon.
    pub fn ok() -> Self {
        Health {
            status: "ok".to_owned(),
        }
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

    #[test]
    fn vms_are_counted_by_status() {
        use VmStatus::*;
        let counts: VmCounts = [Running, Failed, Running, Stopped, Paused].into_iter().collect();
        assert_eq!(
            counts,
            VmCounts {
                total: 5,
                running: 2,
                stopped: 1,
                paused: 1,
                failed: 1
            }
        );
    }
}
