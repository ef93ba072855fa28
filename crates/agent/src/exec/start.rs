//! Starts an exec.

use crate::exec::buffer::Output;
use crate::exec::check::check;
use crate::exec::launch::{Launched, launch};
use crate::exec::ring::MAX_STALL;
use crate::exec::streams::Streams;
use crate::exec::table::{Exec, Execs, Phase};
use crate::exec::wait;
use crate::server::Failure;
use scalebox_agent_api::exec::{DEFAULT_BUFFER, MAX_STATUS_ARGV};
use scalebox_agent_api::{ExecStatus, FailureCode, StartExec};
use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::time::timeout;

/// Maximum time that a start waits for other starts in progress.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);

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
    let exec = Arc::new(exec(&execs, &request, &launched));
    reservation.fill(&exec);
    let timeout = request.timeout_ms.map(Duration::from_millis);
    let status = exec.status();
    tokio::spawn(wait::run(execs, exec, launched, timeout));
    Ok(status)
}

fn exec(execs: &Execs, request: &StartExec, launched: &Launched) -> Exec {
    let started = Instant::now();
    let reserved_until = request.attached.then_some(started + MAX_STALL);
    let size = request.buffer.unwrap_or(DEFAULT_BUFFER);
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let input = match &launched.streams {
        Streams::Pipes { stdin, .. } => stdin.clone(),
        Streams::Terminal(terminal) => Some(Arc::clone(terminal)),
    };
    Exec {
        id: request.id.clone(),
        argv: shortened(&request.argv),
        pid: launched.pid,
        started,
        started_at_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
        tty: request.tty.is_some(),
        output: Output::new(
            &execs.budget,
            usize::try_from(size).unwrap_or(usize::MAX),
            reserved_until,
        ),
        input: Mutex::new(input),
        input_order: tokio::sync::Mutex::new(()),
        phase: watch::Sender::new(Phase::Running),
        end: OnceLock::new(),
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
