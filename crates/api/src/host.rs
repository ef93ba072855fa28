//! The host: its hardware, its limits, and the number of its VMs.

use crate::pool::PoolInfo;
use crate::vms::VmStatus;
use serde::{Deserialize, Serialize};

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
    /// Maximum number of processors: limited by the host's processors and by the hypervisor.
    pub max_vcpu_count: u32,
    /// `DEFAULT_MEM_SIZE_MIB`.
    pub default_mem_size_mib: u64,
    /// Minimum with which a guest boots.
    pub min_mem_size_mib: u64,
    /// Maximum memory: limited by the host's memory.
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
