//! Identifies a process by pidfd and start time, never by pid alone.
//!
//! Pids are reused; pidfds are not (pidfd_open(2)). To get from a recorded pid to a pidfd of the
//! same process: first open the pidfd, then compare the start time and arguments of the pid's
//! current owner with the record, then check that the pidfd's process is still alive. If it is, it
//! owned the pid all along, and the comparison was about that process.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, setrlimit, waitid,
};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::OnceLock;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Limit on open files of a machine's process, which needs about 40.
pub(crate) const MAX_OPEN_FILES: u64 = 256;

/// Identifies a process uniquely, even after its end. Part of a machine's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub pid: i32,
    /// Start of the process in clock ticks since boot: field 22 of `/proc/PID/stat` (proc(5)).
    pub started: u64,
    /// Id of the kernel's boot, which the ticks refer to.
    pub boot_id: String,
    /// The whole argument vector, as in `/proc/PID/cmdline`.
    pub argv: Vec<String>,
}

/// A process that was alive when this value was created.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    /// The exit status, once it was collected.
    status: OnceLock<String>,
}

impl Process {
    /// Opens a child that has not been waited for, so that its pid cannot have been reused.
    pub(crate) fn of_child(child: &Child) -> io::Result<Process> {
        Process::open(Pid::from_child(child))
    }

    /// Returns the recorded process if it is still alive.
    pub(crate) fn find(identity: &Identity) -> io::Result<Option<Process>> {
        let Some(process) = Process::open_raw(identity.pid)? else {
            return Ok(None);
        };
        let same = Identity::read(identity.pid).is_some_and(|found| found == *identity);
        Ok((process.is_alive() && same).then_some(process))
    }

    /// Returns a living process whose arguments include all of `arguments`, if there is one.
    pub(crate) fn search(arguments: &[String]) -> io::Result<Option<Process>> {
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Some(process) = Process::open_raw(pid)? else {
                continue;
            };
            let found =
                Identity::read(pid).is_some_and(|found| arguments.iter().all(|argument| found.argv.contains(argument)));
            if found && process.is_alive() {
                return Ok(Some(process));
            }
        }
        Ok(None)
    }

    fn open_raw(pid: i32) -> io::Result<Option<Process>> {
        let Some(pid) = Pid::from_raw(pid) else { return Ok(None) };
        match Process::open(pid) {
            Ok(process) => Ok(Some(process)),
            // ESRCH: there is no such process. EINVAL: the id belongs to a thread.
            Err(error)
                if [Errno::SRCH, Errno::INVAL]
                    .iter()
                    .any(|gone| error.raw_os_error() == Some(gone.raw_os_error())) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn open(pid: Pid) -> io::Result<Process> {
        let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        // SAFETY: an `OwnedFd` refers to the same open file until it is dropped, and nothing takes
        // it out of the `AsyncFd` before.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Process {
            pid,
            pidfd,
            status: OnceLock::new(),
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Returns the argument vector, once the process has executed its program.
    pub(crate) fn arguments(&self) -> io::Result<Vec<String>> {
        let found = Identity::read(self.pid()).map(|identity| identity.argv);
        found.ok_or_else(|| io::Error::other(format!("process {} has no arguments in /proc", self.pid())))
    }

    /// Returns the identity, for the record, of a process started with `argv`. The arguments are
    /// not read from /proc: right after the start the kernel does not show any.
    pub(crate) fn identity(&self, argv: Vec<String>) -> io::Result<Identity> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        let started = start_time(&stat).ok_or_else(|| io::Error::other(format!("no start time in {stat:?}")))?;
        Ok(Identity {
            pid: self.pid(),
            started,
            boot_id: boot_id()?,
            argv,
        })
    }

    /// Limits the open files of the calling process, and disables core dumps, which would contain
    /// guest memory. Makes two system calls, so it is safe in a child between fork and exec.
    /// Setting the limits from outside would race with the child's change of account, after which
    /// only `CAP_SYS_RESOURCE` may set them.
    pub(crate) fn bound_self() -> rustix::io::Result<()> {
        for (resource, limit) in [(Resource::Nofile, MAX_OPEN_FILES), (Resource::Core, 0)] {
            let limits = Rlimit {
                current: Some(limit),
                maximum: Some(limit),
            };
            setrlimit(resource, limits)?;
        }
        Ok(())
    }

    /// Waits until the process has ended. May be awaited concurrently, and also after the end.
    pub(crate) async fn exited(&self) {
        if self.pidfd.readable().await.is_err() {
            // Happens only when the runtime shuts down, which drops this future.
            std::future::pending::<()>().await;
        }
    }

    /// Sends SIGKILL. Does nothing if the process has ended.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Collects the exit status of an ended child as text. Returns `None` if the status is not
    /// available: the process is not a child of this one (after an adoption).
    pub(crate) fn reap(&self) -> Option<String> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        // An error means that the process is not a child, or was reaped before.
        if let Ok(Some(status)) = waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            self.status
                .get_or_init(|| match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("exit status {code}"),
                    (_, Some(signal)) => format!("killed by signal {signal}"),
                    _ => "ended".to_owned(),
                });
        }
        self.status.get().cloned()
    }

    /// Returns whether the process is still alive.
    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let alive = poll(&mut fds, Some(&now)) == Ok(0);
        if !alive {
            // Reap it, in case it is a child whose end went unnoticed: otherwise it stays a zombie.
            self.reap();
        }
        alive
    }
}

impl Identity {
    /// Reads the identity of the pid's current owner; `None` if there is none, or it has ended.
    ///
    /// Not with the crate `procfs` (0.18): it drops empty arguments, and rejects those that are not
    /// UTF-8.
    fn read(pid: i32) -> Option<Identity> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let cmdline = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let text = |argument: &[u8]| String::from_utf8_lossy(argument).into_owned();
        let argv = cmdline
            .strip_suffix(b"\0")?
            .split(|&byte| byte == 0)
            .map(text)
            .collect();
        Some(Identity {
            pid,
            started: start_time(&stat)?,
            boot_id: boot_id().ok()?,
            argv,
        })
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Returns the start time in a line of `/proc/PID/stat`. The second field is the process name in
/// parentheses. It may contain anything, including parentheses, so fields are counted from the last
/// one.
fn start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    // Here the first field is the third of the line; the start time is the 22nd.
    fields.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A child that is killed on drop.
    struct Sleeper(Child);

    impl Sleeper {
        fn new() -> Sleeper {
            Sleeper(Command::new("sleep").arg("600").spawn().unwrap())
        }

        fn identity(&self) -> Identity {
            let argv = ["sleep", "600"].map(str::to_owned).to_vec();
            Process::of_child(&self.0).unwrap().identity(argv).unwrap()
        }

        /// Waits until the kernel shows the child's arguments.
        fn wait_for_arguments(&self) {
            while Identity::read(self.0.id() as i32).is_none() {
                std::thread::yield_now();
            }
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[tokio::test]
    async fn a_reused_pid_is_not_the_recorded_process() {
        let sleeper = Sleeper::new();
        let recorded = sleeper.identity();
        sleeper.wait_for_arguments();
        assert!(Process::find(&recorded).unwrap().is_some());

        let earlier = Identity {
            started: recorded.started - 1,
            ..recorded.clone()
        };
        assert!(Process::find(&earlier).unwrap().is_none(), "another start time");
        let rebooted = Identity {
            boot_id: "another".into(),
            ..recorded.clone()
        };
        assert!(Process::find(&rebooted).unwrap().is_none(), "another boot");
        let other = Identity {
            argv: vec!["sleep".into(), "601".into()],
            ..recorded
        };
        assert!(Process::find(&other).unwrap().is_none(), "another program");
    }

    #[tokio::test]
    async fn a_dead_process_is_not_found_and_exited_resolves_repeatedly() {
        let mut sleeper = Sleeper::new();
        let process = Process::of_child(&sleeper.0).unwrap();
        let recorded = sleeper.identity();
        process.kill().unwrap();
        process.exited().await;
        process.exited().await;
        assert_eq!(process.reap().unwrap(), "killed by signal 9");
        assert!(process.kill().is_ok());
        assert!(Process::find(&recorded).unwrap().is_none());
        assert!(sleeper.0.try_wait().is_err(), "reaped above");
    }

    #[test]
    fn the_start_time_is_parsed_after_any_process_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(start_time(&format!("12 (a) b (c)) {rest}")), Some(4711));
        assert_eq!(start_time("12 (a"), None);
    }
}
