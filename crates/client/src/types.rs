//! Every answer of the API. Sizes are whole numbers; the field's name ends in their unit (`_bytes`,
//! `_mib`, `_gib`).

use serde::{Deserialize, Serialize};
use std::fmt;

/// A VM, as `POST /vms` and `GET /vms/{id or name}` answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Vm {
    /// `vm-` and twelve lower-case hex digits; see [`VmId`](crate::VmId).
    #[cfg_attr(feature = "openapi", schema(pattern = "^vm-[0-9a-f]{12}$"))]
    pub id: String,
    /// Unique among the VMs of the host; also the guest's host name.
    pub name: String,
    /// The template that its disk was cloned from.
    pub template: String,
    /// The host's address (`HOST_IP`), at which `ssh_port` is reached.
    pub ip: String,
    /// The port of the host that leads to the guest's port 22.
    pub ssh_port: u16,
    /// The command to type: `ssh -p PORT user@HOST_IP`.
    pub ssh: String,
    /// Always null so far: no HTTP service of a guest is published yet.
    #[serde(default)]
    pub url: Option<String>,
    /// What the machine does now.
    pub status: VmStatus,
    /// Why it is so, where that needs saying: the reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_reason: Option<String>,
    /// RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub created_at: String,
    /// Processors of the guest.
    pub vcpu_count: u32,
    /// Memory of the guest, in MiB.
    pub mem_size_mib: u64,
    /// Size of its disk as promised to the guest, in GiB.
    pub disk_size_gib: u64,
    /// How its disk extends itself; not there where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_auto_extend: Option<AutoExtend>,
    /// Requests a second that the guest may make of its disk, reading and writing together; not
    /// there where it has no such limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_iops: Option<u64>,
    /// Megabytes (10⁶ bytes) a second that it may read and write together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mbps: Option<u64>,
    /// Megabits (10⁶ bits) a second that it may send, and that it may receive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_mbps: Option<u64>,
    /// Whether it is started again after a reboot of the host in which it ran.
    #[serde(default = "yes")]
    pub autostart: bool,
    /// What became of the guest's file system; only in the answer to a change of the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// What its disk takes in the pool; not there until it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageUsage>,
}

/// What servers did before they said so.
fn yes() -> bool {
    true
}

/// When a disk extends itself, by how much, and how far. It needs a guest agent in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AutoExtend {
    /// The disk grows when this share of the guest's root file system is in use, as `df` in the
    /// guest shows it: 1 to 99 %.
    pub threshold_percent: u64,
    /// By this much, in GiB; by less where the limit or the pool allow no more.
    pub increment_gib: u64,
    /// Until it is this large, in GiB. It may be made larger by a request.
    pub limit_gib: u64,
}

/// What a disk or a template takes in the pool, as last measured: at most a minute ago, or
/// `ACCOUNTING_SECONDS`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StorageUsage {
    /// The size promised to the guest; of a template, the size of its image.
    pub provisioned_bytes: u64,
    /// The blocks that it maps, shared or not.
    pub used_bytes: u64,
    /// What deleting it frees. Can be more than `used_bytes`: an extent overwritten in part stays
    /// whole.
    pub exclusive_bytes: u64,
    /// RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub measured_at: String,
}

/// What became of a guest's root file system when its disk was grown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Disk {
    /// Whether the file system is known to have grown with the disk.
    pub confirmed: bool,
    /// Size of the root file system as the guest's agent tells it, less what the file system keeps
    /// for itself; null when there was no guest to ask.
    pub guest_total_bytes: Option<u64>,
    /// Why it is not confirmed, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum VmStatus {
    /// Its process runs, its processors too.
    Running,
    /// There is a disk and no process.
    Stopped,
    /// Its process is there, its processors stand still.
    Paused,
    /// It ended or never began, against the will of its owner; `status_reason` tells why.
    Failed,
}

impl VmStatus {
    /// The word of the API.
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

/// `GET /vms`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VmList {
    /// All VMs of the host.
    pub vms: Vec<Vm>,
}

/// A template, as `GET /templates` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Template {
    /// What `POST /vms` calls it.
    pub name: String,
    /// Its size as a guest sees it; a VM's disk is at least this large.
    pub size_bytes: u64,
    /// The blocks that it maps.
    pub used_bytes: u64,
    /// RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub created_at: String,
    /// How many VMs were cloned from it and exist.
    pub used_by: u64,
    /// It cannot be deleted.
    pub protected: bool,
    /// What it takes in the pool, the grown clones kept of it included in `exclusive_bytes`; not
    /// there until it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageUsage>,
}

/// A template made of a VM's disk, as `POST /vms/{id}/snapshot` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Snapshot {
    /// The template's name.
    pub template: String,
    /// The id of the VM whose disk it was.
    pub source_vm: String,
    /// Its size as a guest sees it.
    pub size_bytes: u64,
    /// RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub created_at: String,
    /// How long the guest could not write meanwhile, in milliseconds, the way to its agent and back
    /// included; 0 for one that did not run.
    pub stood_still_ms: u64,
    /// How the guest was held still: `frozen` by its agent, `paused` by the host, or `not_running`.
    pub held: String,
}

/// `GET /templates`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TemplateList {
    /// All templates of the pool.
    pub templates: Vec<Template>,
}

/// The pool, as `GET /pool` answers and as part of [`HostInfo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolInfo {
    /// Where the pool is mounted.
    pub path: String,
    /// `btrfs` or `xfs`.
    #[serde(default)]
    pub file_system: String,
    /// The file behind it; null when the pool is not on an image.
    pub image: Option<String>,
    /// What it is mounted from; the loop device, when it is on an image.
    #[serde(default)]
    pub device: String,
    /// Size of the pool's file system.
    pub capacity_bytes: u64,
    /// What can really be written: bounded by the pool, by its metadata and by the host disk.
    pub free_bytes: u64,
    /// What is written.
    pub used_bytes: u64,
    /// Sum of the sizes promised to guests.
    pub committed_bytes: u64,
    /// What may be promised at most: `overcommit_ratio × capacity_bytes`.
    pub commitment_limit_bytes: u64,
    /// `OVERCOMMIT_RATIO`: 1 means that every promised byte is backed.
    pub overcommit_ratio: f64,
    /// Admitted and not yet spent.
    pub reserved_bytes: u64,
    /// Always left free (`STORAGE_BUFFER_GIB`).
    pub buffer_bytes: u64,
    /// What the pool alone could take, were the host disk endless.
    pub pool_free_bytes: u64,
    /// Free on the file system that the image lies on; null when the pool is not on an image.
    pub host_free_bytes: Option<u64>,
    /// Not yet given to either data or metadata by btrfs.
    pub unallocated_bytes: u64,
    /// What btrfs has given to metadata; a part of it is the file system's own reserve.
    pub metadata_bytes: u64,
    /// Of `metadata_bytes`, what is in use.
    pub metadata_used_bytes: u64,
    /// Blocks that belong to a single VM's disk. The four sums together are `used_bytes` at
    /// `measured_at`, within 1 %; null until measured.
    #[serde(default)]
    pub vms_exclusive_bytes: Option<u64>,
    /// Blocks that belong to a single template and the grown clones kept of it.
    #[serde(default)]
    pub templates_exclusive_bytes: Option<u64>,
    /// Blocks that several disks or templates share, each counted once.
    #[serde(default)]
    pub shared_bytes: Option<u64>,
    /// All other blocks: the guests' kernel, half-made files, deleted disks that are still open.
    #[serde(default)]
    pub other_bytes: Option<u64>,
    /// When the four sums were measured: RFC 3339, in UTC.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub measured_at: Option<String>,
    /// In how many days `free_bytes` are used up at the rate of the last day. Null with less than
    /// an hour of history (a restart of the daemon begins it anew), when nothing grows, and beyond
    /// ten years.
    #[serde(default)]
    pub days_left: Option<f64>,
    /// Stopped and deleted VMs that left something on the host which cannot be removed yet, for an
    /// error that the log names; it is tried again every few seconds. A deleted VM's disk stays
    /// committed until it is removed.
    #[serde(default)]
    pub cleanups_pending: u64,
}

/// `POST /pool/trim` and `POST /vms/{id}/trim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Trimmed {
    /// What the pool, or the guest, told its disk to be free; what was free there already may be
    /// included.
    pub trimmed_bytes: u64,
}

/// `GET /info`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HostInfo {
    /// The daemon's version.
    pub version: String,
    /// The host's name.
    pub hostname: String,
    /// The address shown to clients (`HOST_IP`).
    pub host_ip: String,
    /// Since the daemon started.
    pub uptime_seconds: u64,
    /// The driver in use: `qemu` or `firecracker`.
    pub vmm: String,
    /// The acceleration in use: `kvm` or `tcg` (emulation).
    pub accel: String,
    /// The pool.
    pub storage: PoolInfo,
    /// The host's memory.
    pub memory: Memory,
    /// The host's processors.
    pub cpu: Cpu,
    /// How many VMs there are.
    pub vms: VmCounts,
    /// How many templates there are.
    pub templates: u64,
    /// What a VM gets unasked, and at most.
    pub limits: HostLimits,
}

/// The host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Memory {
    /// What the host has.
    pub total_bytes: u64,
    /// What the kernel could hand out without swapping (`MemAvailable` of `/proc/meminfo`).
    pub available_bytes: u64,
}

/// The host's processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Cpu {
    /// How many are online.
    pub count: u32,
    /// As `/proc/cpuinfo` names them.
    pub model: String,
}

/// How many VMs there are, in all and by status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VmCounts {
    /// All of them.
    pub total: u64,
    /// [`VmStatus::Running`].
    pub running: u64,
    /// [`VmStatus::Stopped`].
    pub stopped: u64,
    /// [`VmStatus::Paused`].
    pub paused: u64,
    /// [`VmStatus::Failed`].
    pub failed: u64,
}

/// Counts by status.
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

/// What a VM gets when it names nothing, and at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HostLimits {
    /// `DEFAULT_DISK_SIZE_GIB`; a larger template makes a larger disk.
    pub default_disk_size_gib: u64,
    /// `MAX_DISK_SIZE_GIB`.
    pub max_disk_size_gib: u64,
    /// `DEFAULT_VCPU_COUNT`.
    pub default_vcpu_count: u32,
    /// The host's processors.
    pub max_vcpu_count: u32,
    /// `DEFAULT_MEM_SIZE_MIB`.
    pub default_mem_size_mib: u64,
    /// The least with which a guest boots.
    pub min_mem_size_mib: u64,
    /// Bounded by the host's memory.
    pub max_mem_size_mib: u64,
}

/// `GET /health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Health {
    /// `ok`.
    pub status: String,
}

impl Health {
    /// The answer of a daemon that serves.
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
    fn a_vm_has_exactly_the_fields_of_the_contract_and_a_null_url() {
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
    fn a_failed_vm_tells_why() {
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
    fn an_answer_with_more_than_we_know_is_still_read() {
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
