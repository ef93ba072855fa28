//! Requests to the API of a simulated host, without a socket.

use crate::host::Host;
use crate::http::metrics::Metrics;
use crate::http::routes::router;
use crate::settings::Settings;
use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use axum::response::Response;
use futures::StreamExt;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use scalebox_api::attach::SUBPROTOCOL;
use serde_json::Value;
use std::sync::Arc;
use tokio::io::{DuplexStream, duplex};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{WebSocketStream, client_async};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// A response with its whole body.
pub(super) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// Returns the body as JSON; null if it has none.
    #[track_caller]
    pub(super) fn json(&self) -> Value {
        match self.body.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&self.body).unwrap(),
        }
    }

    /// Returns the lines of an NDJSON body.
    #[track_caller]
    pub(super) fn lines(&self) -> Vec<Value> {
        let lines = self.body.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    /// Returns the status and the code of an error.
    #[track_caller]
    pub(super) fn error(&self) -> (u16, String) {
        let code = self.json()["code"].as_str().unwrap().to_owned();
        (self.status.as_u16(), code)
    }
}

fn service(host: &Host) -> TowerToHyperService<Router> {
    let settings = Settings::of(&[("API_TOKEN", TOKEN)]).unwrap();
    let metrics = Arc::new(Metrics::new().unwrap());
    TowerToHyperService::new(router(host.clone(), settings.token().unwrap(), metrics))
}

/// Opens a WebSocket.
pub(super) async fn attach(host: &Host, path: &str) -> WebSocketStream<DuplexStream> {
    let (near, far) = duplex(1 << 20);
    let serving = http1::Builder::new().serve_connection(TokioIo::new(far), service(host));
    tokio::spawn(serving.with_upgrades());
    let mut request = format!("ws://host{path}").into_client_request().unwrap();
    let headers = request.headers_mut();
    headers.insert("authorization", format!("Bearer {TOKEN}").parse().unwrap());
    headers.insert("sec-websocket-protocol", SUBPROTOCOL.parse().unwrap());
    let (socket, response) = client_async(request, near).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], SUBPROTOCOL);
    socket
}

/// Sends a request and returns the response, whose body may follow over time.
pub(super) async fn send(host: &Host, method: &str, path: &str, headers: &[(&str, &str)], body: Body) -> Response {
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("authorization", format!("Bearer {TOKEN}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    service(host).call(request.body(body).unwrap()).await.unwrap()
}

/// Reads a whole response.
pub(super) async fn whole(response: Response) -> Answer {
    let (status, headers) = (response.status(), response.headers().clone());
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    Answer { status, headers, body }
}

/// Sends a request with a body, and reads the whole response.
pub(super) async fn call(host: &Host, method: &str, path: &str, body: impl Into<Body>) -> Answer {
    whole(send(host, method, path, &[], body.into()).await).await
}

/// Sends JSON, and reads the whole response.
pub(super) async fn post(host: &Host, path: &str, body: Value) -> Answer {
    call(host, "POST", path, body.to_string()).await
}

/// Reads a response until its body contains `text`.
pub(super) async fn read_until(response: Response, text: &str) -> (String, axum::body::BodyDataStream) {
    let mut pieces = response.into_body().into_data_stream();
    let mut read = String::new();
    while !read.contains(text) {
        let piece = pieces.next().await.unwrap().unwrap();
        read.push_str(std::str::from_utf8(&piece).unwrap());
    }
    (read, pieces)
}
