//! Commands in guests, through their agents.
//!
//! A command outlives the request that started it, the client and the daemon: the agent keeps it,
//! with the end of its output. A stream that follows a command reconnects after an error of the
//! connection, and continues at the offset of the last byte.

use crate::host::error::ServiceError;
use crate::host::random::random_hex;
use crate::host::started_execs::Following;
use crate::host::{Host, blocking, rfc3339};
use crate::state::{GuestConfig, Record};
use crate::vm::exec_events;
use crate::vm::guest::{self, Guest};
use crate::vm::spool::Spool;
use scalebox_agent_api::frame::Frame;
use scalebox_agent_api::{self as wire, FailureCode};
use scalebox_api::{CreateExec, Exec, ExecEnd, ExecStatus, Signal, WindowSize};
use scalebox_guest::{AgentError, Output, Upload};
use scalebox_units::{ExecId, InvalidFormat};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// Size of the guest's output buffer for a command whose output is read from the start. Small,
/// because the command waits for the reader: a hundred of them fit into the agent's memory.
const FOLLOWED_BUFFER: u64 = 64 << 10;
/// Limit on reconnections without any output in between.
const MAX_RECONNECTS: u32 = 3;

/// Time for a command to read its first stdin, if more may follow.
const STDIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A command that was started.
pub(crate) struct Started {
    /// Its VM.
    pub(crate) guest: Guest,
    /// Its id.
    pub(crate) id: ExecId,
    begun: Instant,
    /// Its output from the start on, if the agent returned it with the start.
    output: Option<Output>,
    following: Following,
}

/// A command that has ended, with the beginning of its output.
pub(crate) struct Finished {
    /// The command's id.
    pub(crate) id: ExecId,
    /// The end of the command: its exit status or signal.
    pub(crate) end: ExecEnd,
    /// The beginning of stdout.
    pub(crate) stdout: Spool,
    /// The beginning of stderr.
    pub(crate) stderr: Spool,
    /// `true` if the command wrote more.
    pub(crate) truncated: bool,
}

/// Starts a command, and writes its stdin in the background.
///
/// # Errors
/// 400 if the guest has no such user or directory; 404 also if it has no such program; 409, 503.
pub(crate) async fn start(host: &Host, reference: &str, request: &CreateExec) -> Result<Started, ServiceError> {
    let mut guest = guest::reach(host, reference).await?;
    let id = new_id()?;
    let stdin = request.stdin_bytes()?.unwrap_or_default();
    let exec = of_request(request, &guest.record, &id, !stdin.is_empty());
    let begun = Instant::now();
    let output = start_on(&mut guest, &exec).await?;
    if !stdin.is_empty() {
        let written = write_stdin_later(&guest, &id, stdin, !request.open_stdin);
        // Later input of the client comes after it. The start does not wait for a command that does
        // not read.
        if request.open_stdin {
            let _ = timeout(STDIN_TIMEOUT, written).await;
        }
    }
    let vm = &guest.record.id;
    exec_events::started(host, &guest.record, &id, &exec.argv);
    tracing::info!(vm = %vm, exec = %id, program = exec.argv.first(), "command started");
    let following = host.execs.follow(vm, &id);
    Ok(Started {
        guest,
        id,
        begun,
        output,
        following,
    })
}

/// Sends the request to start, and returns the output of a command that is followed. Repeats the
/// request once if the connection has ended: the agent may have been restarted since its last use.
async fn start_on(guest: &mut Guest, exec: &wire::StartExec) -> Result<Option<Output>, ServiceError> {
    let error = match start_once(guest, exec).await {
        Ok(output) => return Ok(output),
        Err(error) => error,
    };
    if error.is_refusal() || !guest.agent.is_closed() {
        return Err(guest.failed(&error));
    }
    guest.reconnect().await?;
    match start_once(guest, exec).await {
        Ok(output) => Ok(output),
        // The first request has arrived.
        Err(AgentError::Refused(failure)) if failure.code == FailureCode::Exists => Ok(None),
        Err(error) => Err(guest.failed(&error)),
    }
}

async fn start_once(guest: &Guest, exec: &wire::StartExec) -> Result<Option<Output>, AgentError> {
    match exec.attached {
        true => guest.agent.start_and_follow(exec).await.map(Some),
        false => guest.agent.start_exec(exec).await.map(|_| None),
    }
}

/// Returns the request to the agent, with the settings of the VM for what `request` leaves out.
fn of_request(request: &CreateExec, vm: &Record, id: &ExecId, has_stdin: bool) -> wire::StartExec {
    let size = request.tty.and_then(scalebox_api::Tty::size);
    let guest = vm.guest.as_deref();
    let mut env = guest.map(GuestConfig::environment).unwrap_or_default();
    env.extend(request.env.clone());
    let cwd = request.cwd.as_ref().map(ToString::to_string);
    let user = request.user.as_ref().map(ToString::to_string);
    wire::StartExec {
        id: id.to_string(),
        argv: request.arguments(),
        env,
        cwd: cwd.or_else(|| guest.and_then(GuestConfig::working_dir)),
        user: user.or_else(|| guest.and_then(GuestConfig::user)),
        tty: size.map(|size| wire::Terminal {
            size: of_size(size),
            term: None,
        }),
        stdin: has_stdin || request.open_stdin,
        timeout_ms: request.timeout_seconds.map(|seconds| seconds * 1000),
        buffer: (!request.background).then_some(FOLLOWED_BUFFER),
        attached: !request.background,
    }
}

fn of_size(size: WindowSize) -> wire::WindowSize {
    wire::WindowSize {
        rows: size.rows,
        cols: size.cols,
    }
}

/// Writes stdin while the output is read: a command may wait for either.
fn write_stdin_later(guest: &Guest, id: &ExecId, stdin: Vec<u8>, close: bool) -> JoinHandle<()> {
    let (agent, id) = (guest.agent.clone(), id.clone());
    tokio::spawn(async move {
        let written = agent.write_stdin(id.as_str(), Upload::bytes(stdin), close).await;
        if let Err(error) = written {
            // Common for a command that does not read its stdin.
            tracing::debug!(exec = %id, %error, "stdin of a command was not written");
        }
    })
}

/// Makes a new id: `exec-` and 48 random bits in hex.
fn new_id() -> Result<ExecId, ServiceError> {
    let failed = |error: String| ServiceError::Internal(format!("cannot draw a random exec id: {error}"));
    let bits = random_hex(6).map_err(|error| failed(error.to_string()))?;
    format!("exec-{bits}")
        .parse()
        .map_err(|error: InvalidFormat| failed(error.to_string()))
}

/// Runs a command and waits for its end.
///
/// # Errors
/// Those of [`start`]; 503 if the VM or its agent ends before the command.
pub(crate) async fn run(host: &Host, reference: &str, request: &CreateExec) -> Result<Finished, ServiceError> {
    let started = start(host, reference, request).await?;
    let (id, mut follow) = (started.id.clone(), started.follow().await?);
    let folder = &host.settings.state_dir;
    let (mut stdout, mut stderr) = (Spool::new(folder), Spool::new(folder));
    let mut lost = false;
    while let Some(frame) = follow.next().await {
        match frame? {
            Frame::Stdout { bytes, .. } => stdout = add(stdout, bytes).await?,
            Frame::Stderr { bytes, .. } => stderr = add(stderr, bytes).await?,
            Frame::Lost { .. } => lost = true,
            Frame::End { end, .. } => {
                let end = follow.end(end).await;
                let truncated = lost || stdout.is_truncated() || stderr.is_truncated();
                return Ok(Finished {
                    id,
                    end,
                    stdout,
                    stderr,
                    truncated,
                });
            }
        }
    }
    Err(follow.interrupted())
}

async fn add(mut spool: Spool, bytes: Vec<u8>) -> Result<Spool, ServiceError> {
    let Some(bytes) = spool.push(bytes) else {
        return Ok(spool);
    };
    let write = move || {
        spool.write(&bytes);
        Ok::<_, ServiceError>(spool)
    };
    blocking(write).await
}

impl Started {
    /// Follows the command's output from its start.
    ///
    /// # Errors
    /// 503.
    pub(crate) async fn follow(self) -> Result<Follow, ServiceError> {
        let mut follow = match self.output {
            Some(output) => Follow::new(self.guest, self.id, output, 0, true),
            None => Follow::open(self.guest, self.id, 0, true).await?,
        };
        follow.begun = Some(self.begun);
        // From here on, the stream's own guard counts.
        drop(self.following);
        Ok(follow)
    }
}

/// The output of a command, which continues after an error of the connection.
pub(crate) struct Follow {
    guest: Guest,
    id: ExecId,
    output: Output,
    /// Offset of the next byte.
    next: u64,
    follow: bool,
    /// The start of the command, if this request started it.
    begun: Option<Instant>,
    reconnects: u32,
    /// The connection has ended, and the output is to be continued on another one.
    is_lost: bool,
    _following: Following,
}

/// Opens the output of a command.
///
/// # Errors
/// 404, 409, 503.
pub(crate) async fn output(
    host: &Host,
    reference: &str,
    id: &ExecId,
    since: u64,
    follow: bool,
) -> Result<Follow, ServiceError> {
    let guest = guest::reach(host, reference).await?;
    Follow::open(guest, id.clone(), since, follow).await
}

impl Follow {
    async fn open(guest: Guest, id: ExecId, since: u64, follow: bool) -> Result<Follow, ServiceError> {
        let output = guest.agent.output(id.as_str(), since, follow).await;
        let output = output.map_err(|error| guest.failed(&error))?;
        Ok(Follow::new(guest, id, output, since, follow))
    }

    fn new(guest: Guest, id: ExecId, output: Output, since: u64, follow: bool) -> Follow {
        let following = guest.host.execs.follow(&guest.record.id, &id);
        Follow {
            guest,
            id,
            output,
            next: since,
            follow,
            begun: None,
            reconnects: 0,
            is_lost: false,
            _following: following,
        }
    }

    /// Returns the VM of the command.
    pub(crate) fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Returns the next frame; `None` at the end of the output. For a followed command this is an
    /// interruption, unless [`Frame::End`] came before.
    ///
    /// # Errors
    /// 503 if the VM has ended, its agent does not respond any more, or the daemon stops.
    ///
    /// Cancellation: nothing is lost; call it again.
    pub(crate) async fn next(&mut self) -> Option<Result<Frame, ServiceError>> {
        loop {
            if self.is_lost
                && let Err(error) = self.reopen().await
            {
                return Some(Err(error));
            }
            let next = tokio::select! {
                next = self.output.next() => next,
                () = self.guest.host.closing.cancelled() => return Some(Err(self.stopping())),
            };
            let error = match next? {
                Ok(frame) => return Some(Ok(self.seen(frame))),
                Err(error) => error,
            };
            self.is_lost = matches!(error, AgentError::Unreachable { .. } | AgentError::Timeout { .. });
            if !self.is_lost || self.reconnects == MAX_RECONNECTS {
                return Some(Err(self.guest.failed(&error)));
            }
            self.reconnects += 1;
            tracing::debug!(exec = %self.id, %error, offset = self.next, "continuing the output of a command");
        }
    }

    async fn reopen(&mut self) -> Result<(), ServiceError> {
        self.guest.reconnect().await?;
        let output = self.guest.agent.output(self.id.as_str(), self.next, self.follow).await;
        self.output = output.map_err(|error| self.guest.failed(&error))?;
        self.is_lost = false;
        Ok(())
    }

    fn seen(&mut self, frame: Frame) -> Frame {
        let length = match &frame {
            Frame::Stdout { bytes, .. } | Frame::Stderr { bytes, .. } => bytes.len() as u64,
            Frame::Lost { count, .. } => *count,
            Frame::End { end, .. } => {
                exec_events::ended(&self.guest.host, &self.guest.record, &self.id, Some(*end));
                0
            }
        };
        self.next = self.next.saturating_add(length);
        self.reconnects = 0;
        frame
    }

    /// Returns how the command ended, with its duration.
    pub(crate) async fn end(&self, end: wire::ExecEnd) -> ExecEnd {
        let duration_ms = match self.begun {
            Some(begun) => u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            // The output has ended, so the agent responds; otherwise the duration is not known.
            None => self
                .guest
                .agent
                .exec(self.id.as_str())
                .await
                .map_or(0, |status| status.duration_ms),
        };
        ExecEnd {
            exit_code: end.exit_code,
            signal: end.signal.and_then(Signal::new),
            timed_out: end.timed_out,
            duration_ms,
        }
    }

    /// Returns the error of an output that ended before its command.
    pub(crate) fn interrupted(&self) -> ServiceError {
        self.guest.failed(&AgentError::Unreachable {
            why: "it ended the output early".to_owned(),
        })
    }

    fn stopping(&self) -> ServiceError {
        ServiceError::NotReady(format!(
            "scaleboxd is stopping; the command {} continues to run, and its output can be read later",
            self.id
        ))
    }
}

/// Lists the commands of a VM that run or have ended recently.
///
/// # Errors
/// 404, 409, 503.
pub(crate) async fn list(host: &Host, reference: &str) -> Result<Vec<Exec>, ServiceError> {
    let guest = guest::reach(host, reference).await?;
    let all = guest.agent.execs().await.map_err(|error| guest.failed(&error))?;
    all.into_iter()
        .map(|status| describe(status).map_err(|error| guest.failed(&error)))
        .collect()
}

/// Returns one command.
///
/// # Errors
/// 404, 409, 503.
pub(crate) async fn get(host: &Host, reference: &str, id: &ExecId) -> Result<Exec, ServiceError> {
    let guest = guest::reach(host, reference).await?;
    let status = guest.agent.exec(id.as_str()).await;
    status.and_then(describe).map_err(|error| guest.failed(&error))
}

fn describe(status: wire::ExecStatus) -> Result<Exec, AgentError> {
    let malformed = |why: &str| AgentError::Malformed { why: why.to_owned() };
    let started = i64::try_from(status.started_at_ms)
        .ok()
        .and_then(|time| jiff::Timestamp::from_millisecond(time).ok())
        .ok_or_else(|| malformed("the start time of an exec is out of range"))?;
    Ok(Exec {
        exec: status.id.parse().map_err(|_| malformed("an invalid id of an exec"))?,
        argv: status.argv,
        status: match (status.end, status.restarts) {
            (None, _) => ExecStatus::Running,
            (Some(_), Some(restarts)) if restarts.pending => ExecStatus::Restarting,
            (Some(_), _) => ExecStatus::Ended,
        },
        exit_code: status.end.and_then(|end| end.exit_code),
        signal: status.end.and_then(|end| end.signal).and_then(Signal::new),
        timed_out: status.end.map(|end| end.timed_out),
        started_at: rfc3339(started),
        duration_ms: status.duration_ms,
        tty: status.tty,
        output_start: status.output_start,
        output_end: status.output_end,
        restarts: status.restarts.map(|restarts| restarts.count),
    })
}

/// Sends a signal to a command and its children.
///
/// # Errors
/// 404; 409 also if the command has ended; 503.
pub(crate) async fn signal(host: &Host, reference: &str, id: &ExecId, signal: Signal) -> Result<(), ServiceError> {
    let guest = guest::reach(host, reference).await?;
    send_signal(&guest, id, signal).await
}

/// Sends a signal like [`signal`], to a command of a VM that was reached before.
pub(crate) async fn send_signal(guest: &Guest, id: &ExecId, signal: Signal) -> Result<(), ServiceError> {
    let signal = wire::Signal {
        signal: signal.number(),
    };
    let sent = guest.agent.signal(id.as_str(), signal).await;
    sent.map_err(|error| guest.failed(&error))
}

/// Sets the size of a command's terminal.
///
/// # Errors
/// 404; 409 also if the command has ended or has no terminal; 503.
pub(crate) async fn resize(host: &Host, reference: &str, id: &ExecId, size: WindowSize) -> Result<(), ServiceError> {
    let guest = guest::reach(host, reference).await?;
    send_size(&guest, id, size).await
}

/// Sets the size like [`resize`], for a command of a VM that was reached before.
pub(crate) async fn send_size(guest: &Guest, id: &ExecId, size: WindowSize) -> Result<(), ServiceError> {
    let sent = guest.agent.resize(id.as_str(), of_size(size)).await;
    sent.map_err(|error| guest.failed(&error))
}
