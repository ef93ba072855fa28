//! A host that is connected to an agent in this process.

#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod execs;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use scalebox_agent::{Agent, serve};
use scalebox_agent_api::hello::{self, NONCE};
use scalebox_agent_api::{AgentFailure, InitKind, PROTOCOL};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

pub(crate) type Body = BoxBody<Bytes, io::Error>;

/// A connection to an agent.
#[derive(Clone)]
pub(crate) struct Host {
    sender: SendRequest<Body>,
    connection: tokio::task::AbortHandle,
}

/// Starts an agent and connects to it.
pub(crate) async fn host() -> Host {
    connect(&Agent::new(InitKind::System)).await
}

/// Opens another connection to an agent.
pub(crate) async fn connect(agent: &Arc<Agent>) -> Host {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let agent = Arc::clone(agent);
    tokio::spawn(async move { serve(&agent, theirs).await });
    connect_to(ours).await
}

/// Opens a connection to an agent at the other end of a stream.
pub(crate) async fn connect_to(mut ours: UnixStream) -> Host {
    let nonce = *b"00112233445566778899aabbccddeeff";
    ours.write_all(&hello::request(&nonce, PROTOCOL)).await.unwrap();
    let mut response = [0; hello::LINE];
    ours.read_exact(&mut response).await.unwrap();
    let expected: Option<([u8; NONCE], u32)> = Some((nonce, PROTOCOL));
    assert_eq!(hello::find_response(&response), expected);
    let (sender, connection) = Builder::new(TokioExecutor::new())
        .initial_stream_window_size(256 << 10)
        .initial_connection_window_size(1 << 20)
        .handshake(TokioIo::new(ours))
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    Host {
        sender,
        connection: connection.abort_handle(),
    }
}

impl Host {
    /// Sends a request whose body breaks off, so that there is no response.
    pub(crate) async fn send_broken(&self, method: Method, path: &str, body: Body) {
        let request = hyper::Request::builder()
            .method(method)
            .uri(format!("http://agent{path}"));
        let sent = self.sender.clone().send_request(request.body(body).unwrap()).await;
        assert!(sent.is_err(), "{sent:?}");
    }

    /// Breaks the connection.
    pub(crate) fn disconnect(self) {
        self.connection.abort();
    }

    /// Sends a request and returns its response, whose body may still arrive.
    pub(crate) async fn send(&self, method: Method, path: &str, body: Body) -> Response<hyper::body::Incoming> {
        let request = hyper::Request::builder()
            .method(method)
            .uri(format!("http://agent{path}"));
        let mut sender = self.sender.clone();
        sender.ready().await.unwrap();
        sender.send_request(request.body(body).unwrap()).await.unwrap()
    }

    /// Sends a request with a body and returns the status and the whole body of the response.
    pub(crate) async fn call(&self, method: Method, path: &str, body: Body) -> (StatusCode, Bytes) {
        let response = self.send(method, path, body).await;
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    }

    /// Sends a request with a body, which must succeed, and returns the body of the response.
    pub(crate) async fn succeed(&self, method: Method, path: &str, body: Body) -> Bytes {
        let (status, body) = self.call(method, path, body).await;
        assert!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
        body
    }

    /// Sends a request with a body, which must fail, and returns the error.
    pub(crate) async fn fail(&self, method: Method, path: &str, body: Body) -> AgentFailure {
        let (status, body) = self.call(method, path, body).await;
        assert!(!status.is_success(), "{path}: {}", String::from_utf8_lossy(&body));
        failure(&body)
    }

    /// Sends JSON and returns the status and the whole body of the response.
    pub(crate) async fn json<T: Serialize>(&self, method: Method, path: &str, value: &T) -> (StatusCode, Bytes) {
        let body = bytes(serde_json::to_vec(value).unwrap());
        let response = self.send(method, path, body).await;
        (
            response.status(),
            response.into_body().collect().await.unwrap().to_bytes(),
        )
    }

    /// Sends a request without a body, and parses the response, which must be a success.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        let response = self.send(Method::GET, path, bytes(Vec::new())).await;
        let (status, body) = (
            response.status(),
            response.into_body().collect().await.unwrap().to_bytes(),
        );
        assert!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).unwrap()
    }
}

/// Returns a body of bytes.
pub(crate) fn bytes(content: Vec<u8>) -> Body {
    Full::new(Bytes::from(content)).map_err(|never| match never {}).boxed()
}

/// Returns an empty body.
pub(crate) fn nothing() -> Body {
    bytes(Vec::new())
}

/// Returns a body of pieces; an error resets the stream.
pub(crate) fn pieces(pieces: impl Iterator<Item = io::Result<Bytes>> + Send + Sync + 'static) -> Body {
    let frames = futures::stream::iter(pieces.map(|piece| piece.map(hyper::body::Frame::data)));
    BodyExt::boxed(http_body_util::StreamBody::new(frames))
}

/// Returns a body that breaks off after its content, as soon as `is_time`. A stream that is reset
/// at once would send nothing.
pub(crate) fn broken(content: Vec<u8>, is_time: impl Fn() -> bool + Send + Sync + 'static) -> Body {
    let frames = futures::stream::unfold((Some(content), is_time), |(content, is_time)| async move {
        if let Some(content) = content {
            let frame = hyper::body::Frame::data(Bytes::from(content));
            return Some((Ok(frame), (None, is_time)));
        }
        while !is_time() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Some((Err(io::Error::other("the client is gone")), (None, is_time)))
    });
    BodyExt::boxed(http_body_util::StreamBody::new(frames))
}

/// Percent-encodes a path for a query.
pub(crate) fn query(path: &Path) -> String {
    percent_encoding::percent_encode(path.as_os_str().as_bytes(), percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// Parses the body of an error.
pub(crate) fn failure(body: &[u8]) -> AgentFailure {
    serde_json::from_slice(body).unwrap()
}
