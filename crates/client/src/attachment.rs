//! A connection to the input and output of a running command.
//!
//! One thread owns the WebSocket. Any thread may send messages through an [`AttachSender`], while
//! another one receives from the [`Attachment`]. Both directions are bounded: a sender waits while
//! the server does not read, and the server waits while the receiver does not.

use crate::error::ClientError;
use crate::transport::Socket;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use scalebox_api::AttachMessage;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};
use tungstenite::{Bytes, Message};

/// Maximum number of messages that wait in each direction.
const QUEUE: usize = 16;
/// Content of the ping that follows the end of stdin.
const END_OF_STDIN: &[u8] = b"end of stdin";
/// Maximum silence of the server, which sends a ping every 20 seconds.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum time to send the last messages after the attachment was dropped.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection to the input and output of a command. Dropping it disconnects; the command
/// continues to run.
pub struct Attachment {
    incoming: Receiver<Result<AttachMessage, ClientError>>,
    sender: AttachSender,
    dropped: Arc<AtomicBool>,
    stdin_received: Arc<AtomicBool>,
}

/// Sends messages to an attached command.
#[derive(Clone)]
pub struct AttachSender {
    outgoing: SyncSender<AttachMessage>,
    wake: Arc<OwnedFd>,
}

/// The attachment has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection to the command has ended")]
pub struct Detached;

impl AttachSender {
    /// Queues a message. Waits while the queue is full.
    ///
    /// # Errors
    /// [`Detached`] if the connection has ended.
    pub fn send(&self, message: AttachMessage) -> Result<(), Detached> {
        self.outgoing.send(message).map_err(|_| Detached)?;
        wake(&self.wake);
        Ok(())
    }
}

impl Attachment {
    pub(crate) fn start(socket: Socket, call: String) -> Result<Self, ClientError> {
        let failed = |error: io::Error| ClientError::Lost {
            call: call.clone(),
            why: error.to_string(),
            hint: HINT,
        };
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = Arc::new(event.map_err(|error| failed(error.into()))?);
        let (outgoing, queued) = sync_channel(QUEUE);
        let (received, incoming) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicBool::new(false));
        let stdin_received = Arc::new(AtomicBool::new(false));
        let connection = Connection {
            socket,
            queued,
            received,
            wake: event.clone(),
            dropped: dropped.clone(),
            stdin_received: stdin_received.clone(),
            call: call.clone(),
        };
        let thread = thread::Builder::new().name("attachment".to_owned());
        thread.spawn(move || connection.run()).map_err(failed)?;
        let sender = AttachSender { outgoing, wake: event };
        Ok(Attachment {
            incoming,
            sender,
            dropped,
            stdin_received,
        })
    }

    /// Returns a sender, for use in any thread.
    pub fn sender(&self) -> AttachSender {
        self.sender.clone()
    }

    /// Returns whether the server has received the end of stdin, and so everything before it.
    pub fn is_stdin_received(&self) -> bool {
        self.stdin_received.load(Ordering::SeqCst)
    }

    /// Waits for the next message. The last one is [`AttachMessage::End`] or
    /// [`AttachMessage::Failed`].
    ///
    /// # Errors
    /// [`ClientError::Lost`] if the connection ended before the command did, and
    /// [`ClientError::Protocol`].
    pub fn receive(&self) -> Result<AttachMessage, ClientError> {
        self.incoming.recv().unwrap_or_else(|_| {
            Err(ClientError::Lost {
                call: "the attached command".to_owned(),
                why: "the connection has ended".to_owned(),
                hint: HINT,
            })
        })
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
        wake(&self.sender.wake);
    }
}

const HINT: &str = "the command may still run: scalebox exec --list shows it";

fn wake(event: &OwnedFd) {
    // Fails only if the counter is at its maximum, and then the thread is woken anyway.
    let _woken = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// The state of the thread that owns the WebSocket.
struct Connection {
    socket: Socket,
    queued: Receiver<AttachMessage>,
    received: SyncSender<Result<AttachMessage, ClientError>>,
    wake: Arc<OwnedFd>,
    dropped: Arc<AtomicBool>,
    stdin_received: Arc<AtomicBool>,
    call: String,
}

/// The next step of the connection's thread.
#[derive(PartialEq, Eq)]
enum Next {
    Continue,
    End,
}

impl Connection {
    fn run(mut self) {
        let (mut heard, mut closing) = (Instant::now(), None);
        loop {
            let next = self.read(&mut heard).and_then(|next| match next {
                Next::End => Ok((Next::End, false)),
                Next::Continue => self.write().map(|unsent| (Next::Continue, unsent)),
            });
            let unsent = match next {
                Ok((Next::Continue, unsent)) => unsent,
                Ok((Next::End, _)) => return,
                Err(error) => {
                    // The receiver may be gone.
                    let _unheard = self.received.send(Err(error));
                    return;
                }
            };
            if self.dropped.load(Ordering::SeqCst) {
                let since: &mut Instant = closing.get_or_insert_with(Instant::now);
                if !unsent || since.elapsed() >= CLOSE_TIMEOUT {
                    return;
                }
            }
            if heard.elapsed() >= IDLE_TIMEOUT {
                let why = format!("no message within {} s", IDLE_TIMEOUT.as_secs());
                let _unheard = self.received.send(Err(self.lost(why)));
                return;
            }
            self.wait(unsent);
        }
    }

    /// Waits until the socket or the queue has something to do, for at most a second.
    fn wait(&self, unsent: bool) {
        let mut flags = PollFlags::IN;
        if unsent {
            flags |= PollFlags::OUT;
        }
        let stream = self.socket.get_ref();
        let mut fds = [PollFd::new(stream, flags), PollFd::new(&*self.wake, PollFlags::IN)];
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        // An interruption by a signal is a spurious wake-up.
        let _ready = poll(&mut fds, Some(&second));
        let mut counter = [0; 8];
        let _counted = rustix::io::read(&*self.wake, &mut counter);
    }

    /// Forwards all messages that have arrived.
    fn read(&mut self, heard: &mut Instant) -> Result<Next, ClientError> {
        loop {
            let message = match self.socket.read() {
                Ok(message) => message,
                Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Next::Continue);
                }
                Err(error) => return Err(self.failed(error)),
            };
            *heard = Instant::now();
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Pong(token) if *token == *END_OF_STDIN => {
                    self.stdin_received.store(true, Ordering::SeqCst);
                    continue;
                }
                _ => continue,
            };
            let message = AttachMessage::decode(&bytes).map_err(|why| self.protocol(why.to_string()))?;
            let is_last = matches!(message, AttachMessage::End(_) | AttachMessage::Failed(_));
            if self.received.send(Ok(message)).is_err() || is_last {
                return Ok(Next::End);
            }
        }
    }

    /// Sends queued messages while the socket takes them. Returns whether bytes are unsent.
    fn write(&mut self) -> Result<bool, ClientError> {
        loop {
            match self.socket.flush() {
                Ok(()) => {}
                Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(self.failed(error)),
            }
            let message = match self.queued.try_recv() {
                Ok(message) => message,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(false),
            };
            let is_end_of_stdin = message == AttachMessage::CloseStdin;
            self.queue(Message::Binary(message.encode().into()))?;
            if is_end_of_stdin {
                // The response to this ping confirms everything before it.
                self.queue(Message::Ping(Bytes::from_static(END_OF_STDIN)))?;
            }
        }
    }

    /// Adds a message to the bytes that the next flush sends.
    fn queue(&mut self, message: Message) -> Result<(), ClientError> {
        match self.socket.write(message) {
            Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result.map_err(|error| self.failed(error)),
        }
    }

    fn failed(&self, error: tungstenite::Error) -> ClientError {
        use tungstenite::Error::{AlreadyClosed, ConnectionClosed, Io, Protocol};
        use tungstenite::error::ProtocolError::ResetWithoutClosingHandshake;
        match error {
            ConnectionClosed | AlreadyClosed | Protocol(ResetWithoutClosingHandshake) => {
                self.lost("the server closed the connection".to_owned())
            }
            Io(error) => self.lost(error.to_string()),
            error => self.protocol(format!("an invalid message ({error})")),
        }
    }

    fn lost(&self, why: String) -> ClientError {
        ClientError::Lost {
            call: self.call.clone(),
            why,
            hint: HINT,
        }
    }

    fn protocol(&self, why: String) -> ClientError {
        ClientError::Protocol {
            call: self.call.clone(),
            why,
        }
    }
}
