//! The daemon under test.

use crate::{Outcome, Setup};
use rustix::process::{Pid, Signal, kill_process};
use scalebox_client::Client;
use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a start may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `scaleboxd serve`; ended when it is dropped, and by `bench/run.sh` if this program is
/// killed.
pub struct Daemon {
    child: Child,
    client: Client,
    /// From its start to its word that it is ready.
    pub ready_after: Duration,
}

impl Daemon {
    /// Starts it with the settings of the environment, and waits until it is ready.
    pub fn start(setup: &Setup) -> Outcome<Daemon> {
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
            let said = fs::read_to_string(&log)?;
            if let Some((_, rest)) = said.split_once(" ready address=")
                && let Some((address, _)) = rest.split_once('\n')
            {
                daemon.ready_after = begun.elapsed();
                daemon.client = Client::new(&format!("http://{}", address.trim()), &setup.token)?;
                return Ok(daemon);
            }
            if daemon.child.try_wait()?.is_some() || begun.elapsed() > PATIENCE {
                return Err(format!("the daemon did not start:\n{said}").into());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A client of it.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Memory that it holds in RAM, in bytes.
    pub fn resident_bytes(&self) -> Outcome<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line
            .and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok())
            .ok_or("the kernel does not tell the daemon's memory")?;
        Ok(kib << 10)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let ended = Pid::from_raw(self.child.id().cast_signed())
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| kill_process(pid, Signal::TERM));
        if let Err(error) = ended {
            eprintln!("bench: the daemon could not be told to end: {error}");
        }
        if let Err(error) = self.child.wait() {
            eprintln!("bench: the daemon's end could not be waited for: {error}");
        }
    }
}
