//! Connects this process to a command in a VM: its streams, its terminal and its signals.

use crate::error::Error;
use crate::output::Output;
use crate::signals::on_signal;
use crate::terminal::{RawMode, window_size};
use scalebox_api::{AttachMessage, ExecEnd, ExecId, Signal};
use scalebox_client::{AttachSender, Attachment, Client, ClientError};
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Exit code if a command was killed because of its timeout, as of timeout(1).
const TIMED_OUT: u8 = 124;
/// Exit code if scalebox itself fails, as of docker.
pub(crate) const FAILED: u8 = 125;

/// Maximum time to reconnect: longer than a restart of the daemon.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(30);
const RECONNECT_INTERVAL: Duration = Duration::from_millis(250);

/// Size of a piece of standard input.
const PIECE: usize = 32 << 10;

/// The present connection to a command, shared by the threads that send to it.
pub(crate) struct Link {
    state: Mutex<LinkState>,
    changed: Condvar,
}

enum LinkState {
    Connected(AttachSender),
    /// The connection is lost, and a new one is being made.
    Reconnecting,
    Closed,
}

impl Link {
    fn new(sender: AttachSender) -> Self {
        Link {
            state: Mutex::new(LinkState::Connected(sender)),
            changed: Condvar::new(),
        }
    }

    /// Sends a message, after a reconnection if there is one. Returns false if the connection is
    /// lost.
    pub(crate) fn send(&self, message: AttachMessage) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_reconnecting = |state: &mut LinkState| matches!(state, LinkState::Reconnecting);
        let state = self.changed.wait_while(state, is_reconnecting);
        let sender = match &*state.unwrap_or_else(PoisonError::into_inner) {
            LinkState::Connected(sender) => sender.clone(),
            LinkState::Reconnecting | LinkState::Closed => return false,
        };
        // The lock is released before sending, which waits while the server does not read.
        sender.send(message).is_ok()
    }

    fn enter(&self, state: LinkState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.changed.notify_all();
    }
}

/// A command in a VM whose output this process receives.
pub(crate) struct Session<'c> {
    client: &'c Client,
    vm: &'c str,
    exec: ExecId,
    attachment: Attachment,
    link: Arc<Link>,
    /// Offset of the next byte of the output.
    offset: u64,
    /// `true` if the server has received all of standard input, on this connection or an earlier
    /// one.
    is_stdin_received: bool,
    stdin: Stdin,
    raw_mode: Option<RawMode>,
}

/// The use of standard input.
enum Stdin {
    /// Standard input is not sent.
    Unused,
    /// Standard input is the terminal of the command.
    Terminal,
    /// Standard input is sent.
    Stream(Arc<Forwarded>),
}

/// The progress of the thread that sends standard input. It sets each field before it sends.
#[derive(Default)]
struct Forwarded {
    content: AtomicBool,
    end: AtomicBool,
}

impl<'c> Session<'c> {
    /// Connects to a command, whose output is shown from `offset` on.
    pub(crate) fn attach(client: &'c Client, vm: &'c str, exec: ExecId, offset: u64) -> Result<Self, Error> {
        let attachment = client.attach(vm, &exec, offset)?;
        let link = Arc::new(Link::new(attachment.sender()));
        Ok(Session {
            client,
            vm,
            exec,
            attachment,
            link,
            offset,
            is_stdin_received: false,
            stdin: Stdin::Unused,
            raw_mode: None,
        })
    }

    pub(crate) fn link(&self) -> Arc<Link> {
        self.link.clone()
    }

    /// Sends standard input to the command.
    pub(crate) fn send_stdin(&mut self) -> Result<(), Error> {
        let forwarded = Arc::new(Forwarded::default());
        let (link, sent) = (self.link(), forwarded.clone());
        let thread = thread::Builder::new().name("stdin".to_owned());
        thread
            .spawn(move || forward_stdin(&link, &sent))
            .map_err(Error::Terminal)?;
        self.stdin = Stdin::Stream(forwarded);
        Ok(())
    }

    /// Makes this terminal the terminal of the command.
    pub(crate) fn take_terminal(&mut self) -> Result<(), Error> {
        self.raw_mode = Some(RawMode::enter().map_err(Error::Terminal)?);
        self.send_stdin()?;
        self.stdin = Stdin::Terminal;
        let link = self.link();
        let resize = move || {
            link.send(AttachMessage::Resize(window_size()));
        };
        on_signal(rustix::process::Signal::WINCH, resize).map_err(Error::Terminal)?;
        // The size may have changed since the command was started.
        self.link.send(AttachMessage::Resize(window_size()));
        // A signal must not kill this process in raw mode, because the terminal would stay in raw
        // mode.
        self.forward(Signal::QUIT)
    }

    /// Forwards the signals that end a program to the command.
    pub(crate) fn forward_signals(&self) -> Result<(), Error> {
        [Signal::HUP, Signal::INT, Signal::TERM]
            .into_iter()
            .try_for_each(|signal| self.forward(signal))
    }

    fn forward(&self, signal: Signal) -> Result<(), Error> {
        let link = self.link();
        let Some(received) = rustix::process::Signal::from_named_raw(signal.number()) else {
            return Ok(());
        };
        let forward = move || {
            link.send(AttachMessage::Signal(signal));
        };
        on_signal(received, forward).map_err(Error::Terminal)
    }

    /// Shows the output until the command ends. Reconnects if the connection is lost.
    pub(crate) fn run(mut self, output: &Output) -> Result<ExecEnd, Error> {
        let mut is_read = true;
        loop {
            let written = match self.attachment.receive() {
                Ok(AttachMessage::Stdout(bytes)) => self.show(&bytes, is_read, &mut io::stdout().lock()),
                Ok(AttachMessage::Stderr(bytes)) => self.show(&bytes, is_read, &mut io::stderr().lock()),
                Ok(AttachMessage::End(end)) => return Ok(end),
                Ok(AttachMessage::Failed(error)) => return Err(Error::Exec(error)),
                Ok(_) => Ok(()),
                Err(ClientError::Lost { call, why, hint }) => {
                    self.reconnect(ClientError::Lost { call, why, hint }, output)?;
                    Ok(())
                }
                Err(error) => return Err(error.into()),
            };
            match written {
                Ok(()) => {}
                // The reader has closed the pipe. The command receives SIGPIPE, as if it wrote to
                // the pipe itself.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    is_read = false;
                    self.link.send(AttachMessage::Signal(Signal::PIPE));
                }
                Err(error) => return Err(Error::Output(error)),
            }
        }
    }

    fn show(&mut self, bytes: &[u8], is_read: bool, out: &mut dyn Write) -> io::Result<()> {
        self.offset += bytes.len() as u64;
        if !is_read {
            return Ok(());
        }
        out.write_all(bytes)?;
        out.flush()
    }

    fn reconnect(&mut self, lost: ClientError, output: &Output) -> Result<(), Error> {
        self.link.enter(LinkState::Reconnecting);
        self.is_stdin_received |= self.attachment.is_stdin_received();
        // Parts of standard input may be lost, and the command could not detect that.
        if let Stdin::Stream(forwarded) = &self.stdin
            && forwarded.content.load(Ordering::SeqCst)
            && !self.is_stdin_received
        {
            self.link.enter(LinkState::Closed);
            return Err(lost.into());
        }
        if self.raw_mode.is_none() {
            output.hint("lost the connection to the server; reconnecting");
        }
        self.attachment = self
            .attach_again()
            .inspect_err(|_| self.link.enter(LinkState::Closed))?;
        self.link.enter(LinkState::Connected(self.attachment.sender()));
        // The window size and the end of standard input are sent again on the new connection.
        match &self.stdin {
            Stdin::Terminal => self.link.send(AttachMessage::Resize(window_size())),
            Stdin::Stream(forwarded) if forwarded.end.load(Ordering::SeqCst) => {
                self.link.send(AttachMessage::CloseStdin)
            }
            Stdin::Stream(_) | Stdin::Unused => true,
        };
        Ok(())
    }

    fn attach_again(&self) -> Result<Attachment, ClientError> {
        let began = Instant::now();
        loop {
            let why = match self.client.attach(self.vm, &self.exec, self.offset) {
                Ok(attachment) => return Ok(attachment),
                Err(error) => error,
            };
            let may_return = match &why {
                ClientError::Unreachable { .. } | ClientError::Lost { .. } => true,
                error => error.status() == Some(503),
            };
            if !may_return || began.elapsed() >= RECONNECT_TIMEOUT {
                return Err(why);
            }
            thread::sleep(RECONNECT_INTERVAL);
        }
    }
}

fn forward_stdin(link: &Link, forwarded: &Forwarded) {
    let (mut stdin, mut piece) = (io::stdin().lock(), vec![0; PIECE]);
    loop {
        let read = match stdin.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        forwarded.content.store(true, Ordering::SeqCst);
        link.send(AttachMessage::Stdin(piece[..read].to_vec()));
    }
    forwarded.end.store(true, Ordering::SeqCst);
    link.send(AttachMessage::CloseStdin);
}

/// Returns the exit code of this process for the end of a command.
pub(crate) fn exit_code(end: &ExecEnd) -> ExitCode {
    ExitCode::from(exit_number(end))
}

fn exit_number(end: &ExecEnd) -> u8 {
    let signal = end.signal.and_then(|signal| u8::try_from(128 + signal.number()).ok());
    let code = end.exit_code.and_then(|code| u8::try_from(code).ok());
    match end.timed_out {
        true => TIMED_OUT,
        false => signal.or(code).unwrap_or(FAILED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        let end = |exit_code, signal, timed_out| ExecEnd {
            exit_code,
            signal,
            timed_out,
            duration_ms: 1,
        };
        for (end, code) in [
            (end(Some(0), None, false), 0),
            (end(Some(255), None, false), 255),
            (end(None, Some(Signal::KILL), false), 137),
            (end(None, Some(Signal::KILL), true), 124),
            (end(Some(300), None, false), 125),
            (end(None, None, false), 125),
        ] {
            assert_eq!(exit_number(&end), code);
        }
    }
}
