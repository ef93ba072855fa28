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
//!
//! # Blocking
//!
//! No method of the two traits blocks the calling thread. Drivers open, copy and remove files, read
//! /proc, and spawn processes on the runtime's blocking threads. On the calling thread they make
//! only system calls that return at once: on sockets, pipes and pidfds. So the methods need a Tokio
//! runtime.
//!
//! The constructors of the drivers and the free functions of this crate block. Call them before the
//! runtime serves requests, or in a blocking task.

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::spec::{DiskLimits, MachineSpec};
use crate::state::{ExitReason, MachineEvent, MachineState};
use async_trait::async_trait;
use scalebox_units::{Bytes, VmId};
use std::path::Path;
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

    /// Adopts a machine that an earlier process launched.
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

    /// Queries the machine's state from the hypervisor.
    async fn state(&self) -> Result<MachineState>;

    /// Pauses the guest's vCPUs; memory and disk stay. Does nothing on a paused machine.
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

    /// Waits until the machine has ended. By then, its files in `run_dir` are removed and the
    /// console log is complete. May be awaited many times, also after the end.
    async fn exited(&self) -> ExitReason;

    /// Subscribes to the machine's events from now on. A receiver that falls behind loses the
    /// oldest events and should then query the [`state`](Machine::state).
    fn events(&self) -> broadcast::Receiver<MachineEvent>;

    /// Opens a connection to an agent in the guest, ready for the agent's protocol. Some
    /// hypervisors serve one client of each channel at a time: a second client gets its first
    /// response once the first client has disconnected.
    ///
    /// # Errors
    /// [`Error::Agent`] if the agent cannot be reached, also if the machine was launched by a
    /// release that did not have the channel. A guest that is booting or has no agent may simply
    /// not respond.
    async fn channel(&self, channel: Channel) -> Result<UnixStream>;
}

/// A connection between the host and a program in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// `qemu-guest-agent`, which many images have.
    Qga,
    /// Scalebox's own agent, which speaks the protocol of [`scalebox_agent_api`].
    Agent,
}
