//! The interface of a hypervisor driver, and the life cycle of a machine.
//!
//! ```text
//!             launch                     pause
//!   (nothing) ──────▶ Running ◀────────────────────▶ Paused
//!                      │  ▲               resume       │
//!       host I/O error │  │ resume                     │
//!       on the disk    ▼  │ (repeats the request)      │
//!                     Stalled                          │
//!                      │                               │
//!                      └──────┬────────────────────────┘
//!                             │ guest powers off · stop · kill · crash, from any state
//!                             ▼
//!                       Ended(reason)      final: a new launch makes a new Machine
//! ```
//!
//! A machine does not belong to the process that launched it. That process may die or be replaced
//! at any moment, and the next one calls [`Vmm::adopt`]. A process controls a machine through a
//! handle ([`Machine`]); there is one handle at a time. Dropping the last reference to the handle
//! releases the machine, which keeps running (its console is not recorded meanwhile).
//!
//! [`Vmm::force_stop`] is not in the diagram: it leads from any state, and from an interrupted
//! launch, to *(nothing)*. It needs no handle and sends the hypervisor no command, so it works
//! where [`Vmm::adopt`] fails with [`Error::Hung`]. It refuses a machine that has a holder; use
//! [`kill`](Machine::kill) on the handle instead.

use crate::{Error, Result};
use async_trait::async_trait;
use scalebox_units::{Bytes, DiskLocation, Mac, VmId};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::broadcast;

/// A driver: a hypervisor that can run machines.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Returns the driver's name, as in the setting `VMM`.
    fn name(&self) -> &'static str;

    /// Returns the maximum number of vCPUs of one machine.
    fn max_vcpus(&self) -> u32;

    /// Returns whether the driver can launch machines. A driver whose program is missing can still
    /// adopt and stop machines that were launched before.
    fn can_launch(&self) -> bool;

    /// Starts a machine. When this returns, the guest is running, but has not booted yet.
    ///
    /// Before: the disk, seed drive, tap, kernel and initramfs exist. `run_dir` may be missing; its
    /// parent exists. After success: the machine is [`MachineState::Running`] and no longer depends
    /// on this process. After an error: the machine has no process and no files; the disk and the
    /// tap are unchanged.
    ///
    /// Cancellation: dropping the future undoes the launch in the background, as an error does.
    ///
    /// # Errors
    /// [`Error::Running`] if the machine already runs or another process holds it; [`Error::Spec`]
    /// for an invalid field; [`Error::Launch`] with the hypervisor's whole output.
    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>>;

    /// Takes over a machine that an earlier process launched.
    ///
    /// Returns `Some` if the machine exists, in any state. This includes [`MachineState::Ended`] if
    /// the guest powered itself off while no process held the machine; the reason is then known.
    /// Returns `None` if the machine is gone for an unknown reason ([`ExitReason::Unknown`]); its
    /// leftovers are removed. An interrupted launch is undone and also gives `None`.
    ///
    /// Cancellation: nothing is lost; call it again.
    ///
    /// # Errors
    /// [`Error::Running`] if a process (including this one) still holds the machine.
    /// [`Error::Hung`] if the hypervisor is alive but does not respond: it is left unchanged and
    /// without a holder, to be adopted later or [force-stopped](Vmm::force_stop).
    /// [`Error::Unkillable`] if an interrupted launch cannot be undone.
    async fn adopt(&self, id: &VmId, run_dir: &Path) -> Result<Option<Arc<dyn Machine>>>;

    /// Kills the process of a machine that has no holder, and removes its files.
    ///
    /// The hypervisor gets no command: this also works on a process that hangs or is stopped
    /// (SIGSTOP), and on an interrupted launch. The effect is that of a power cut: data that the
    /// guest has not flushed is lost.
    ///
    /// A process must be proven to be the machine's in the same way as for [`adopt`](Vmm::adopt)
    /// (if there is a record: by pid, start time, boot and arguments). It is killed through a
    /// pidfd, so a process that has reused the pid is safe.
    ///
    /// Before: `run_dir` may be missing; its parent exists. After success: the machine has no
    /// process and no files. Returns whether there was a process.
    ///
    /// Cancellation: a kill that was sent is not undone, and files may remain; call it again.
    ///
    /// # Errors
    /// [`Error::Running`] if a process (including this one) holds the machine;
    /// [`Error::Unkillable`] if its process does not exit within 10 s of the kill: its files stay
    /// for the next attempt.
    async fn force_stop(&self, id: &VmId, run_dir: &Path) -> Result<bool>;
}

/// A handle to a launched or adopted machine. Every method may be called at any time and
/// concurrently.
///
/// Each command has a timeout: a hung hypervisor causes [`Error::Hung`], and
/// [`kill`](Machine::kill) still works. After the machine has ended, commands return
/// [`Error::Ended`], except [`stop`](Machine::stop), [`kill`](Machine::kill) and
/// [`exited`](Machine::exited), which return the reason. Unless noted otherwise, a command whose
/// future is dropped may or may not have taken effect.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Returns the machine's id.
    fn id(&self) -> &VmId;

    /// Returns the hypervisor's pid, for display and for cgroups. The process may have ended by the
    /// time the pid is used.
    fn pid(&self) -> i32;

    /// Asks the hypervisor for the machine's state.
    async fn state(&self) -> Result<MachineState>;

    /// Stops the guest's vCPUs; memory and disk stay. Does nothing on a paused machine.
    async fn pause(&self) -> Result<()>;

    /// Resumes a paused or stalled guest. A stalled guest repeats the disk request that failed on
    /// the host, and stalls again if it fails again. Does nothing on a running machine.
    async fn resume(&self) -> Result<()>;

    /// Grows the root disk to `size`. The running guest sees the new size at once; growing the file
    /// system is the guest's job. Calls are serialized; a disk never shrinks.
    ///
    /// # Errors
    /// [`Error::Spec`] if `size` is below the disk's size or below the largest size requested
    /// before, or is not a multiple of 512 bytes.
    async fn resize_root(&self, size: Bytes) -> Result<()>;

    /// Returns whether discards by the guest reach the root disk's file.
    fn supports_discard(&self) -> bool;

    /// Limits the guest's I/O on its root disk from now on; `None` in `limits` means no limit.
    /// Excess requests wait.
    async fn limit_disk(&self, limits: DiskLimits) -> Result<()>;

    /// Requests a guest shutdown repeatedly until `grace` has passed, then kills the machine.
    /// Resumes a paused guest first. Returns how the machine ended: [`ExitReason::GuestShutdown`]
    /// if the guest obeyed, [`ExitReason::Killed`] if it was killed, or another reason if the
    /// machine ended by itself meanwhile.
    ///
    /// Cancellation: a requested shutdown is not undone; the kill no longer happens.
    async fn stop(&self, grace: Duration) -> Result<ExitReason>;

    /// Kills the machine, as a power cut would: data that the guest has not flushed is lost.
    /// Returns how the machine ended. Works whatever the hypervisor is doing.
    async fn kill(&self) -> Result<ExitReason>;

    /// Waits for the machine's end. May be awaited many times, also after the end. By then its
    /// files in `run_dir` are removed and the console log is complete.
    async fn exited(&self) -> ExitReason;

    /// Subscribes to the machine's events from now on. A receiver that falls behind loses the
    /// oldest events and should then ask for the [`state`](Machine::state).
    fn events(&self) -> broadcast::Receiver<MachineEvent>;

    /// Opens a connection to the guest agent, ready for the agent's protocol. Some hypervisors
    /// serve one client at a time: a second client gets its first response once the first client
    /// has disconnected.
    ///
    /// # Errors
    /// [`Error::Agent`] if the agent cannot be reached. A guest that is booting or has no agent may
    /// simply not respond.
    async fn agent(&self) -> Result<UnixStream>;
}

/// Everything a machine consists of. The files and devices it names must exist; only the content of
/// `run_dir` is created.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// Unique on this host.
    pub id: VmId,
    /// At least 1.
    pub vcpus: u32,
    /// At least [`MIN_MEMORY_MIB`].
    pub memory_mib: u64,
    /// A kernel that the hypervisor can boot directly.
    pub kernel: PathBuf,
    /// The initramfs, if the kernel needs one.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, at most [`MAX_CMDLINE`] bytes. The console is `ttyS0`.
    pub cmdline: String,
    /// The root disk: the guest's first disk, `/dev/vda`.
    pub root: DiskLocation,
    /// I/O limits of the root disk.
    pub root_limits: DiskLimits,
    /// The seed drive: the guest's second disk, read-only.
    pub seed: PathBuf,
    /// The network interface.
    pub nic: Nic,
    /// Folder for sockets and for the record by which the machine is found again. It is created if
    /// missing, with mode 0700, and is used by this machine alone. The path must be short: a
    /// socket's path has at most 107 bytes, of which this crate needs [`MAX_SOCKET_NAME`].
    pub run_dir: PathBuf,
    /// The console log; one previous part is kept next to it (`….1`). See
    /// [`CONSOLE_LIMIT`](crate::CONSOLE_LIMIT).
    pub console_log: PathBuf,
    /// The account that the hypervisor runs as after opening its files. `None`: the account of this
    /// process.
    pub run_as: Option<RunAs>,
}

/// Minimum memory of a machine.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Maximum length of the kernel command line, in bytes: `COMMAND_LINE_SIZE` of the x86 kernel,
/// minus the terminating zero.
pub const MAX_CMDLINE: usize = 2047;
/// Maximum path length of a Unix socket, in bytes: `sun_path` minus the terminating zero (unix(7)).
const MAX_SOCKET_PATH: usize = 107;
/// Maximum number of bytes that this crate appends to `run_dir` to name a socket.
pub const MAX_SOCKET_NAME: usize = 16;

impl MachineSpec {
    /// Rejects invalid fields before anything is created.
    pub(crate) fn check(&self) -> Result<()> {
        let invalid = |what, why: String| {
            Err(Error::Spec {
                id: self.id.clone(),
                what,
                why,
            })
        };
        if self.vcpus == 0 {
            return invalid("vcpus", "a machine needs at least 1".into());
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return invalid(
                "memory_mib",
                format!("{} is too small, minimum {MIN_MEMORY_MIB}", self.memory_mib),
            );
        }
        if self.cmdline.len() > MAX_CMDLINE {
            return invalid(
                "cmdline",
                format!("{} bytes is too long, maximum {MAX_CMDLINE}", self.cmdline.len()),
            );
        }
        if self.run_dir.as_os_str().len() + MAX_SOCKET_NAME > MAX_SOCKET_PATH {
            let max = MAX_SOCKET_PATH - MAX_SOCKET_NAME;
            return invalid(
                "run_dir",
                format!(
                    "{} is too long for sockets, maximum {max} bytes",
                    self.run_dir.display()
                ),
            );
        }
        if !is_interface_name(&self.nic.tap) {
            return invalid("nic.tap", format!("{:?} is not a network interface name", self.nic.tap));
        }
        if !self.nic.mac.is_unicast() {
            return invalid(
                "nic.mac",
                format!(
                    "{} is not a unicast MAC address such as 52:54:00:12:34:56",
                    self.nic.mac
                ),
            );
        }
        Ok(())
    }
}

/// At most 15 bytes (`IFNAMSIZ`), and no character with a meaning in a hypervisor's option.
fn is_interface_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=15).contains(&name.len()) && name.bytes().all(plain) && name.bytes().any(|byte| byte != b'.')
}

/// A machine's network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// The host's end: an existing tap.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: Mac,
}

/// Limits on a guest's reads and writes together. Bursts of up to one second's worth are allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Requests per second; at least 1.
    pub iops: Option<u32>,
    /// Bytes per second.
    pub bytes_per_second: Option<u64>,
}

/// A Unix account, by numeric ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunAs {
    /// User id.
    pub uid: u32,
    /// Group id; the process is in no other group.
    pub gid: u32,
}

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

/// How a machine ended.
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
    /// A program in the guest opened the agent's port: the guest's system is up. Not every
    /// hypervisor reports this.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "vm-0123456789ab".parse().unwrap(),
            vcpus: 1,
            memory_mib: 512,
            kernel: "/k".into(),
            initrd: None,
            cmdline: "quiet".into(),
            root: DiskLocation::File("/r".into()),
            root_limits: DiskLimits::default(),
            seed: "/s".into(),
            nic: Nic {
                tap: "tap0".into(),
                mac: "52:54:00:12:34:56".parse().unwrap(),
            },
            run_dir: "/run/scaleboxd/vms/vm-0123456789ab".into(),
            console_log: "/c".into(),
            run_as: None,
        }
    }

    #[test]
    fn invalid_fields_are_rejected_by_name() {
        spec().check().unwrap();
        type Break = fn(&mut MachineSpec);
        let invalid: [(&str, Break); 7] = [
            ("vcpus", |spec| spec.vcpus = 0),
            ("memory_mib", |spec| spec.memory_mib = 31),
            ("cmdline", |spec| spec.cmdline = "x".repeat(2048)),
            ("run_dir", |spec| spec.run_dir = "/x".repeat(46).into()),
            ("nic.tap", |spec| spec.nic.tap = "tap0,script=/x".into()),
            ("nic.tap", |spec| spec.nic.tap = "a-name-too-long-".into()),
            ("nic.mac", |spec| spec.nic.mac = "53:54:00:12:34:56".parse().unwrap()),
        ];
        for (field, break_it) in invalid {
            let mut spec = spec();
            break_it(&mut spec);
            match spec.check() {
                Err(Error::Spec { what, .. }) => assert_eq!(what, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
