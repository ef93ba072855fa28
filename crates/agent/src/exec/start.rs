//! Starts an exec.

use crate::exec::buffer::Output;
use crate::exec::check::check;
use crate::exec::launch::launch;
use crate::exec::ring::MAX_STALL;
use crate::exec::streams::Streams;
use crate::exec::table::{Exec, Execs, Fd, Phase};
use crate::exec::wait;
use crate::server::Failure;
use rustix::process::Pid;
use scalebox_agent_api::exec::{DEFAULT_BUFFER, MAX_STATUS_ARGV};
use scalebox_agent_api::{ExecStatus, FailureCode, StartExec};
use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::time::timeout;

/// Maximum time that a start waits for other starts in progress.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(45);

/// Starts an exec and returns its state.
///
/// # Errors
/// [`FailureCode::Invalid`] for a malformed request; [`FailureCode::Exists`];
/// [`FailureCode::Busy`]; and the errors of the program's start, after which nothing is left.
pub(crate) async fn start(execs: &Arc<Execs>, request: StartExec) -> Result<ExecStatus, Failure> {
    check(&request)?;
    let execs = Arc::clone(execs);
    // In a task of its own: a connection that breaks does not leave a command without an entry.
    match tokio::spawn(start_checked(execs, request)).await {
        Ok(started) => started,
        Err(error) => Err(Failure::new(
            FailureCode::Other,
            format!("cannot start the command: {error}"),
        )),
    }
}

async fn start_checked(execs: Arc<Execs>, request: StartExec) -> Result<ExecStatus, Failure> {
    let reservation = execs.reserve(&request.id)?;
    let permit = match timeout(QUEUE_TIMEOUT, Arc::clone(&execs.starts).acquire_owned()).await {
        Ok(Ok(permit)) => permit,
        _ => {
            let error = "the programs of other execs are still being loaded; retry later";
            return Err(Failure::new(FailureCode::Busy, error));
        }
    };
    // A program on a file system that does not respond blocks this thread only.
    let launched = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let launched = launch(&request);
        (request, launched)
    });
    let (request, launched) = launched
        .await
        .map_err(io::Error::other)
        .map_err(Failure::io("start the command"))?;
    let launched = launched?;
    let output = Output::new(
        &execs.budget,
        usize::try_from(request.buffer.unwrap_or(DEFAULT_BUFFER)).unwrap_or(usize::MAX),
        request.attached.then(|| Instant::now() + MAX_STALL),
    );
    let input = input_of(&launched.streams);
    let exec = Arc::new(exec(&request, Some(launched.pid), input, output));
    reservation.fill(&exec);
    let timeout = request.timeout_ms.map(Duration::from_millis);
    let status = exec.status();
    tokio::spawn(wait::run(execs, exec, launched, timeout));
    Ok(status)
}

fn input_of(streams: &Streams) -> Option<Fd> {
    match streams {
        Streams::Pipes { stdin, .. } => stdin.clone(),
        Streams::Terminal(terminal) => Some(Arc::clone(terminal)),
    }
}

/// Returns a new exec. `pid` is that of its process, if one was started.
pub(crate) fn exec(request: &StartExec, pid: Option<Pid>, input: Option<Fd>, output: Arc<Output>) -> Exec {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Exec {
        id: request.id.clone(),
        argv: shortened(&request.argv),
        pid,
        started: Instant::now(),
        started_at_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
        tty: request.tty.is_some(),
        output,
        input: Mutex::new(input),
        input_order: tokio::sync::Mutex::new(()),
        phase: watch::Sender::new(match pid {
            Some(_) => Phase::Running,
            None => Phase::Exited,
        }),
        end: OnceLock::new(),
        restarts: None,
    }
}

/// Returns the first [`MAX_STATUS_ARGV`] bytes of the arguments: many execs with long arguments
/// would fill the guest's memory.
fn shortened(argv: &[String]) -> Vec<String> {
    let (mut kept, mut left) = (Vec::new(), MAX_STATUS_ARGV);
    for argument in argv {
        if argument.len() < left {
            kept.push(argument.clone());
            left -= argument.len() + 1;
        } else {
            let cut = (0..=left).rev().find(|at| argument.is_char_boundary(*at)).unwrap_or(0);
            kept.push(format!("{}…", &argument[..cut]));
            break;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_commands_are_shortened_at_a_character() {
        let short = vec!["sh".to_owned(), "-c".to_owned(), String::new()];
        assert_eq!(shortened(&short), short);
        let long = ["sh".to_owned(), "ä".repeat(MAX_STATUS_ARGV), "x".to_owned()];
        let kept = shortened(&long);
        assert_eq!(kept.len(), 2);
        assert!(
            kept[1].ends_with('…') && kept[1].len() <= MAX_STATUS_ARGV + 3,
            "{}",
            kept[1].len()
        );
        assert!(shortened(&vec![String::new(); 5000]).len() <= MAX_STATUS_ARGV + 2);
    }
}
