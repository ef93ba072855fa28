//! One HTTP/2 connection to the agent.

use crate::agent::budget::{Budget, Budgeted};
use crate::agent::error::AgentError;
use crate::agent::hello::greet;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http_body_util::combinators::{BoxBody, UnsyncBoxBody};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use scalebox_agent_api::AgentFailure;
use scalebox_agent_api::hello::MAX_FRAME;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

/// Maximum size of a response's headers, in bytes.
const MAX_HEADERS: u32 = 16 << 10;
/// Unread data of one stream, in bytes.
const STREAM_WINDOW: u32 = 256 << 10;
/// Unread data of all streams, in bytes.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Data that waits for the guest to read it, for each stream, in bytes.
const MAX_SEND_BUFFER: usize = 256 << 10;
/// Interval of pings while a stream is open.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// Time for the response to a ping, after which the connection is closed.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum size of a response in JSON, in bytes: the largest listing, or an exec with the largest
/// arguments, escaped.
const MAX_JSON: usize = 8 << 20;
/// Maximum size of the JSON of an error, in bytes. Its sentence may have the longest argument,
/// escaped.
const MAX_FAILURE: usize = 1 << 20;
/// Maximum length of an error's sentence, in characters.
const MAX_SENTENCE: usize = 1000;
/// Time limit for the guest to read more of an upload, and to store it.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

type RequestBody = UnsyncBoxBody<Bytes, io::Error>;
type ResponseBody = BoxBody<Bytes, hyper::Error>;

/// A connection to the agent of one guest. Clones share it; dropping the last one closes it.
#[derive(Clone)]
pub struct AgentConnection {
    sender: http2::SendRequest<RequestBody>,
    shared: Arc<Shared>,
}

struct Shared {
    /// Another handle on the stream, to close it while requests are in progress.
    socket: StdStream,
    budget: Arc<Budget>,
    /// `true` once the connection has ended.
    ended: watch::Receiver<bool>,
}

impl AgentConnection {
    /// Waits until the agent at the other end of `stream` responds, and starts a connection. Needs
    /// a Tokio runtime.
    ///
    /// # Errors
    /// [`AgentError::Timeout`] after `within`; [`AgentError::Unreachable`];
    /// [`AgentError::Malformed`].
    pub async fn open(mut stream: UnixStream, within: Duration) -> Result<AgentConnection, AgentError> {
        greet(&mut stream, within).await?;
        let stream = stream.into_std().map_err(AgentError::unreachable)?;
        let socket = stream.try_clone().map_err(AgentError::unreachable)?;
        let stream = UnixStream::from_std(stream).map_err(AgentError::unreachable)?;
        let budget = Budget::new();
        let stream = Budgeted::new(stream, Arc::clone(&budget));
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .max_frame_size(MAX_FRAME as u32)
            .max_header_list_size(MAX_HEADERS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(MAX_SEND_BUFFER)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(false);
        let (sender, connection) = http
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| AgentError::http(&error, PING_TIMEOUT))?;
        let (end, ended) = watch::channel(false);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = %AgentError::http(&error, PING_TIMEOUT), "a connection to a guest's agent ended");
            }
            end.send_replace(true);
        });
        let shared = Arc::new(Shared { socket, budget, ended });
        Ok(AgentConnection { sender, shared })
    }

    /// Returns whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed() || *self.shared.ended.borrow()
    }

    /// Waits until the connection has ended.
    pub async fn closed(&self) {
        let mut ended = self.shared.ended.clone();
        // An error means that the connection's task has ended.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Closes the connection. Requests and streams in progress end with an error at once.
    pub fn close(&self) {
        // An error means that the stream is closed.
        let _ = self.shared.socket.shutdown(Shutdown::Both);
    }

    /// Sends a request and waits for the head of its response.
    pub(crate) async fn send(&self, call: Call, within: Duration) -> Result<Response<ResponseBody>, AgentError> {
        let timed_out = AgentError::Timeout { after: within };
        let begun = Instant::now();
        let sent = timeout(within, self.dispatch(call)).await;
        self.successful(sent.unwrap_or(Err(timed_out))?, begun + within).await
    }

    /// Sends a request without content, and waits for a response in JSON.
    pub(crate) async fn json<T: DeserializeOwned>(&self, call: Call, within: Duration) -> Result<T, AgentError> {
        let timed_out = AgentError::Timeout { after: within };
        let received = timeout(within, async {
            let response = self.send(call, within).await?;
            read_json(response.into_body()).await
        });
        received.await.unwrap_or(Err(timed_out))
    }

    /// Sends a request, and waits for a response without content.
    pub(crate) async fn done(&self, call: Call, within: Duration) -> Result<(), AgentError> {
        self.send(call, within).await.map(drop)
    }

    /// Sends an upload and waits for the head of the response, as long as the guest makes progress.
    pub(crate) async fn upload(&self, call: Call, upload: Upload) -> Result<Response<ResponseBody>, AgentError> {
        let progress = Arc::new(Progress::new());
        let (noted, budget) = (Arc::clone(&progress), Arc::clone(&self.shared.budget));
        let pieces = upload.0.map(move |piece| {
            noted.note();
            piece.map(|bytes| {
                budget.body(bytes.len());
                Frame::data(bytes)
            })
        });
        let body = BodyExt::boxed_unsync(StreamBody::new(pieces));
        let response = tokio::select! {
            response = self.dispatch(Call { body, ..call }) => response?,
            () = progress.stalls() => return Err(AgentError::Timeout { after: STALL_TIMEOUT }),
        };
        self.successful(response, Instant::now() + STALL_TIMEOUT).await
    }

    async fn dispatch(&self, call: Call) -> Result<Response<ResponseBody>, AgentError> {
        self.shared.budget.request();
        // HTTP/2 requires an authority, which has no meaning here.
        let uri = format!("http://agent{}", call.target);
        let request = Request::builder().method(call.method).uri(uri).body(call.body);
        let request = request.map_err(AgentError::malformed)?;
        let mut sender = self.sender.clone();
        let response = sender.send_request(request).await;
        let response = response.map_err(|error| AgentError::http(&error, PING_TIMEOUT))?;
        let budget = Arc::clone(&self.shared.budget);
        Ok(response.map(|body| counted(body, budget)))
    }

    async fn successful(
        &self,
        response: Response<ResponseBody>,
        deadline: Instant,
    ) -> Result<Response<ResponseBody>, AgentError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        if !(status.is_client_error() || status.is_server_error()) {
            return Err(AgentError::malformed(format!("the status {status}")));
        }
        let reading = tokio::time::timeout_at(deadline, read_failure(status, response.into_body()));
        Err(reading
            .await
            .unwrap_or_else(|_| AgentError::malformed("an incomplete error")))
    }
}

/// Adds the data of a body to the budget.
fn counted(body: Incoming, budget: Arc<Budget>) -> ResponseBody {
    let count = move |frame: Frame<Bytes>| {
        budget.body(frame.data_ref().map_or(0, Bytes::len));
        frame
    };
    body.map_frame(count).boxed()
}

/// A request.
pub(crate) struct Call {
    method: Method,
    /// Path and query.
    target: String,
    body: RequestBody,
}

impl Call {
    pub(crate) fn new(method: Method, target: String) -> Call {
        Call {
            method,
            target,
            body: full(Bytes::new()),
        }
    }

    pub(crate) fn get(target: String) -> Call {
        Call::new(Method::GET, target)
    }

    pub(crate) fn post(target: String) -> Call {
        Call::new(Method::POST, target)
    }

    /// Adds a body in JSON. The protocol's types cannot fail to be serialised.
    pub(crate) fn with_json(self, value: &impl Serialize) -> Call {
        let json = serde_json::to_vec(value).unwrap_or_default();
        Call {
            body: full(json.into()),
            ..self
        }
    }
}

fn full(bytes: Bytes) -> RequestBody {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// Reads a response in JSON, of at most [`MAX_JSON`] bytes.
pub(crate) async fn read_json<T: DeserializeOwned>(body: ResponseBody) -> Result<T, AgentError> {
    let body = collect(body, MAX_JSON).await?;
    serde_json::from_slice(&body).map_err(AgentError::malformed)
}

async fn read_failure(status: StatusCode, body: ResponseBody) -> AgentError {
    let body = match collect(body, MAX_FAILURE).await {
        Ok(body) => body,
        Err(error) => return error,
    };
    match serde_json::from_slice::<AgentFailure>(&body) {
        Ok(failure) => AgentError::Refused(AgentFailure {
            error: sentence(&failure.error),
            code: failure.code,
        }),
        Err(_) => AgentError::malformed(format!("the status {status} without an error")),
    }
}

/// Returns an error's sentence on one line of bounded length: it comes from the guest.
fn sentence(text: &str) -> String {
    let printable = |char: char| if char.is_control() { ' ' } else { char };
    text.chars().take(MAX_SENTENCE).map(printable).collect()
}

async fn collect(body: ResponseBody, max: usize) -> Result<Bytes, AgentError> {
    let collected = Limited::new(body, max).collect().await;
    collected.map(|body| body.to_bytes()).map_err(|error| {
        if error.is::<LengthLimitError>() {
            return AgentError::malformed(format!("a response of more than {max} bytes"));
        }
        match error.downcast::<hyper::Error>() {
            Ok(error) => AgentError::http(&error, PING_TIMEOUT),
            Err(other) => AgentError::unreachable(other),
        }
    })
}

/// Bytes to send to the agent, which may arrive over time.
pub struct Upload(std::pin::Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>);

impl Upload {
    /// Returns an upload of bytes in memory.
    pub fn bytes(bytes: impl Into<Bytes>) -> Upload {
        let bytes = bytes.into();
        let piece = (!bytes.is_empty()).then_some(Ok(bytes));
        Upload::stream(futures::stream::iter(piece))
    }

    /// Returns an upload of a stream. An error of the stream resets the request, so that the agent
    /// does not treat it as complete.
    pub fn stream(pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Upload {
        Upload(Box::pin(pieces))
    }
}

/// Bytes from the agent. Dropping it stops the agent from sending more.
pub struct Download {
    body: ResponseBody,
    /// Keeps the connection open.
    _connection: AgentConnection,
}

impl Download {
    pub(crate) fn new(body: ResponseBody, connection: &AgentConnection) -> Download {
        Download {
            body,
            _connection: connection.clone(),
        }
    }

    /// Returns the next piece, of at most 16 KiB; `None` at the end. The wait has no time limit,
    /// but ends with an error if the agent does not respond to pings.
    ///
    /// # Errors
    /// If the agent interrupts the stream, or the connection ends.
    pub async fn next(&mut self) -> Option<Result<Bytes, AgentError>> {
        loop {
            let frame = match self.body.frame().await? {
                Ok(frame) => frame,
                Err(error) => return Some(Err(AgentError::http(&error, PING_TIMEOUT))),
            };
            // Trailers are not part of the protocol.
            match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => return Some(Ok(data)),
                Err(_trailers) => {}
            }
        }
    }
}

/// Returns the value of a header, parsed.
pub(crate) fn header<T>(headers: &HeaderMap, name: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T, AgentError> {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value
        .and_then(parse)
        .ok_or_else(|| AgentError::malformed(format!("a response without a valid header {name}")))
}

/// The time at which the guest last took a piece of an upload.
struct Progress(Mutex<Instant>);

impl Progress {
    fn new() -> Progress {
        Progress(Mutex::new(Instant::now()))
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Waits until there was no progress for [`STALL_TIMEOUT`].
    async fn stalls(&self) {
        loop {
            let deadline = *self.0.lock().unwrap_or_else(PoisonError::into_inner) + STALL_TIMEOUT;
            if Instant::now() >= deadline {
                return;
            }
            sleep_until(deadline).await;
        }
    }
}
