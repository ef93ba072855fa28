//! The errors of this crate.

use crate::state::ExitReason;
use scalebox_units::VmId;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error of launching, adopting or controlling a machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The hypervisor is not installed.
    #[error("{program} is not on the PATH")]
    NotInstalled {
        /// The missing program.
        program: &'static str,
        /// The Debian package that contains it.
        package: &'static str,
    },
    /// Firecracker, or its jailer, is not installed.
    #[error("{0} is not on the PATH")]
    NoFirecracker(&'static str),
    /// The machine was launched by another driver.
    #[error("{id} runs under another hypervisor ({program})")]
    Foreign {
        /// The machine.
        id: VmId,
        /// The program that runs the machine.
        program: String,
    },
    /// The installed hypervisor cannot be used.
    #[error("{program} cannot be used: {why}")]
    Unusable {
        /// Path of the program.
        program: String,
        /// The reason: the found and the required version, or the whole output of a failed program.
        why: String,
    },
    /// The installed Firecracker needs libraries, which its jail lacks.
    #[error("{} cannot be used: it is dynamically linked, and its jail has no libraries", .0.display())]
    DynamicallyLinked(PathBuf),
    /// The jailer cannot create device files or run a program in the folder of the jails.
    #[error("jailer cannot be used: {} is mounted with nodev or noexec", .0.display())]
    UnfitJails(PathBuf),
    /// KVM is required, but `/dev/kvm` does not open.
    #[error("KVM is required, but {why}")]
    NoKvm {
        /// The error from opening `/dev/kvm`.
        why: String,
    },
    /// The specification is invalid; a retry would fail too.
    #[error("{id}: {what}: {why}")]
    Spec {
        /// The machine.
        id: VmId,
        /// The field of the [`MachineSpec`](crate::MachineSpec), or the argument.
        what: &'static str,
        /// The problem, and the valid values.
        why: String,
    },
    /// The installed Firecracker cannot boot the kernel image.
    #[error(
        "{id}: kernel: {} is not an ELF image, and Firecracker {version} boots no other format ({min} and later do)",
        kernel.display()
    )]
    KernelFormat {
        /// The machine.
        id: VmId,
        /// The kernel image.
        kernel: PathBuf,
        /// The installed version.
        version: String,
        /// The first version that boots other formats.
        min: String,
    },
    /// The machine is already running, or another process holds it.
    #[error("{id} is already running{}", pid.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Running {
        /// The machine.
        id: VmId,
        /// The id of the machine's process, if known.
        pid: Option<i32>,
    },
    /// The launch failed; all its traces are removed.
    #[error("cannot launch {id}: {why}{}", output_suffix(output))]
    Launch {
        /// The machine.
        id: VmId,
        /// The cause.
        why: String,
        /// The whole output of the hypervisor on stderr.
        output: String,
    },
    /// The hypervisor rejected a command, or the connection to it broke.
    #[error("{id}: {command}: {why}")]
    Control {
        /// The machine.
        id: VmId,
        /// The command, as the hypervisor names it.
        command: &'static str,
        /// The hypervisor's response, or the error of the connection.
        why: String,
    },
    /// The guest agent cannot be reached.
    #[error("{id}: cannot reach the guest agent: {why}")]
    Agent {
        /// The machine.
        id: VmId,
        /// The error from connecting.
        why: String,
    },
    /// The hypervisor did not respond in time: it hangs, or the host is overloaded. The command may
    /// still take effect.
    #[error("{id}: the hypervisor did not respond to {command} within {after:?}")]
    Hung {
        /// The machine.
        id: VmId,
        /// The command, as the hypervisor names it.
        command: &'static str,
        /// The timeout.
        after: Duration,
    },
    /// The process was killed but has not exited. The kernel keeps it, most often because of a disk
    /// request that the host's storage does not complete.
    #[error("{id}: process {pid} was killed but did not exit within {after:?}")]
    Unkillable {
        /// The machine.
        id: VmId,
        /// The id of the machine's process.
        pid: i32,
        /// The timeout.
        after: Duration,
    },
    /// The machine has ended.
    #[error("{id} has ended: {reason}")]
    Ended {
        /// The machine.
        id: VmId,
        /// The reason.
        reason: ExitReason,
    },
    /// A file operation or system call failed.
    #[error("cannot {what} {path}: {source}", path = path.display())]
    Io {
        /// The operation, such as `create`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

impl Error {
    /// Returns a function for `map_err`, which adds the operation and the file.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { what, path, source }
    }

    /// Returns the error of a running hypervisor that accepts no connection.
    pub(crate) fn unreachable(id: &VmId, after: Duration) -> Error {
        Error::Hung {
            id: id.clone(),
            command: "a new connection",
            after,
        }
    }

    /// Returns the error of a failed launch, with the hypervisor's output.
    pub(crate) fn launch(id: &VmId, why: impl ToString, output: &str) -> Error {
        Error::Launch {
            id: id.clone(),
            why: why.to_string(),
            output: output.to_owned(),
        }
    }
}

fn output_suffix(output: &str) -> String {
    match output.trim() {
        "" => String::new(),
        text => format!("; hypervisor output:\n{text}"),
    }
}
