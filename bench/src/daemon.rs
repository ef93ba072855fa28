//! The daemon under test.

use crate::outcome::Outcome;
use crate::setup::Setup;
use rustix::process::{Pid, Signal, kill_process};
use scalebox_client::Client;
use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Timeout of a start.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A running `scaleboxd serve`. It is stopped on drop, or by `bench/run.sh` if this program is
/// killed.
pub(crate) struct Daemon {
    child: Child,
    client: Client,
    /// Time from the daemon's start until it logged that it is ready.
    pub ready_after: Duration,
}

impl Daemon {
    /// Starts the daemon with settings from the environment, and waits until it is ready.
    pub(crate) fn start(setup: &Setup) -> Outcome<Daemon> {
        let log = setup.scratch.join("daemon.log");
        let begun = Instant::now();
        let child = Command::new(&setup.scaleboxd)
            .args(["--config", "/dev/null", "serve"])
            .stdin(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        let mut daemon = Daemon {
            child,
            client: Client::new("http://127.0.0.1:1", &setup.token)?,
            ready_after: Duration::ZERO,
        };
        fs::write(setup.scratch.join("daemon.pid"), daemon.child.id().to_string())?;
        loop {
            let text = fs::read_to_string(&log)?;
            if let Some((_, rest)) = text.split_once(" ready address=")
                && let Some((address, _)) = rest.split_once('\n')
            {
                daemon.ready_after = begun.elapsed();
                daemon.client = Client::new(&format!("http://{}", address.trim()), &setup.token)?;
                return Ok(daemon);
            }
            if daemon.child.try_wait()?.is_some() || begun.elapsed() > START_TIMEOUT {
                return Err(format!("the daemon did not start:\n{text}").into());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Returns a client of the daemon.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the daemon's resident memory in bytes.
    pub(crate) fn resident_bytes(&self) -> Outcome<u64> {
        self.status("VmRSS:")
    }

    /// Returns the peak of the daemon's resident memory since [`Daemon::reset_peak`], in bytes.
    pub(crate) fn peak_bytes(&self) -> Outcome<u64> {
        self.status("VmHWM:")
    }

    /// Sets the peak to the present resident memory (proc_pid_clear_refs(5)).
    pub(crate) fn reset_peak(&self) -> Outcome<()> {
        Ok(fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")?)
    }

    /// Returns a size in `/proc/PID/status`, in bytes.
    fn status(&self, field: &str) -> Outcome<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib: u64 = line
            .and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok())
            .ok_or_else(|| format!("/proc/PID/status of the daemon has no {field}"))?;
        Ok(kib << 10)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let signalled = Pid::from_raw(self.child.id().cast_signed())
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| kill_process(pid, Signal::TERM));
        if let Err(error) = signalled {
            eprintln!("bench: cannot send SIGTERM to the daemon: {error}");
        }
        if let Err(error) = self.child.wait() {
            eprintln!("bench: cannot wait for the daemon: {error}");
        }
    }
}
