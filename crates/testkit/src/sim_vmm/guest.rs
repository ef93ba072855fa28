//! The settings of a simulated guest.

use scalebox_units::Bytes;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// The behaviour of a guest.
#[derive(Debug, Clone)]
pub struct SimGuest {
    /// Time from launch or reboot until the agents respond.
    pub boot_time: Duration,
    /// `qemu-guest-agent` of the guest, or its absence.
    pub qga: SimQga,
    /// Our own agent of the guest, or its absence.
    pub agent: SimAgent,
    /// Time from a shutdown request to the power-off. `None`: the guest ignores requests.
    pub shutdown_time: Option<Duration>,
    /// Size of the root file system. `None`: the size of the disk, also after it grows.
    pub fs_total: Option<Bytes>,
    /// Usage of the root file system.
    pub fs_used: Bytes,
    /// Unused blocks, which the next trim discards.
    pub trimmable: Bytes,
    /// Commands that `qemu-guest-agent` rejects, such as `guest-fsfreeze-freeze`.
    pub rejected: Vec<&'static str>,
    /// Commands to which `qemu-guest-agent` does not respond.
    pub unanswered: Vec<&'static str>,
}

/// The `qemu-guest-agent` of a simulated guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimQga {
    /// The agent responds once the guest has booted, while the guest runs.
    Responsive,
    /// Connections are accepted but get no response, as under QEMU without an agent.
    Silent,
    /// Connections are refused, as under Firecracker without an agent.
    Unreachable,
}

/// Our own agent in a simulated guest.
#[derive(Clone)]
pub enum SimAgent {
    /// Connections are refused, as by a machine of a release before the agent.
    Unreachable,
    /// Connections are accepted without a response, as under QEMU without the agent.
    Silent,
    /// The real agent serves connections once the guest has booted. It runs commands on this host,
    /// as the user of the test, and does not stop while the machine is paused.
    Real,
    /// A function serves each connection, in a thread of its own.
    Scripted(Arc<dyn Fn(UnixStream) + Send + Sync>),
}

impl std::fmt::Debug for SimAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            SimAgent::Unreachable => "Unreachable",
            SimAgent::Silent => "Silent",
            SimAgent::Real => "Real",
            SimAgent::Scripted(_) => "Scripted",
        })
    }
}

impl Default for SimGuest {
    /// Returns a guest that boots at once, has `qemu-guest-agent` and obeys.
    fn default() -> SimGuest {
        SimGuest {
            boot_time: Duration::from_millis(5),
            qga: SimQga::Responsive,
            agent: SimAgent::Unreachable,
            shutdown_time: Some(Duration::from_millis(5)),
            fs_total: None,
            fs_used: Bytes::from_mib(100),
            trimmable: Bytes::ZERO,
            rejected: Vec::new(),
            unanswered: Vec::new(),
        }
    }
}
