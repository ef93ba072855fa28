//! Serves the protocol on a connection.

mod agent;
mod failure;
mod hello;
mod http;
mod routes;

pub use agent::Agent;
pub(crate) use failure::Failure;
pub(crate) use http::{Query, Request, Response, json, no_content, no_route, read_json, stream};

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use scalebox_agent_api::hello::MAX_FRAME;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

/// Maximum number of concurrent requests. Each running exec may have two long ones, for its output
/// and its stdin.
const MAX_STREAMS: u32 = 4096;
/// Bytes of a request that the agent accepts before a handler reads them.
const STREAM_WINDOW: u32 = 256 << 10;
/// Bytes of all requests that the agent accepts before handlers read them. A command that does not
/// read its stdin occupies one stream window, and must not stop the other requests.
const CONNECTION_WINDOW: u32 = 64 * STREAM_WINDOW;
/// Bytes of a response that wait for the connection, besides the last piece. Further output waits
/// in the buffer of its exec, which all readers share and whose memory is counted.
const SEND_BUFFER: usize = 4 << 10;

/// Serves one connection until the host closes it: the hello, then HTTP/2. After garbage, searches
/// for the next hello on the same stream.
///
/// # Errors
/// The stream's errors, and its end.
pub async fn serve<S>(agent: &Arc<Agent>, stream: S) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = hello::accept(stream).await?;
    let agent = Arc::clone(agent);
    let service = service_fn(move |request| {
        let agent = Arc::clone(&agent);
        async move { Ok::<_, std::convert::Infallible>(routes::respond(&agent, request).await) }
    });
    http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_frame_size(MAX_FRAME as u32)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .serve_connection(TokioIo::new(stream), service)
        .await
        .map_err(io::Error::other)
}
