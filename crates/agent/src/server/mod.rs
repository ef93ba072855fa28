//! Serves the protocol on a connection.

mod failure;
mod hello;
mod http;
mod routes;

pub(crate) use failure::Failure;
pub(crate) use http::{Query, Request, Response, json, no_content, read_json, stream};
pub(crate) use routes::no_route;

use crate::exec::Execs;
use crate::system::Frozen;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use scalebox_agent_api::InitKind;
use scalebox_agent_api::hello::MAX_FRAME;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

/// What all connections share.
pub struct Agent {
    /// The commands.
    pub(crate) execs: Execs,
    /// The program that is process 1.
    pub(crate) init: InitKind,
    /// Whether the guest's file systems are frozen.
    pub(crate) frozen: Arc<Frozen>,
}

impl Agent {
    /// Creates the state of an agent without commands.
    pub fn new(init: InitKind) -> Arc<Agent> {
        Arc::new(Agent {
            execs: Execs::default(),
            init,
            frozen: Arc::default(),
        })
    }
}

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
        .serve_connection(TokioIo::new(stream), service)
        .await
        .map_err(io::Error::other)
}
