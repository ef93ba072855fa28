//! `GET /vms/{vm}/execs/{exec}/attach`: a command's terminal, or its pipes, as a WebSocket
//! (RFC 6455).

use crate::host::Host;
use crate::host::error::ServiceError;
use crate::http::error;
use crate::http::error_bodies::{RequestGuard, RequestsInProgress};
use crate::http::extract::ExecPath;
use crate::http::query::{MAX_OFFSET, Params};
use crate::vm::exec::{self, Follow};
use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::Uri;
use axum::response::Response;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use scalebox_agent_api::frame::Frame;
use scalebox_api::AttachMessage;
use scalebox_api::attach::{MAX_MESSAGE_BYTES, SUBPROTOCOL};
use scalebox_guest::{AgentError, Upload};
use scalebox_units::ExecId;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval_at, sleep_until};

/// Interval of pings.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// Maximum time without a message from the client, pongs included. The client is disconnected after
/// it.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Messages for stdin that wait for the command.
const MAX_WAITING: usize = 8;
/// Maximum size of a message from the client: the content and the channel.
const MAX_RECEIVED: usize = MAX_MESSAGE_BYTES + 1;

/// Attaches to a command: its output, stdin, window size and signals.
///
/// Several clients may attach to one command. A client that leaves does not end the command.
#[utoipa::path(
    get, path = "/vms/{vm}/execs/{exec}/attach", tag = "Exec",
    params(
        ("vm" = String, Path, description = "Id or name of the VM."), ("exec" = String, Path, description = "Id of the exec."),
        ("since" = Option<u64>, Query, description = "Offset of the first byte of output; by default 0."),
    ),
    responses(
        (status = 101, description = "A WebSocket with the subprotocol `v1.exec.scalebox`. The first byte of each binary message is its channel: 0 stdin, 1 stdout, 2 stderr, 3 end, 4 window size, 5 signal, 255 end of stdin."),
        (status = 400, description = "The request is not the beginning of a WebSocket, or a query parameter is invalid."),
        (status = 404, description = "No such VM or exec."),
        (status = 409, description = "The VM is not running."),
        (status = 503, description = "The VM's agent does not respond."),
    )
)]
pub(crate) async fn attach(
    State(host): State<Host>,
    ExecPath { vm, exec }: ExecPath,
    uri: Uri,
    in_progress: Option<Extension<RequestsInProgress>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ServiceError> {
    let upgrade = upgrade
        .map_err(|error| ServiceError::invalid(format!("cannot attach without a WebSocket: {}", error.body_text())))?;
    let since = Params::parse(&uri, &["since"])?
        .number("since", MAX_OFFSET)?
        .unwrap_or(0);
    let follow = exec::output(&host, &vm, &exec, since, true).await?;
    // The connection's bytes are not HTTP any more, as long as the client is attached.
    let guard = in_progress.map(|Extension(requests)| requests.begin());
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(MAX_RECEIVED)
        .max_frame_size(MAX_RECEIVED);
    Ok(upgrade.on_upgrade(move |socket| Session::new(socket, follow, exec, guard).run()))
}

/// An attached client.
struct Session {
    messages: SplitStream<WebSocket>,
    client: SplitSink<WebSocket, Message>,
    follow: Follow,
    exec: ExecId,
    /// Messages on their way to the command.
    stdin: mpsc::Sender<AttachMessage>,
    /// A message for which there was no space.
    waiting: Option<AttachMessage>,
    heard: Instant,
    _guard: Option<RequestGuard>,
}

/// The reason why a session ends.
enum End {
    /// The client has left.
    Left,
    /// The last message for the client.
    Last(AttachMessage),
}

impl Session {
    fn new(socket: WebSocket, follow: Follow, exec: ExecId, guard: Option<RequestGuard>) -> Session {
        let (client, messages) = socket.split();
        let (stdin, messages_for_stdin) = mpsc::channel(MAX_WAITING);
        let agent = follow.guest().agent.clone();
        tokio::spawn(write_stdin(agent, exec.clone(), messages_for_stdin));
        Session {
            messages,
            client,
            follow,
            exec,
            stdin,
            waiting: None,
            heard: Instant::now(),
            _guard: guard,
        }
    }

    async fn run(mut self) {
        tracing::debug!(exec = %self.exec, "client attached");
        let end = self.serve().await;
        if let End::Last(message) = end {
            // The client may have left.
            let _ = self.client.send(Message::binary(message.encode())).await;
            let _ = self.client.send(Message::Close(None)).await;
        }
        tracing::debug!(exec = %self.exec, "client detached");
    }

    async fn serve(&mut self) -> End {
        let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        loop {
            let has_space = self.waiting.is_none();
            let served = tokio::select! {
                frame = self.follow.next() => self.send(frame).await,
                message = self.messages.next(), if has_space => self.receive(message).await,
                permit = self.stdin.clone().reserve_owned(), if !has_space => {
                    if let (Ok(permit), Some(message)) = (permit, self.waiting.take()) {
                        permit.send(message);
                    }
                    Ok(())
                }
                _ = pings.tick() => self.client.send(Message::Ping(Bytes::new())).await.map_err(|_| End::Left),
                () = sleep_until(self.heard + CLIENT_TIMEOUT), if has_space => Err(End::Left),
            };
            if let Err(end) = served {
                return end;
            }
        }
    }

    /// Sends output, or ends the session.
    async fn send(&mut self, frame: Option<Result<Frame, ServiceError>>) -> Result<(), End> {
        let failed = |error: &ServiceError| End::Last(AttachMessage::Failed(Box::new(error::body(error))));
        let message = match frame {
            None => return Err(failed(&self.follow.interrupted())),
            Some(Err(error)) => return Err(failed(&error)),
            Some(Ok(Frame::End { end, .. })) => return Err(End::Last(AttachMessage::End(self.follow.end(end).await))),
            // The protocol has no message for lost output: a terminal shows the rest.
            Some(Ok(Frame::Lost { .. })) => return Ok(()),
            Some(Ok(Frame::Stdout { bytes, .. })) => AttachMessage::Stdout(bytes),
            Some(Ok(Frame::Stderr { bytes, .. })) => AttachMessage::Stderr(bytes),
        };
        let message = Message::binary(message.encode());
        self.client.send(message).await.map_err(|_| End::Left)
    }

    async fn receive(&mut self, message: Option<Result<Message, axum::Error>>) -> Result<(), End> {
        self.heard = Instant::now();
        let invalid = |why: String| {
            let error = ServiceError::invalid(why);
            Err(End::Last(AttachMessage::Failed(Box::new(error::body(&error)))))
        };
        let content = match message {
            None | Some(Err(_)) | Some(Ok(Message::Close(_))) => return Err(End::Left),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => return Ok(()),
            Some(Ok(Message::Text(_))) => return invalid("send binary messages, not text".to_owned()),
            Some(Ok(Message::Binary(content))) => content,
        };
        let guest = self.follow.guest();
        let done = match AttachMessage::decode(&content) {
            Err(error) => return invalid(error.to_string()),
            Ok(message @ (AttachMessage::Stdin(_) | AttachMessage::CloseStdin)) => {
                self.waiting = Some(message);
                return Ok(());
            }
            Ok(AttachMessage::Resize(size)) => exec::send_size(guest, &self.exec, size).await,
            Ok(AttachMessage::Signal(signal)) => exec::send_signal(guest, &self.exec, signal).await,
            Ok(_) => return invalid("the message has a channel of the daemon".to_owned()),
        };
        if let Err(error) = done {
            // Common for a command that has just ended; its output has the result.
            tracing::debug!(exec = %self.exec, %error, "a message of an attached client failed");
        }
        Ok(())
    }
}

/// Writes messages to a command's stdin, in their order. Ends when the client leaves, or when
/// stdin is closed; later messages are dropped.
async fn write_stdin(agent: crate::host::agent_link::Agent, exec: ExecId, mut messages: mpsc::Receiver<AttachMessage>) {
    let mut result: Result<(), AgentError> = Ok(());
    while let Some(message) = messages.recv().await {
        if result.is_err() {
            continue;
        }
        result = match message {
            AttachMessage::Stdin(bytes) => agent.write_stdin(exec.as_str(), Upload::bytes(bytes), false).await,
            _ => agent.write_stdin(exec.as_str(), Upload::bytes(Vec::new()), true).await,
        };
        if let Err(error) = &result {
            tracing::debug!(%exec, %error, "stdin of a command was not written");
        }
    }
}
