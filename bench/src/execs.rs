//! Measures commands in a running guest.

use crate::daemon::Daemon;
use crate::measure::{self, Samples, timed};
use crate::outcome::Outcome;
use crate::setup::Setup;
use scalebox_api::{CreateExec, ExecResult};
use scalebox_client::Client;
use serde::Serialize;
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
    /// Durations.
    pub samples: Samples,
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

/// Runs [`CONCURRENT`] commands at the same time, and measures the daemon's memory. All must
/// complete, with all their output.
pub(crate) fn concurrent(daemon: &Daemon, vm: &str) -> Outcome<Concurrent> {
    let client = daemon.client();
    // Opens the connection to the agent.
    client.run_exec(vm, &CreateExec::of_argv(vec!["true".to_owned()]))?;
    let exec = CreateExec::of_command(format!("head -c {OUTPUT} /dev/zero | tr '\\0' x"));
    daemon.reset_peak()?;
    let before_bytes = daemon.resident_bytes()?;
    let samples = measure::run(CONCURRENT, CONCURRENT, |_| {
        let (time, ended) = timed(|| Ok(client.run_exec(vm, &exec)?))?;
        let complete = ended.exit_code == Some(0) && !ended.truncated && ended.stdout.len() == OUTPUT;
        match complete && ended.stdout.bytes().all(|byte| byte == b'x') {
            true => Ok(time),
            false => Err(format!(
                "a command of {CONCURRENT} is incomplete: {} bytes of output, exit code {:?}, {}",
                ended.stdout.len(),
                ended.exit_code,
                ended.stderr
            )
            .into()),
        }
    })?;
    Ok(Concurrent {
        samples,
        before_bytes,
        peak_bytes: daemon.peak_bytes()?,
    })
}
