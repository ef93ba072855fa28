//! The process that serves the host.

use crate::init::files::read;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The folder on which the root file system is mounted before it becomes the root.
pub(crate) const ROOT: &str = "/root";

/// The name of the serving agent in `ps`. The `@` keeps systemd from killing it during a shutdown,
/// before the file systems are unmounted ("Root Storage Daemons" of systemd).
const NAME: &str = "@scalebox-agent";

/// Starts the agent in the initramfs, beside the init of the root file system. Its root is the root
/// file system from its first step on.
pub(crate) fn start_beside_init(port: Option<OwnedFd>) -> Result<(), String> {
    let mut command = Command::new("/init");
    command.current_dir(ROOT).args(["serve", "--init=system"]);
    spawn(command, port)
}

/// Starts the agent of a guest without an init from this process' own program: the initramfs is
/// gone.
pub(crate) fn start(port: Option<OwnedFd>) -> Result<(), String> {
    let mut command = Command::new("/proc/self/exe");
    command.current_dir("/").args(["serve", "--init=agent"]);
    spawn(command, port)
}

fn spawn(mut command: Command, port: Option<OwnedFd>) -> Result<(), String> {
    if let Some(port) = &port {
        // The port is passed on: `/sys`, where it could be found, is not mounted yet in the root.
        let flags = rustix::io::FdFlags::empty();
        rustix::io::fcntl_setfd(port, flags).map_err(|error| format!("cannot pass on the agent port: {error}"))?;
        command.arg(format!("--port={}", port.as_raw_fd()));
    }
    let started = command.arg0(NAME).spawn();
    started
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
