//! The states, events and ends of a machine.

use std::fmt;

/// The state of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineState {
    /// The guest is running.
    Running,
    /// The guest was paused by a command.
    Paused,
    /// The guest is paused because a disk request failed on the host, most often for lack of space.
    /// The guest does not notice; resuming repeats the request.
    Stalled,
    /// The machine has ended.
    Ended(ExitReason),
}

/// The reason why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off: its file systems are clean. Also a reboot, under a hypervisor
    /// that cannot restart a guest in place.
    GuestShutdown,
    /// Killed on request, or terminated from outside by a signal or command.
    Killed,
    /// The hypervisor process died unexpectedly.
    Crashed {
        /// Exit status and last output.
        detail: String,
    },
    /// The machine ended while no process held it.
    Unknown,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::GuestShutdown => f.write_str("the guest shut down"),
            ExitReason::Killed => f.write_str("the machine was killed"),
            ExitReason::Crashed { detail } => write!(f, "the hypervisor died: {detail}"),
            ExitReason::Unknown => f.write_str("the machine ended while the daemon was not running"),
        }
    }
}

/// An event of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MachineEvent {
    /// The guest's vCPUs stopped: a pause, a stall, or the end.
    Stopped,
    /// The vCPUs run again.
    Resumed,
    /// The guest rebooted; the machine continues. A guest that reboots every few seconds is stuck
    /// in a loop.
    GuestReboot,
    /// `qemu-guest-agent` opened its port: the guest's system is up. Not every hypervisor reports
    /// this.
    AgentUp,
    /// The guest powered itself off; [`MachineEvent::Ended`] follows.
    GuestShutdown,
    /// A disk request failed on the host, and the guest is now paused ([`MachineState::Stalled`]).
    IoError {
        /// The host was out of space: resume once there is space.
        nospace: bool,
        /// The host's error.
        reason: String,
    },
    /// The machine has ended.
    Ended(ExitReason),
}
