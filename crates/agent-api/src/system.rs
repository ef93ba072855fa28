//! The guest as a whole.

use serde::{Deserialize, Serialize};

/// The agent and its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// The version of the agent.
    pub version: String,
    /// The guest's `/proc/sys/kernel/random/boot_id`: changes with each boot.
    pub boot_id: String,
    /// The program that is process 1.
    pub init: InitKind,
}

/// The program that is process 1 in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitKind {
    /// The image's own init, such as systemd.
    System,
    /// The agent.
    Agent,
}

/// Load and memory of a guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Time since the boot, in seconds.
    pub uptime_seconds: f64,
    /// Load averages of 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// CPU time of all vCPUs since the boot that was not idle, in milliseconds.
    pub cpu_busy_ms: u64,
    /// Total memory, in bytes.
    pub memory_total: u64,
    /// Memory that programs can still get without swapping, in bytes.
    pub memory_available: u64,
    /// Memory of the agent itself (RSS), in bytes.
    pub agent_memory: u64,
    /// Size of the root file system, in bytes.
    pub root_total: u64,
    /// Used bytes of the root file system.
    pub root_used: u64,
    /// Number of processes.
    pub processes: u64,
    /// Received bytes of all network interfaces except `lo`.
    pub network_received: u64,
    /// Sent bytes of all network interfaces except `lo`.
    pub network_sent: u64,
    /// Number of execs that run.
    pub execs: u64,
}

/// The result of a trim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trimmed {
    /// Discarded bytes, over all file systems.
    pub bytes: u64,
}

/// The root file system after a growth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootSize {
    /// Capacity for files, in bytes.
    pub total: u64,
    /// Used bytes.
    pub used: u64,
}

/// The time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// Nanoseconds since 1970.
    pub unix_ns: u64,
}

/// A request to end the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    /// `true` for a reset instead of a power-off: Firecracker ends a machine that resets.
    pub reboot: bool,
}
