//! What can go wrong, and the way out.

use crate::machine::{ExitReason, MachineId};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a machine could not be launched, adopted or controlled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The hypervisor is not installed.
    #[error("{program} is not on the PATH: install it (Debian: apt-get install qemu-system-x86)")]
    NotInstalled {
        /// The program looked for.
        program: &'static str,
    },
    /// `VMM=firecracker` without Firecracker.
    #[error("{0} is not on the PATH: install a release of Firecracker there, or set VMM=auto or qemu")]
    NoFirecracker(&'static str),
    /// Another driver launched the machine.
    #[error("{id} runs under another hypervisor ({program}): set VMM back, stop it, then change VMM")]
    Foreign {
        /// The machine.
        id: MachineId,
        /// The program that runs it.
        program: String,
    },
    /// The hypervisor is there but cannot be used.
    #[error("{program} cannot be used: {why}")]
    Unusable {
        /// The program, with its path.
        program: String,
        /// What was found, what is needed, and the program's whole output where it failed.
        why: String,
    },
    /// `ACCEL=kvm` where KVM does not open.
    #[error("ACCEL=kvm, but {why}: load the kvm module, or set ACCEL=auto or tcg")]
    NoKvm {
        /// What opening `/dev/kvm` said.
        why: String,
    },
    /// The request itself cannot be met, on any attempt.
    #[error("{id}: {what}: {why}")]
    Spec {
        /// The machine.
        id: MachineId,
        /// The field of the [`MachineSpec`](crate::MachineSpec), or the argument.
        what: &'static str,
        /// What was wrong with it and what would be right.
        why: String,
    },
    /// Not the form of a machine's id.
    #[error("{0:?} is not the id of a machine: it is vm- and 12 hex digits in lower case")]
    Id(String),
    /// The machine runs already, or another daemon holds it.
    #[error("{id} is running already{}: adopt it, or stop it first", pid.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Running {
        /// The machine.
        id: MachineId,
        /// Its process, where it is known.
        pid: Option<i32>,
    },
    /// The hypervisor did not start the machine; nothing of it is left.
    #[error("{id} could not be launched: {why}{}", said(output))]
    Launch {
        /// The machine.
        id: MachineId,
        /// The step that failed.
        why: String,
        /// All that the hypervisor wrote on stderr.
        output: String,
    },
    /// The hypervisor refused a command, or the line to it broke.
    #[error("{id}: {command}: {why}")]
    Control {
        /// The machine.
        id: MachineId,
        /// The command, in the hypervisor's words.
        command: &'static str,
        /// What it answered.
        why: String,
    },
    /// The guest agent cannot be reached.
    #[error("{id}: the guest agent cannot be reached: {why}")]
    Agent {
        /// The machine.
        id: MachineId,
        /// What connecting to it said.
        why: String,
    },
    /// The hypervisor did not answer in time: it hangs, or the host is badly overloaded. The
    /// command may still take effect.
    #[error("{id}: the hypervisor did not answer {command} within {after:?}: try again, or kill the machine")]
    Hung {
        /// The machine.
        id: MachineId,
        /// The command, in the hypervisor's words.
        command: &'static str,
        /// The deadline that passed.
        after: Duration,
    },
    /// The process was killed and is still there: the kernel does not let go of it, most often
    /// because of a disk request that the host's storage does not answer.
    #[error(
        "{id}: process {pid} was killed and has not ended within {after:?}: the host's storage may be stuck (dmesg); try again"
    )]
    Unkillable {
        /// The machine.
        id: MachineId,
        /// Its process.
        pid: i32,
        /// The deadline that passed.
        after: Duration,
    },
    /// The machine has ended.
    #[error("{id} has ended: {reason}")]
    Ended {
        /// The machine.
        id: MachineId,
        /// How.
        reason: ExitReason,
    },
    /// The host's file system or kernel said no.
    #[error("{what} {path}: {source}", path = path.display())]
    Io {
        /// What was tried, such as `create`.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: what was tried on which file.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { what, path, source }
    }
}

fn said(output: &str) -> String {
    match output.trim() {
        "" => String::new(),
        text => format!("; it said:\n{text}"),
    }
}
