//! A host that talks to an agent in this process.

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
use std::sync::Arc;
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
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let agent = Arc::clone(agent);
    tokio::spawn(async move { serve(&agent, theirs).await });
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

/// Parses the body of an error.
pub(crate) fn failure(body: &[u8]) -> AgentFailure {
    serde_json::from_slice(body).unwrap()
}
