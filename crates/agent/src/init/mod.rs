//! From the start of the kernel to the root file system.
//!
//! The kernel runs the agent as `/init` of the initramfs. It loads the drivers of disk, network and
//! agent port, mounts the root file system that the kernel command line names, and starts a second
//! agent, which serves the host. Then it becomes process 1 of the guest: it runs the init of the
//! root file system, or does the work of an init itself if there is none.
//!
//! Modules are loaded here even for a root file system that has them: an imported image may not.
//! The other modules come with the kernel too, on a drive of their own.

mod agent_process;
mod command_line;
mod files;
mod modules;
mod network;
mod process1;
mod root;
mod seed;
mod switch;

use crate::transport;
use agent_process::ROOT;
use command_line::CommandLine;
use rustix::system::{RebootCommand, reboot};
use scalebox_agent_api::InitKind;
use std::convert::Infallible;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// OOM scores of a process that the kernel never kills for lack of memory, and of an ordinary one
/// (proc_pid_oom_score_adj(5)).
const NEVER_KILLED: &str = "-1000";
const DEFAULT_SCORE: &str = "0";

/// Boots the guest as process 1. On an error, reports it on the console and resets, because the
/// console has no input. QEMU restarts the machine, Firecracker ends it.
pub fn run() -> ! {
    let Err(error) = boot();
    eprintln!("scalebox-agent: {error}");
    rustix::fs::sync();
    // A process 1 that ends makes the kernel panic, which resets the machine as well.
    let _ = reboot(RebootCommand::Restart);
    std::process::exit(1)
}

fn boot() -> Result<Infallible, String> {
    root::mount_kernel_file_systems()?;
    // Inherited by the agent: the memory of the guest may be used up by its programs.
    set_oom_score(NEVER_KILLED);
    modules::load();
    let parameters = CommandLine::read()?;
    root::mount(&parameters, Path::new(ROOT))?;
    let init = choose_init(&parameters)?;
    if let Some(drive) = &parameters.modules {
        root::mount_modules(drive, Path::new(ROOT));
    }
    match init {
        InitKind::System => {
            agent_process::start_beside_init(open_port())?;
            set_oom_score(DEFAULT_SCORE);
            switch::to_root(Path::new(ROOT))?;
            let error = Command::new(&parameters.init).exec();
            Err(format!("cannot run {}: {error}", parameters.init.display()))
        }
        InitKind::Agent => {
            let facts = seed::read(Path::new(seed::DEVICE));
            let port = open_port();
            switch::to_root(Path::new(ROOT))?;
            process1::run(&facts, port)
        }
    }
}

/// Chooses process 1: the program that the command line names, or else the root file system's init,
/// if any.
fn choose_init(parameters: &CommandLine) -> Result<InitKind, String> {
    let exists = has_init(Path::new(ROOT), &parameters.init);
    match parameters.init_kind {
        Some(InitKind::Agent) => Ok(InitKind::Agent),
        Some(InitKind::System) if !exists => Err(format!(
            "the root file system on {} has no {}",
            parameters.device.display(),
            parameters.init.display()
        )),
        Some(InitKind::System) => Ok(InitKind::System),
        None if exists => Ok(InitKind::System),
        None => Ok(InitKind::Agent),
    }
}

/// Opens the agent's serial port, while `/dev` and `/sys` are there. A machine with a vsock has
/// none.
fn open_port() -> Option<OwnedFd> {
    match transport::port::open() {
        Ok(port) => port,
        Err(error) => {
            eprintln!("scalebox-agent: cannot open the agent port: {error}");
            None
        }
    }
}

/// Returns whether a root file system has an init that starts a system. Container images of Alpine
/// link `/sbin/init` to busybox, without the scripts that it would run.
fn has_init(root: &Path, init: &Path) -> bool {
    let Ok(program) = root::resolve(root, init) else {
        return false;
    };
    let is_busybox = program.file_name().is_some_and(|name| name == "busybox");
    let scripts = ["sbin/openrc", "etc/init.d/rcS"].map(|script| root.join(script).exists());
    program.exists() && (!is_busybox || scripts.contains(&true))
}

fn set_oom_score(score: &str) {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", score) {
        eprintln!("scalebox-agent: cannot set the OOM score to {score}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_busybox_without_scripts_is_not_an_init() {
        let root = tempfile::tempdir().unwrap();
        let (root, init) = (root.path(), Path::new("/sbin/init"));
        assert!(!has_init(root, init), "an empty root");
        for folder in ["bin", "sbin", "etc/init.d", "lib/systemd"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("bin/busybox"), "").unwrap();
        symlink("/bin/busybox", root.join("sbin/init")).unwrap();
        assert!(!has_init(root, init), "as in a container image");
        fs::write(root.join("etc/init.d/rcS"), "").unwrap();
        assert!(has_init(root, init), "with scripts");
        fs::remove_file(root.join("sbin/init")).unwrap();
        fs::write(root.join("lib/systemd/systemd"), "").unwrap();
        symlink("../lib/systemd/systemd", root.join("sbin/init")).unwrap();
        assert!(has_init(root, init), "systemd");
    }
}
