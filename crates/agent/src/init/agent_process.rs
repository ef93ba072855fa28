//! The process that serves the host.

use crate::init::files::read;
use scalebox_agent_api::InitKind;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The folder on which the root file system is mounted before it becomes the root.
pub(crate) const ROOT: &str = "/root";

/// The name of the serving agent in `ps`. The `@` keeps systemd from killing it during a shutdown,
/// before the file systems are unmounted ("Root Storage Daemons" of systemd).
const NAME: &str = "@scalebox-agent";

/// Starts the agent that serves the host. Its root is the root file system from its first step on.
pub(crate) fn start(init: InitKind, port: Option<OwnedFd>) -> Result<(), String> {
    let mut command = Command::new("/init");
    command.arg0(NAME).arg("serve").current_dir(ROOT);
    command.arg(match init {
        InitKind::System => "--init=system",
        InitKind::Agent => "--init=agent",
    });
    if let Some(port) = &port {
        // The port is passed on: `/sys`, where it could be found, is not mounted yet in the root.
        let flags = rustix::io::FdFlags::empty();
        rustix::io::fcntl_setfd(port, flags).map_err(|error| format!("cannot pass on the agent port: {error}"))?;
        command.arg(format!("--port={}", port.as_raw_fd()));
    }
    command
        .spawn()
        .map(drop)
        .map_err(|error| format!("cannot start the agent: {error}"))
}

/// Returns whether a child with the agent's name runs.
pub(crate) fn runs() -> Result<bool, String> {
    let children = read("/proc/1/task/1/children")?;
    let is_agent =
        |pid: &str| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(NAME.as_bytes()));
    Ok(children.split_ascii_whitespace().any(is_agent))
}

/// Starts the agent again, from this process' own program: the initramfs is gone.
pub(crate) fn restart() -> Result<(), String> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).args(["serve", "--init=agent"]).current_dir("/");
    command
        .spawn()
        .map(drop)
        .map_err(|error| format!("cannot start the agent: {error}"))
}
