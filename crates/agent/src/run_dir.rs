//! The folder `/run/scalebox`, by which process 1 and the serving agent of a guest without an init
//! know about its main process.

use rustix::process::{Pid, test_kill_process};
use scalebox_agent_api::MainProcess;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The folder of a guest.
pub(crate) const FOLDER: &str = "/run/scalebox";

/// The files of one guest.
#[derive(Debug, Clone)]
pub(crate) struct RunDir(PathBuf);

/// The main process as it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Running {
    /// The process, and its group.
    pub(crate) pid: Pid,
    /// The signal that asks it to end.
    pub(crate) stop_signal: i32,
}

impl RunDir {
    /// Uses the folder `path`, which exists.
    pub(crate) fn at(path: &Path) -> RunDir {
        RunDir(path.to_owned())
    }

    /// Writes what the main process is. Only root can read it: its environment may hold secrets.
    pub(crate) fn write_main(&self, json: &str) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(self.main())?;
        file.write_all(json.as_bytes())
    }

    /// Returns the main process; `None` if the guest has none.
    pub(crate) fn read_main(&self) -> io::Result<Option<MainProcess>> {
        match fs::read(self.main()) {
            Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Records that the main process runs.
    pub(crate) fn write_running(&self, running: Running) -> io::Result<()> {
        let text = format!("{} {}", running.pid.as_raw_pid(), running.stop_signal);
        fs::write(self.running(), text)
    }

    /// Records that the main process does not run.
    pub(crate) fn remove_running(&self) {
        // Absent if it could not be written.
        let _ = fs::remove_file(self.running());
    }

    /// Returns the main process if one was recorded and there is a process with its number.
    pub(crate) fn read_running(&self) -> Option<Running> {
        let text = fs::read_to_string(self.running()).ok()?;
        let (pid, stop_signal) = text.split_once(' ')?;
        let pid = Pid::from_raw(pid.parse().ok()?)?;
        test_kill_process(pid).ok()?;
        Some(Running {
            pid,
            stop_signal: stop_signal.parse().ok()?,
        })
    }

    /// Records that the guest is about to end: the main process is not started again.
    pub(crate) fn mark_ending(&self) {
        // A guest without the folder has no main process.
        let _ = fs::write(self.ending(), "");
    }

    /// Returns `true` after [`mark_ending`](RunDir::mark_ending).
    pub(crate) fn is_ending(&self) -> bool {
        self.ending().exists()
    }

    fn main(&self) -> PathBuf {
        self.0.join("main.json")
    }

    fn running(&self) -> PathBuf {
        self.0.join("main.pid")
    }

    fn ending(&self) -> PathBuf {
        self.0.join("ending")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_a_process_that_exists_counts_as_running() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(folder.path());
        assert_eq!(run_dir.read_running(), None);
        let own = Running {
            pid: rustix::process::getpid(),
            stop_signal: 3,
        };
        run_dir.write_running(own).unwrap();
        assert_eq!(run_dir.read_running(), Some(own));
        let none = Running {
            // Over the kernel's limit on process ids.
            pid: Pid::from_raw(i32::MAX).unwrap(),
            ..own
        };
        run_dir.write_running(none).unwrap();
        assert_eq!(run_dir.read_running(), None);
        run_dir.remove_running();
        assert_eq!(run_dir.read_running(), None);
    }

    #[test]
    fn others_cannot_read_the_environment_of_the_main_process() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::at(folder.path());
        assert!(run_dir.read_main().unwrap().is_none());
        run_dir
            .write_main(r#"{"argv":["a"],"env":[["KEY","secret"]],"restart":"never"}"#)
            .unwrap();
        assert_eq!(run_dir.read_main().unwrap().unwrap().env[0].1, "secret");
        let mode = fs::metadata(run_dir.main()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        run_dir.write_main("{}").unwrap();
        assert!(run_dir.read_main().is_err());
    }
}
