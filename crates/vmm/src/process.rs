//! A process by pidfd and start time, never by pid alone.
//!
//! A pid is reused; a pidfd is not (pidfd_open(2)). To get from a recorded pid to a pidfd of the
//! same process, the pidfd is opened first, then the start time and arguments of whoever has the
//! pid are compared with the record, then the pidfd is asked whether its process still lives. If it
//! does, it had the pid all along, and the comparison was about it.

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
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The most files a machine's process may hold open; it needs about 40.
pub(crate) const OPEN_FILES: u64 = 256;

/// What tells a process from all others, also after it is gone: kept in the record of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub pid: i32,
    /// Clock ticks from boot to the process' start: field 22 of `/proc/PID/stat` (proc(5)).
    pub started: u64,
    /// The kernel's boot, without which the ticks mean nothing.
    pub boot_id: String,
    /// The whole argument vector, as `/proc/PID/cmdline` shows it.
    pub argv: Vec<String>,
}

/// A process that was there when this was made.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// A child that was not waited for, so that its pid is still its own.
    pub(crate) fn of_child(child: &Child) -> io::Result<Process> {
        Process::open(Pid::from_child(child))
    }

    /// The process that was recorded, if it lives.
    pub(crate) fn find(identity: &Identity) -> io::Result<Option<Process>> {
        let Some(process) = Process::open_raw(identity.pid)? else {
            return Ok(None);
        };
        let same = Identity::read(identity.pid).is_some_and(|found| found == *identity);
        Ok((process.lives() && same).then_some(process))
    }

    /// A living process among whose arguments are all of `marks`, if there is one.
    pub(crate) fn search(marks: &[String]) -> io::Result<Option<Process>> {
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Some(process) = Process::open_raw(pid)? else {
                continue;
            };
            let found = Identity::read(pid).is_some_and(|found| marks.iter().all(|mark| found.argv.contains(mark)));
            if found && process.lives() {
                return Ok(Some(process));
            }
        }
        Ok(None)
    }

    fn open_raw(pid: i32) -> io::Result<Option<Process>> {
        let Some(pid) = Pid::from_raw(pid) else { return Ok(None) };
        match Process::open(pid) {
            Ok(process) => Ok(Some(process)),
            // ESRCH: nobody has the pid. EINVAL: it is a thread's.
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
        // SAFETY: an `OwnedFd` names the same open file until it is dropped, and nothing takes it
        // out of the `AsyncFd` before.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Process { pid, pidfd })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Its argument vector, once it has executed its program.
    pub(crate) fn arguments(&self) -> io::Result<Vec<String>> {
        let found = Identity::read(self.pid()).map(|identity| identity.argv);
        found.ok_or_else(|| io::Error::other(format!("process {} shows no arguments", self.pid())))
    }

    /// The identity, for the record, of a process that was started with `argv`. It is not asked for
    /// its arguments: right after its start the kernel has none to show.
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

    /// Bounds what the calling process may open, and keeps its memory, a guest's, out of core
    /// dumps. For a child between fork and exec, where it is safe: two system calls. From outside
    /// it would race with the child's change of account, after which only `CAP_SYS_RESOURCE` may
    /// set its limits.
    pub(crate) fn bound_self() -> rustix::io::Result<()> {
        for (resource, most) in [(Resource::Nofile, OPEN_FILES), (Resource::Core, 0)] {
            let both = Rlimit {
                current: Some(most),
                maximum: Some(most),
            };
            setrlimit(resource, both)?;
        }
        Ok(())
    }

    /// Waits for the end. May be awaited by many at once, also after the end.
    pub(crate) async fn exited(&self) {
        if self.pidfd.readable().await.is_err() {
            // Only when the runtime is going down, and this future with it.
            std::future::pending::<()>().await;
        }
    }

    /// Sends SIGKILL. Nothing happens if the process has ended.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the exit status of a child that has ended, in words. `None` where that is not for this
    /// process to know: after an adoption the parent is another, or when it was taken before.
    pub(crate) fn reap(&self) -> Option<String> {
        let status = waitid(
            WaitId::PidFd(self.pidfd.as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        )
        .ok()??;
        Some(match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (_, Some(signal)) => format!("killed by signal {signal}"),
            _ => "ended".to_owned(),
        })
    }

    /// Whether it has not ended yet.
    pub(crate) fn lives(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let lives = poll(&mut fds, Some(&now)) == Ok(0);
        if !lives {
            // A child of this process that nobody watched when it ended would stay as a zombie.
            self.reap();
        }
        lives
    }
}

impl Identity {
    /// Whoever has the pid now; `None` when nobody has, or a process that has ended.
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

/// The second field is the process' name in parentheses and may hold anything, parentheses
/// included: count from the last.
fn start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    // The third field of the line is the first here; the start time is the 22nd.
    fields.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A child that ends when this is dropped.
    struct Sleeper(Child);

    impl Sleeper {
        fn new() -> Sleeper {
            Sleeper(Command::new("sleep").arg("600").spawn().unwrap())
        }

        fn identity(&self) -> Identity {
            let argv = ["sleep", "600"].map(str::to_owned).to_vec();
            Process::of_child(&self.0).unwrap().identity(argv).unwrap()
        }

        /// Waits until the kernel shows its arguments.
        fn settle(&self) {
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
    async fn a_recycled_pid_is_not_taken_for_the_machine() {
        let sleeper = Sleeper::new();
        let recorded = sleeper.identity();
        sleeper.settle();
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
    async fn a_dead_process_is_not_found_and_its_end_can_be_awaited_twice() {
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
    fn the_start_time_is_found_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(start_time(&format!("12 (a) b (c)) {rest}")), Some(4711));
        assert_eq!(start_time("12 (a"), None);
    }
}
