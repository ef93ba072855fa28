//! Waits for the end of an exec.
//!
//! An exec ends when its main process has ended and its output was read. The processes that it
//! leaves behind live on; process 1 reaps them, and the agent reaps only main processes.

use crate::exec::copy::{copy, drain};
use crate::exec::launch::Launched;
use crate::exec::ring::Stream;
use crate::exec::signal;
use crate::exec::streams::Streams;
use crate::exec::table::{Exec, Execs, Fd, Phase};
use scalebox_agent_api::ExecEnd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use tokio::process::Child;

/// Runs an exec from its start to its end.
pub(crate) async fn run(execs: Arc<Execs>, exec: Arc<Exec>, launched: Launched, timeout: Option<Duration>) {
    let ((end, duration), open) = to_end(&exec, launched, timeout).await;
    // The state is set first: a client that has read the end also sees it in the state.
    exec.record_end(end, duration);
    execs.ended(&exec.id);
    exec.output.finish(end);
    drop(exec);
    drain_all(execs, open).await;
}

/// Waits until the main process of an exec has ended and its output was read. Returns the end, the
/// time from the start to it, and the pipes that other processes hold open.
pub(crate) async fn to_end(
    exec: &Exec,
    launched: Launched,
    timeout: Option<Duration>,
) -> ((ExecEnd, Duration), Vec<Fd>) {
    let main = main_process(exec, launched.child, timeout);
    match launched.streams {
        Streams::Terminal(terminal) => {
            let (end, _) = tokio::join!(main, copy(exec, &terminal, Stream::Stdout));
            // Closing the terminal sends SIGHUP to the processes that still use it.
            drop(terminal);
            (end, Vec::new())
        }
        Streams::Pipes { stdin, stdout, stderr } => {
            // Otherwise the agent would keep a pipe that the host closes.
            drop(stdin);
            let (end, stdout_open, stderr_open) = tokio::join!(
                main,
                copy(exec, &stdout, Stream::Stdout),
                copy(exec, &stderr, Stream::Stderr)
            );
            let open = [(stdout, stdout_open), (stderr, stderr_open)];
            let open = open.into_iter().filter_map(|(fd, is_open)| is_open.then_some(fd));
            (end, open.collect())
        }
    }
}

async fn main_process(exec: &Exec, mut child: Child, timeout: Option<Duration>) -> (ExecEnd, Duration) {
    let mut timed_out = false;
    let status = match timeout {
        None => child.wait().await,
        Some(time) => match tokio::time::timeout(time, child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                timed_out = signal::send(exec, libc::SIGKILL).is_ok();
                child.wait().await
            }
        },
    };
    // No await between the reaping and this: no signal is sent to a reused pid.
    exec.phase.send_replace(Phase::Exited);
    (end(status.ok(), timed_out), exec.started.elapsed())
}

/// Returns the end for an exit status. An unknown one, of a child that another part of the process
/// has reaped, counts as 255.
fn end(status: Option<ExitStatus>, timed_out: bool) -> ExecEnd {
    let signal = status.and_then(|status| status.signal());
    let exit_code = status.and_then(|status| status.code());
    ExecEnd {
        exit_code: exit_code.or(signal.is_none().then_some(255)),
        signal,
        timed_out,
    }
}

/// Drains pipes until they are closed, unless too many others are being drained.
pub(crate) async fn drain_all(execs: Arc<Execs>, open: Vec<Fd>) {
    if open.is_empty() {
        return;
    }
    if let Ok(_permit) = Arc::clone(&execs.drained).try_acquire_owned() {
        futures::future::join_all(open.iter().map(drain)).await;
    }
}
