//! What a driver has to do for a machine, and in which order it is asked.
//!
//! ```text
//!             launch                     pause
//!   (nothing) ──────▶ Running ◀────────────────────▶ Paused
//!                      │  ▲               resume       │
//!       host refuses   │  │ resume                     │
//!       a disk request ▼  │ (the request is repeated)  │
//!                     Stalled                          │
//!                      │                               │
//!                      └──────┬────────────────────────┘
//!                             │ guest powers off · stop · kill · crash, from any state
//!                             ▼
//!                       Ended(reason)      final: a new launch makes a new Machine
//! ```
//!
//! A machine belongs to the host, not to the process that launched it: that process may die or be
//! replaced at any moment, and the next one calls [`Vmm::adopt`]. A handle ([`Machine`]) is how one
//! process holds a machine; there is one at a time. Dropping the last reference to it lets go of
//! the machine, which runs on (its console is then not recorded).
//!
//! [`Vmm::put_down`] stands outside the picture: it leads from any state, and from a launch that
//! was interrupted, to *(nothing)*. It takes no handle and asks the hypervisor nothing, so that it
//! is the way out where [`Vmm::adopt`] fails with [`Error::Hung`]. Of a machine that somebody holds
//! it keeps its hands off: that one is the holder's to [`kill`](Machine::kill).

use crate::{Error, Result};
use async_trait::async_trait;
use scalebox_units::{Bytes, DiskLocation};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::broadcast;

/// A hypervisor that can run machines: a driver.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// The driver's name, as in the setting `VMM`.
    fn name(&self) -> &'static str;

    /// The most processors that it gives to one machine.
    fn max_vcpus(&self) -> u32;

    /// Whether it can launch machines. One whose program is missing adopts and ends those that were
    /// launched before.
    fn can_launch(&self) -> bool;

    /// Starts a machine; its guest is running when this returns (not: has booted).
    ///
    /// Before: the disk, seed drive, tap, kernel and initramfs exist. `run_dir` may be missing; its
    /// parent exists. After success: the machine is [`MachineState::Running`] and no longer depends
    /// on this process. After an error: no process and no file of it is left; the disk and tap are
    /// as they were.
    ///
    /// Cancellation: dropping the future undoes the launch in the background, as an error would.
    ///
    /// # Errors
    /// [`Error::Running`] when the machine runs already or another process holds it;
    /// [`Error::Spec`] for a field that cannot be right; [`Error::Launch`] with everything that the
    /// hypervisor said.
    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>>;

    /// Takes over a machine that an earlier process launched.
    ///
    /// `Some`: it is there, in any state; also [`MachineState::Ended`] when the guest powered
    /// itself off while nobody looked, in which case the reason is known. `None`: it is gone, how
    /// is not known ([`ExitReason::Unknown`]), and its leftovers are removed. A launch that was
    /// interrupted half-way is undone, which gives `None` too.
    ///
    /// Cancellation: nothing is lost; call it again.
    ///
    /// # Errors
    /// [`Error::Running`] when a process (this one included) still holds the machine;
    /// [`Error::Hung`] when the hypervisor is alive but does not answer: it is left as it is, held
    /// by nobody, to be adopted later or [`put_down`](Vmm::put_down). [`Error::Unkillable`] as
    /// there, where an interrupted launch cannot be undone.
    async fn adopt(&self, id: &MachineId, run_dir: &Path) -> Result<Option<Arc<dyn Machine>>>;

    /// Ends whatever an earlier process left of a machine that nobody holds, without asking the
    /// hypervisor anything: one that hangs or is stopped (SIGSTOP) goes like any other, and so does
    /// a launch that was interrupted half-way. As pulling the plug: what the guest has not flushed
    /// is lost.
    ///
    /// It demands the same proof as [`adopt`](Vmm::adopt) that a process is the machine's (where
    /// there is a record: pid, start time, boot and arguments), and kills through a pidfd; whoever
    /// else has the pid by now is safe.
    ///
    /// Before: `run_dir` may be missing; its parent exists. After success: no process and no file
    /// of the machine is left. `true`: there was a process. `false`: there was none.
    ///
    /// Cancellation: a kill that was sent is not taken back, the files may remain; call it again.
    ///
    /// # Errors
    /// [`Error::Running`] when a process (this one included) holds the machine;
    /// [`Error::Unkillable`] when its process does not end within 10 s of being killed: its files
    /// stay, for the next attempt.
    async fn put_down(&self, id: &MachineId, run_dir: &Path) -> Result<bool>;
}

/// A machine that was launched or adopted. Every method may be called at any time, by several
/// callers at once.
///
/// Each command has a deadline: a hypervisor that hangs gives [`Error::Hung`], and
/// [`kill`](Machine::kill) works all the same. On a machine that has ended, commands give
/// [`Error::Ended`], except [`stop`](Machine::stop), [`kill`](Machine::kill) and
/// [`exited`](Machine::exited), which give the reason. A dropped future may or may not have had its
/// effect, unless said otherwise.
#[async_trait]
pub trait Machine: Send + Sync {
    /// The machine's id.
    fn id(&self) -> &MachineId;

    /// The hypervisor's process. For eyes and for cgroups: by the time it is used, the process may
    /// have ended.
    fn pid(&self) -> i32;

    /// What the machine is doing now, asked of the hypervisor.
    async fn state(&self) -> Result<MachineState>;

    /// Stops the guest's processors; its memory and disk stay. On a paused machine: nothing.
    async fn pause(&self) -> Result<()>;

    /// Lets a paused or stalled guest go on; a stalled one repeats the disk request that the host
    /// refused, and stalls again if that is refused again. On a running machine: nothing.
    async fn resume(&self) -> Result<()>;

    /// Makes the root disk `size` large, seen by the running guest at once (its file system is the
    /// guest's to grow). Calls are put in order; a disk never gets smaller.
    ///
    /// # Errors
    /// [`Error::Spec`] when `size` is below the disk's size, or below the largest size asked for
    /// before, or not in sectors of 512 bytes.
    async fn resize_root(&self, size: Bytes) -> Result<()>;

    /// Whether the guest can give back blocks of its root disk that it does not use: its discards
    /// reach the disk's file.
    fn takes_discards(&self) -> bool;

    /// Limits what the guest may ask of its root disk from now on; no limit where there is none in
    /// `limits`. What is beyond waits.
    async fn limit_disk(&self, limits: DiskLimits) -> Result<()>;

    /// Asks the guest to shut down, again and again until `grace` has passed, then kills it. A
    /// paused guest is resumed for it. Returns how the machine ended: [`ExitReason::GuestShutdown`]
    /// when it obeyed, [`ExitReason::Killed`] when it had to be killed, something else when it
    /// ended by itself in between.
    ///
    /// Cancellation: a shutdown that was asked for is not taken back; the kill is no longer going
    /// to happen.
    async fn stop(&self, grace: Duration) -> Result<ExitReason>;

    /// Ends the machine now, as pulling the plug does: what the guest has not flushed is lost.
    /// Returns how it ended. Works whatever the hypervisor is doing.
    async fn kill(&self) -> Result<ExitReason>;

    /// Waits for the machine's end. May be awaited many times, also after the end. By then its
    /// files in `run_dir` are gone and the console's last words are in the log.
    async fn exited(&self) -> ExitReason;

    /// What happens to the machine from now on. A receiver that falls behind loses the oldest: ask
    /// [`state`](Machine::state).
    fn events(&self) -> broadcast::Receiver<MachineEvent>;

    /// A new connection to the guest agent, whose protocol is spoken from its first byte on. Under
    /// some hypervisors there is one client at a time: whoever connects second waits for its first
    /// answer until the first has left.
    ///
    /// # Errors
    /// [`Error::Agent`] when nobody can be reached; a guest that boots or has no agent may show by
    /// its silence only.
    async fn agent(&self) -> Result<UnixStream>;
}

/// Everything a machine is made of. It names what exists; nothing is made but what is in `run_dir`.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// Unique on this host.
    pub id: MachineId,
    /// At least 1.
    pub vcpus: u32,
    /// In MiB; at least [`MIN_MEMORY_MIB`].
    pub memory_mib: u64,
    /// A kernel that the hypervisor boots directly.
    pub kernel: PathBuf,
    /// Its initramfs, where it needs one.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, at most [`MAX_CMDLINE`] bytes. The console is `ttyS0`.
    pub cmdline: String,
    /// The root disk, the guest's first: `/dev/vda`.
    pub root: DiskLocation,
    /// What the guest may ask of it.
    pub root_limits: DiskLimits,
    /// The seed drive, read-only, the guest's second.
    pub seed: PathBuf,
    /// The network interface.
    pub nic: Nic,
    /// Sockets and the record by which the machine is found again. Made when missing, mode 0700,
    /// belonging to the machine alone. Short: a socket's path has at most 107 bytes, of which this
    /// crate needs [`SOCKET_NAME_MAX`].
    pub run_dir: PathBuf,
    /// Where the console is recorded, with one older part next to it (`….1`); see
    /// [`CONSOLE_LIMIT`](crate::CONSOLE_LIMIT).
    pub console_log: PathBuf,
    /// The account that the hypervisor runs as, once it has opened its files. `None`: the account
    /// of this process.
    pub run_as: Option<RunAs>,
}

/// The least memory a machine gets, in MiB.
pub const MIN_MEMORY_MIB: u64 = 32;
/// The longest kernel command line, in bytes: `COMMAND_LINE_SIZE` of the x86 kernel, less its final
/// zero.
pub const MAX_CMDLINE: usize = 2047;
/// The longest path of a Unix socket, in bytes: `sun_path` less its final zero (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// What this crate puts behind `run_dir` to name a socket, in bytes, at most.
pub const SOCKET_NAME_MAX: usize = 16;

impl MachineSpec {
    /// Finds what cannot be right before anything is made.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |what, why: String| {
            Err(Error::Spec {
                id: self.id.clone(),
                what,
                why,
            })
        };
        if self.vcpus == 0 {
            return wrong("vcpus", "a machine needs at least 1".into());
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return wrong(
                "memory_mib",
                format!("{} is too little, at least {MIN_MEMORY_MIB}", self.memory_mib),
            );
        }
        if self.cmdline.len() > MAX_CMDLINE {
            return wrong(
                "cmdline",
                format!("has {} bytes, at most {MAX_CMDLINE}", self.cmdline.len()),
            );
        }
        if self.run_dir.as_os_str().len() + SOCKET_NAME_MAX > SOCKET_PATH_MAX {
            let most = SOCKET_PATH_MAX - SOCKET_NAME_MAX;
            return wrong(
                "run_dir",
                format!(
                    "{} is too long for sockets, at most {most} bytes",
                    self.run_dir.display()
                ),
            );
        }
        if !is_interface_name(&self.nic.tap) {
            return wrong(
                "nic.tap",
                format!("{:?} is not the name of a network interface", self.nic.tap),
            );
        }
        if !is_unicast_mac(&self.nic.mac) {
            return wrong(
                "nic.mac",
                format!("{:?} is not a unicast address such as 52:54:00:12:34:56", self.nic.mac),
            );
        }
        Ok(())
    }
}

/// At most 15 bytes (`IFNAMSIZ`), and nothing that means something in a hypervisor's option.
fn is_interface_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=15).contains(&name.len()) && name.bytes().all(plain) && name.bytes().any(|byte| byte != b'.')
}

fn is_unicast_mac(mac: &str) -> bool {
    let bytes: Vec<&str> = mac.split(':').collect();
    let hex = |byte: &&str| byte.len() == 2 && byte.bytes().all(|digit| digit.is_ascii_hexdigit());
    bytes.len() == 6
        && bytes.iter().all(hex)
        && u8::from_str_radix(bytes[0], 16).is_ok_and(|first| first & 1 == 0)
        && mac != "00:00:00:00:00:00"
}

/// A machine's network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// The host's end: a tap that exists.
    pub tap: String,
    /// The guest's address, `52:54:00:12:34:56`.
    pub mac: String,
}

/// How much a guest may ask of a disk, reading and writing together. A second's worth may come at
/// once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Requests a second; at least 1.
    pub iops: Option<u32>,
    /// Bytes a second.
    pub bytes_per_second: Option<u64>,
}

/// An account by its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunAs {
    /// User.
    pub uid: u32,
    /// Group; the only one.
    pub gid: u32,
}

/// A machine's id: `vm-` and 12 hex digits in lower case, so that it may stand in a path, an
/// argument and a process' title.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineId(String);

impl MachineId {
    /// The id's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for MachineId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let hex = |digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
        match text.strip_prefix("vm-") {
            Some(digits) if digits.len() == 12 && digits.bytes().all(hex) => Ok(MachineId(text.to_owned())),
            _ => Err(Error::Id(text.to_owned())),
        }
    }
}

impl TryFrom<String> for MachineId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<MachineId> for String {
    fn from(id: MachineId) -> String {
        id.0
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What a machine is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineState {
    /// The guest runs.
    Running,
    /// The guest stands still because it was asked to.
    Paused,
    /// The guest stands still because the host refused a disk request (most often: no space). It
    /// does not know; resuming repeats the request.
    Stalled,
    /// The machine is gone.
    Ended(ExitReason),
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off: its file systems are clean. Also when it rebooted, under a
    /// hypervisor that cannot restart a guest in place.
    GuestShutdown,
    /// Killed on request, or told to end by a signal or command from outside.
    Killed,
    /// The hypervisor died by itself.
    Crashed {
        /// How, and its last words.
        detail: String,
    },
    /// It ended while nobody was looking.
    Unknown,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::GuestShutdown => f.write_str("the guest shut down"),
            ExitReason::Killed => f.write_str("it was killed"),
            ExitReason::Crashed { detail } => write!(f, "the hypervisor died: {detail}"),
            ExitReason::Unknown => f.write_str("it ended while nobody was looking"),
        }
    }
}

/// Something that happened to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MachineEvent {
    /// The guest's processors stopped: a pause, a stall, or the end.
    Stopped,
    /// They run again.
    Resumed,
    /// The guest restarted itself. The machine goes on; a guest that does this every few seconds is
    /// stuck in a loop.
    GuestReboot,
    /// A program in the guest listens at the agent's port: its system is up. Some hypervisors do
    /// not tell.
    AgentUp,
    /// The guest powered itself off; [`MachineEvent::Ended`] follows.
    GuestShutdown,
    /// The host refused a disk request and the guest now stands still ([`MachineState::Stalled`]).
    IoError {
        /// For lack of space: resume when there is some.
        nospace: bool,
        /// The host's word.
        reason: String,
    },
    /// The machine is gone.
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
                mac: "52:54:00:12:34:56".into(),
            },
            run_dir: "/run/scaleboxd/vms/vm-0123456789ab".into(),
            console_log: "/c".into(),
            run_as: None,
        }
    }

    #[test]
    fn an_id_has_one_form() {
        assert!("vm-0123456789ab".parse::<MachineId>().is_ok());
        for wrong in [
            "",
            "vm-",
            "vm-0123456789a",
            "vm-0123456789abc",
            "vm-0123456789AB",
            "vm-../456789ab",
            "VM-0123456789ab",
        ] {
            assert!(
                wrong
                    .parse::<MachineId>()
                    .unwrap_err()
                    .to_string()
                    .contains("12 hex digits"),
                "{wrong}"
            );
        }
    }

    #[test]
    fn what_cannot_be_right_is_named_before_anything_is_made() {
        spec().check().unwrap();
        type Break = fn(&mut MachineSpec);
        let wrong: [(&str, Break); 8] = [
            ("vcpus", |spec| spec.vcpus = 0),
            ("memory_mib", |spec| spec.memory_mib = 31),
            ("cmdline", |spec| spec.cmdline = "x".repeat(2048)),
            ("run_dir", |spec| spec.run_dir = "/x".repeat(46).into()),
            ("nic.tap", |spec| spec.nic.tap = "tap0,script=/x".into()),
            ("nic.tap", |spec| spec.nic.tap = "a-name-too-long-".into()),
            ("nic.mac", |spec| spec.nic.mac = "53:54:00:12:34:56".into()),
            ("nic.mac", |spec| spec.nic.mac = "52:54:00:12:34:5,".into()),
        ];
        for (field, break_it) in wrong {
            let mut spec = spec();
            break_it(&mut spec);
            match spec.check() {
                Err(Error::Spec { what, .. }) => assert_eq!(what, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
