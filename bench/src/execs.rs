//! Measures commands in a running guest.

use crate::daemon::Daemon;
use crate::measure::{self, Samples, timed};
use crate::outcome::Outcome;
use crate::setup::Setup;
use scalebox_api::{CreateExec, ExecResult};
use scalebox_client::Client;
use serde::Serialize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use ureq::Agent;

/// Commands that run at the same time.
pub(crate) const CONCURRENT: usize = 100;
/// Output of each of them, in bytes.
const OUTPUT: usize = 1 << 20;
/// Processes that the guest starts one after the other, for the limit.
const PROCESSES: u32 = 100;

/// Commands that ran at the same time.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Concurrent {
    /// Durations, also of those that failed.
    pub samples: Samples,
    /// Number of commands that succeeded and returned all their output.
    pub complete: usize,
    /// The daemon's resident memory before, in bytes.
    pub before_bytes: u64,
    /// The peak of its resident memory meanwhile, in bytes.
    pub peak_bytes: u64,
}

/// A client that keeps its connection open, unlike [`Client`].
struct KeptConnection {
    agent: Agent,
    url: String,
    authorization: String,
}

impl KeptConnection {
    /// Prepares to run commands in a VM.
    fn new(setup: &Setup, client: &Client, vm: &str) -> KeptConnection {
        let config = Agent::config_builder().proxy(None).max_idle_connections(1);
        KeptConnection {
            agent: config.build().new_agent(),
            url: format!("{}/vms/{vm}/exec", client.url()),
            authorization: format!("Bearer {}", setup.token),
        }
    }

    /// Sends `POST /vms/{vm}/exec`, and reads the complete response.
    fn run(&self, exec: &CreateExec) -> Outcome<ExecResult> {
        let request = self.agent.post(&self.url).header("Authorization", &self.authorization);
        Ok(request.send_json(exec)?.into_body().read_json()?)
    }
}

/// Measures `true`, from the request to the response, on one connection.
pub(crate) fn latency(setup: &Setup, client: &Client, vm: &str) -> Outcome<Samples> {
    let connection = KeptConnection::new(setup, client, vm);
    let exec = CreateExec::of_argv(vec!["true".to_owned()]);
    let run = |_| {
        let (time, ended) = timed(|| connection.run(&exec))?;
        match ended.exit_code {
            Some(0) => Ok(time),
            _ => Err(format!("true failed in a guest: {ended:?}").into()),
        }
    };
    // The first ones open both connections and fill the guest's caches.
    measure::run(20, 1, run)?;
    measure::run(if setup.quick { 200 } else { 500 }, 1, run)
}

/// Measures how long the guest itself takes to start `true` and wait for it.
pub(crate) fn process_time(client: &Client, vm: &str) -> Outcome<Duration> {
    let count = format!("i=0; while [ $i -lt {PROCESSES} ]; do /bin/true; i=$((i+1)); done");
    let script = format!("a=$(date +%s%N); {count}; b=$(date +%s%N); echo $((b-a))");
    let ended = client.run_exec(vm, &CreateExec::of_command(script))?;
    let nanos = ended.stdout.trim().parse();
    let nanos = nanos.map_err(|_| format!("the guest does not report the time of a process: {ended:?}"))?;
    Ok(Duration::from_nanos(nanos) / PROCESSES)
}

/// Runs [`CONCURRENT`] commands at the same time, and measures the daemon's memory.
pub(crate) fn concurrent(daemon: &Daemon, vm: &str) -> Outcome<Concurrent> {
    let client = daemon.client();
    // Opens the connection to the agent.
    client.run_exec(vm, &CreateExec::of_argv(vec!["true".to_owned()]))?;
    let exec = CreateExec::of_command(format!("head -c {OUTPUT} /dev/zero | tr '\\0' x"));
    let complete = AtomicUsize::new(0);
    daemon.reset_peak()?;
    let before_bytes = daemon.resident_bytes()?;
    let samples = measure::run(CONCURRENT, CONCURRENT, |number| {
        let (time, ended) = timed(|| Ok(client.run_exec(vm, &exec).map_err(|error| error.to_string())))?;
        match ended.and_then(require_complete) {
            Ok(()) => {
                complete.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => eprintln!("bench: exec {number} of {CONCURRENT}: {error}"),
        }
        Ok(time)
    })?;
    Ok(Concurrent {
        samples,
        complete: complete.into_inner(),
        before_bytes,
        peak_bytes: daemon.peak_bytes()?,
    })
}

/// Checks that a command of [`concurrent`] succeeded, and that its output is complete.
fn require_complete(ended: ExecResult) -> Result<(), String> {
    let all = ended.stdout.len() == OUTPUT && ended.stdout.bytes().all(|byte| byte == b'x');
    match ended.exit_code == Some(0) && !ended.truncated && all {
        true => Ok(()),
        false => Err(format!(
            "exit code {:?}, {} bytes of output, {}",
            ended.exit_code,
            ended.stdout.len(),
            ended.stderr
        )),
    }
}
