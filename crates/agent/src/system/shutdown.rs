//! Ends the guest: power-off or reset.
//!
//! An image's own init receives the request in the form that it supports. Where the agent is
//! process 1, it ends all processes, flushes and makes the file systems read-only itself.

use crate::blocking;
use crate::run_dir::{self, RunDir, Running};
use crate::server::Failure;
use rustix::fs::sync;
use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::system::{RebootCommand, reboot};
use scalebox_agent_api::InitKind;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Time for the response to leave the guest.
const DELAY: Duration = Duration::from_millis(100);
/// Maximum time that the main process has after its signal: that of `docker stop`.
const MAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time that the other processes have after SIGTERM.
const TERM_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval of the checks whether processes have ended.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// `SIGRTMIN+4` of systemd(1): starts `poweroff.target`. `SIGRTMIN` is 34, as the C library keeps
/// two of the kernel's signals for itself.
const SYSTEMD_POWER_OFF: i32 = 34 + 4;
/// `SIGRTMIN+5` of systemd(1): starts `reboot.target`.
const SYSTEMD_REBOOT: i32 = 34 + 5;

/// The way in which the guest is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// By a signal to process 1.
    Signal(i32),
    /// By a program.
    Program(&'static str),
    /// By the agent.
    Agent,
}

/// Begins the end of the guest, shortly after it returns.
///
/// # Errors
/// If no thread can be started.
pub(crate) fn begin(init: InitKind, is_reboot: bool) -> Result<(), Failure> {
    blocking::spawn(move || {
        sleep(DELAY);
        match choose(init, is_reboot, |path| Path::new(path).exists()) {
            Way::Signal(signal) => signal_init(signal),
            Way::Program(path) => {
                let run = Command::new(path)
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status();
                if !run.is_ok_and(|status| status.success()) {
                    signal_init(busybox_signal(is_reboot));
                }
            }
            Way::Agent => end(is_reboot),
        }
    })
}

fn choose(init: InitKind, is_reboot: bool, exists: impl Fn(&str) -> bool) -> Way {
    let program = if is_reboot { "/sbin/reboot" } else { "/sbin/poweroff" };
    match init {
        InitKind::Agent => Way::Agent,
        // sd_booted(3)
        InitKind::System if exists("/run/systemd/system") => Way::Signal(match is_reboot {
            true => SYSTEMD_REBOOT,
            false => SYSTEMD_POWER_OFF,
        }),
        InitKind::System if exists(program) => Way::Program(program),
        InitKind::System => Way::Signal(busybox_signal(is_reboot)),
    }
}

/// Returns the signal for BusyBox's init (`init/init.c`): SIGUSR2 for a power-off, SIGTERM for a
/// reset.
fn busybox_signal(is_reboot: bool) -> i32 {
    match is_reboot {
        true => Signal::TERM.as_raw(),
        false => Signal::USR2.as_raw(),
    }
}

fn signal_init(signal: i32) {
    // SAFETY: the number is not 0, and not one of the two that the C library reserves. This process
    // only sends it.
    let signal = unsafe { Signal::from_raw_unchecked(signal) };
    // An error cannot be reported any more: the host kills a machine that does not end itself.
    let _ = kill_process(Pid::INIT, signal);
}

/// Ends all processes and the machine, where the agent is process 1. Continues after errors: the
/// machine must end.
pub(crate) fn end(is_reboot: bool) {
    end_main(&RunDir::at(Path::new(run_dir::FOLDER)));
    signal_all(Signal::TERM);
    let deadline = Instant::now() + TERM_TIMEOUT;
    while Instant::now() < deadline && has_processes() {
        sleep(CHECK_INTERVAL);
    }
    signal_all(Signal::KILL);
    sync();
    for mount in scalebox_mounts::all().unwrap_or_default().iter().rev() {
        // A file system that still has writers stays writable, but it is flushed.
        let _ = mount_remount(&mount.target, MountFlags::RDONLY, c"");
    }
    sync();
    let command = match is_reboot {
        true => RebootCommand::Restart,
        false => RebootCommand::PowerOff,
    };
    let _ = reboot(command);
}

/// Asks the main process to end, by the signal that its image demands, and waits for it.
fn end_main(run_dir: &RunDir) {
    run_dir.mark_ending();
    let Some(Running { pid, stop_signal }) = run_dir.read_running() else {
        return;
    };
    // SAFETY: has no effect on the memory of this process.
    unsafe { libc::kill(-pid.as_raw_pid(), stop_signal) };
    let deadline = Instant::now() + MAIN_TIMEOUT;
    while Instant::now() < deadline && run_dir.read_running().is_some() {
        sleep(CHECK_INTERVAL);
    }
}

/// Sends a signal to all processes except this one. The "group 1" is -1 in kill(2), which stands
/// for all of them.
fn signal_all(signal: Signal) {
    let _ = kill_process_group(Pid::INIT, signal);
}

/// Returns `true` if a program runs besides this one. Kernel threads and ended processes have no
/// command line.
fn has_processes() -> bool {
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut processes = entries.filter(|entry| {
        let name = entry.file_name();
        name.as_encoded_bytes().iter().all(u8::is_ascii_digit) && name != own.as_str()
    });
    processes.any(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_init_is_asked_in_its_own_way() {
        let systemd = |path: &str| ["/run/systemd/system", "/sbin/poweroff", "/sbin/reboot"].contains(&path);
        let openrc = |path: &str| ["/sbin/poweroff", "/sbin/reboot"].contains(&path);
        let bare = |_: &str| false;
        assert_eq!(choose(InitKind::System, false, systemd), Way::Signal(38));
        assert_eq!(choose(InitKind::System, true, systemd), Way::Signal(39));
        assert_eq!(choose(InitKind::System, false, openrc), Way::Program("/sbin/poweroff"));
        assert_eq!(choose(InitKind::System, true, openrc), Way::Program("/sbin/reboot"));
        assert_eq!(choose(InitKind::System, false, bare), Way::Signal(12));
        assert_eq!(choose(InitKind::System, true, bare), Way::Signal(15));
        assert_eq!(choose(InitKind::Agent, true, systemd), Way::Agent);
    }

    #[test]
    fn other_processes_are_seen() {
        assert!(has_processes());
    }

    #[test]
    fn the_main_process_gets_its_signal_and_the_time_to_end() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(folder.path());
        let script = "trap 'echo quit > ended; exit 0' QUIT; : > ready; while :; do sleep 0.05; done";
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", script]).current_dir(&folder);
        let mut main = std::os::unix::process::CommandExt::process_group(&mut shell, 0)
            .spawn()
            .unwrap();
        while !folder.path().join("ready").exists() {
            std::thread::yield_now();
        }
        let running = Running {
            pid: Pid::from_child(&main),
            stop_signal: libc::SIGQUIT,
        };
        run_dir.write_running(running).unwrap();
        // As the agent does, which is its parent.
        let reaped = std::thread::spawn(move || main.wait().unwrap());
        end_main(&run_dir);
        assert!(reaped.join().unwrap().success());
        assert!(run_dir.is_ending());
        assert_eq!(fs::read_to_string(folder.path().join("ended")).unwrap(), "quit\n");
    }
}
