//! Runs the main process of a guest without an init, and starts it again by its policy.
//!
//! All runs write to one output, which ends when the main process is not started again. What a run
//! leaves behind in its process group is killed before the next run.

use crate::exec::buffer::Output;
use crate::exec::check;
use crate::exec::launch::{Launched, launch};
use crate::exec::ring::Stream;
use crate::exec::start;
use crate::exec::table::{Exec, Execs};
use crate::exec::wait;
use crate::run_dir::{RunDir, Running};
use crate::server::Failure;
use rustix::process::{Pid, Signal, kill_process_group};
use scalebox_agent_api::exec::DEFAULT_BUFFER;
use scalebox_agent_api::{ExecEnd, FailureCode, MainProcess, RestartPolicy, Restarts, StartExec, main_process};
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// The first delay before a restart. It doubles with each restart.
const MIN_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(60);
/// After a run of this length, the delay is the first one again.
const LONG_RUN: Duration = Duration::from_secs(10);

/// The exit statuses of a program that could not be started, as in POSIX shells.
const CANNOT_RUN: i32 = 126;
const NOT_FOUND: i32 = 127;

/// Runs the main process for as long as its policy demands.
pub(crate) async fn supervise(execs: Arc<Execs>, main: MainProcess, run_dir: RunDir) {
    end_previous(&run_dir);
    let Ok(reservation) = execs.reserve(main_process::EXEC) else {
        return;
    };
    let size = usize::try_from(DEFAULT_BUFFER).unwrap_or(usize::MAX);
    let output = Output::new(&execs.budget, size, None);
    let policy = main.restart;
    let stop_signal = main.stop_signal.unwrap_or(libc::SIGTERM);
    let request = request_of(main);
    let (mut delay, mut restarts) = (MIN_DELAY, 0);
    // The host finds the exec from the first request on.
    reservation.fill(&Arc::new(exec_of(&request, None, &output, restarts)));
    let end = loop {
        let launched = launch_main(&request, &output).await;
        if let Ok(launched) = &launched {
            let pid = launched.pid;
            record_running(&run_dir, Running { pid, stop_signal });
        }
        let pid = launched.as_ref().ok().map(|launched| launched.pid);
        let exec = Arc::new(exec_of(&request, pid, &output, restarts));
        execs.replace(&exec);
        let (end, duration) = run_once(&execs, &exec, launched).await;
        run_dir.remove_running();
        let is_last = !restarts_after(policy, end) || run_dir.is_ending();
        exec.set_pending_restart(!is_last);
        exec.record_end(end, duration);
        if is_last {
            break end;
        }
        if duration >= LONG_RUN {
            delay = MIN_DELAY;
        }
        sleep(delay).await;
        if run_dir.is_ending() {
            break end;
        }
        delay = MAX_DELAY.min(delay * 2);
        restarts += 1;
    };
    execs.main_ended();
    output.finish(end);
}

fn request_of(main: MainProcess) -> StartExec {
    StartExec {
        id: main_process::EXEC.to_owned(),
        argv: main.argv,
        env: main.env,
        cwd: main.cwd,
        user: main.user,
        tty: None,
        stdin: false,
        timeout_ms: None,
        buffer: None,
        attached: false,
    }
}

/// Starts the program. An error is written to the output, which is where one looks for it.
async fn launch_main(request: &StartExec, output: &Output) -> Result<Launched, i32> {
    let launched = match check::check_command(request) {
        Ok(()) => {
            let request = request.clone();
            let launched = tokio::task::spawn_blocking(move || launch(&request)).await;
            let launched = launched.map_err(io::Error::other);
            launched.map_err(Failure::io("start the main process")).flatten()
        }
        Err(failure) => Err(failure),
    };
    match launched {
        Ok(launched) => Ok(launched),
        Err(Failure(failure)) => {
            let line = format!("scalebox-agent: {}\n", failure.error);
            output.room().await;
            output.push(Stream::Stderr, line.as_bytes());
            Err(match failure.code {
                FailureCode::NotFound => NOT_FOUND,
                _ => CANNOT_RUN,
            })
        }
    }
}

fn exec_of(request: &StartExec, pid: Option<Pid>, output: &Arc<Output>, count: u64) -> Exec {
    let mut exec = start::exec(request, pid, None, Arc::clone(output));
    exec.restarts = Some(Restarts { count, pending: false }.into());
    exec
}

async fn run_once(execs: &Arc<Execs>, exec: &Arc<Exec>, launched: Result<Launched, i32>) -> (ExecEnd, Duration) {
    let launched = match launched {
        Ok(launched) => launched,
        Err(exit_code) => {
            let end = ExecEnd {
                exit_code: Some(exit_code),
                signal: None,
                timed_out: false,
            };
            return (end, Duration::ZERO);
        }
    };
    let pid = launched.pid;
    let (end, open) = wait::to_end(exec, launched, None).await;
    kill_group(pid);
    tokio::spawn(wait::drain_all(Arc::clone(execs), open));
    end
}

/// Returns whether the policy demands another start after this end.
fn restarts_after(policy: RestartPolicy, end: ExecEnd) -> bool {
    match policy {
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => end.exit_code != Some(0),
        RestartPolicy::Never => false,
    }
}

/// Without the record, the guest ends with SIGTERM instead of the image's signal.
fn record_running(run_dir: &RunDir, running: Running) {
    if let Err(error) = run_dir.write_running(running) {
        eprintln!("scalebox-agent: cannot record the main process: {error}");
    }
}

/// Kills the main process of an agent that has ended, whose child became one of process 1.
fn end_previous(run_dir: &RunDir) {
    let Some(Running { pid, .. }) = run_dir.read_running() else {
        return;
    };
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid())).unwrap_or_default();
    if status.lines().any(|line| line == "PPid:\t1") {
        kill_group(pid);
    }
    run_dir.remove_running();
}

fn kill_group(pid: Pid) {
    // Usually, the group has ended.
    let _ = kill_process_group(pid, Signal::KILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_decide_by_the_end() {
        let exited = |exit_code| ExecEnd {
            exit_code: Some(exit_code),
            signal: None,
            timed_out: false,
        };
        let killed = ExecEnd {
            exit_code: None,
            signal: Some(9),
            timed_out: false,
        };
        for (policy, expected) in [
            (RestartPolicy::Always, [true, true, true]),
            (RestartPolicy::OnFailure, [false, true, true]),
            (RestartPolicy::Never, [false, false, false]),
        ] {
            let decided = [exited(0), exited(1), killed].map(|end| restarts_after(policy, end));
            assert_eq!(decided, expected, "{policy:?}");
        }
    }
}
