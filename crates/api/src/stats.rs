//! Load and memory of a running VM.

use serde::{Deserialize, Serialize};

/// The load and memory of a VM, as its agent reports them in response to `GET /vms/{vm}/stats`. The
/// guest can report any numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VmStats {
    /// Time since the boot, in seconds.
    pub uptime_seconds: f64,
    /// Load averages of 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// CPU time of all processors since the boot that was not idle, in milliseconds.
    pub cpu_busy_ms: u64,
    /// Total memory.
    pub memory_total_bytes: u64,
    /// Memory that programs can still get without swapping.
    pub memory_available_bytes: u64,
    /// Memory of the agent itself.
    pub agent_memory_bytes: u64,
    /// Size of the root file system.
    pub root_total_bytes: u64,
    /// Used bytes of the root file system.
    pub root_used_bytes: u64,
    /// Number of processes.
    pub processes: u64,
    /// Received bytes of all network interfaces except `lo`.
    pub network_received_bytes: u64,
    /// Sent bytes of all network interfaces except `lo`.
    pub network_sent_bytes: u64,
    /// Number of execs that run.
    pub execs: u64,
    /// The agent.
    pub agent: AgentInfo,
}

/// The agent of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentInfo {
    /// Version of the agent.
    pub version: String,
    /// Program that is process 1: `system` for the image's own init, or `agent`.
    pub init: String,
}
