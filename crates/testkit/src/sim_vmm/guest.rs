//! The settings of a simulated guest.

use scalebox_units::Bytes;
use std::time::Duration;

/// The behaviour of a guest.
#[derive(Debug, Clone)]
pub struct SimGuest {
    /// Time from launch or reboot until the agent responds.
    pub boot_time: Duration,
    /// The guest agent, or its absence.
    pub agent: SimAgent,
    /// Time from a shutdown request to the power-off. `None`: the guest ignores requests.
    pub shutdown_time: Option<Duration>,
    /// Size of the root file system. `None`: the size of the disk, also after it grows.
    pub fs_total: Option<Bytes>,
    /// Usage of the root file system.
    pub fs_used: Bytes,
    /// Unused blocks, which the next trim discards.
    pub trimmable: Bytes,
    /// Commands that the agent rejects, such as `guest-fsfreeze-freeze`.
    pub rejected: Vec<&'static str>,
    /// Commands to which the agent does not respond.
    pub unanswered: Vec<&'static str>,
}

/// The guest agent of a simulated guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimAgent {
    /// The agent responds once the guest has booted, while the guest runs.
    Responsive,
    /// Connections are accepted but get no response, as under QEMU without an agent.
    Silent,
    /// Connections are refused, as under Firecracker without an agent.
    Unreachable,
}

impl Default for SimGuest {
    /// Returns a guest that boots at once, has an agent and obeys.
    fn default() -> SimGuest {
        SimGuest {
            boot_time: Duration::from_millis(5),
            agent: SimAgent::Responsive,
            shutdown_time: Some(Duration::from_millis(5)),
            fs_total: None,
            fs_used: Bytes::from_mib(100),
            trimmable: Bytes::ZERO,
            rejected: Vec::new(),
            unanswered: Vec::new(),
        }
    }
}
