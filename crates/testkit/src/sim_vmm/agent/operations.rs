//! The operations on a simulated guest as a whole; all other requests go to the real agent.

use crate::sim_vmm::body::Body;
use crate::sim_vmm::world::World;
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2 as client;
use hyper::server::conn::http2 as server;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use scalebox_agent_api::hello::{self, FILLER, LINE, MAX_FRAME, NONCE};
use scalebox_agent_api::{PROTOCOL, RootSize, Trimmed};
use serde::Serialize;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, duplex, join, split};
use tokio::net::UnixStream;

type ResponseBody = BoxBody<Bytes, hyper::Error>;

/// Bytes between this module and the real agent that are not read yet, of each kind. Small, because
/// tests measure the memory of the whole process.
const PIPE_BYTES: usize = 64 << 10;

/// Serves one connection of the host.
pub(crate) async fn serve(
    world: Arc<World>,
    body: Arc<Body>,
    agent: Arc<scalebox_agent::Agent>,
    stream: UnixStream,
) -> io::Result<()> {
    let stream = accept(stream).await?;
    let (near, far) = duplex(PIPE_BYTES);
    tokio::spawn(async move { scalebox_agent::serve(&agent, far).await });
    let real = connect(near).await?;
    let service = service_fn(move |request| respond(world.clone(), body.clone(), real.clone(), request));
    let mut builder = server::Builder::new(TokioExecutor::new());
    builder.max_frame_size(MAX_FRAME as u32);
    let served = builder.serve_connection(TokioIo::new(stream), service);
    served.await.map_err(io::Error::other)
}

/// Responds to the host's hello. Returns the stream at the first byte of HTTP/2.
async fn accept(stream: UnixStream) -> io::Result<impl AsyncRead + AsyncWrite + Unpin + Send> {
    let (mut reader, mut writer) = split(stream);
    let (mut newest, mut answered) = (Vec::new(), None);
    loop {
        let byte = reader.read_u8().await?;
        if answered.is_some() && newest.is_empty() && byte == b'P' {
            return Ok(join(AsyncReadExt::chain(&b"P"[..], reader), writer));
        }
        match byte {
            FILLER => newest.clear(),
            byte => newest.push(byte),
        }
        if newest.len() > LINE {
            newest.remove(0);
        }
        if let Some((nonce, _)) = hello::find_request(&newest) {
            newest.clear();
            if answered != Some(nonce) {
                writer.write_all(&hello::response(&nonce, PROTOCOL)).await?;
                answered = Some(nonce);
            }
        }
    }
}

/// Connects to the real agent.
async fn connect<S>(mut stream: S) -> io::Result<client::SendRequest<Incoming>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    stream.write_all(&hello::request(&[b'0'; NONCE], PROTOCOL)).await?;
    let mut response = [0; LINE];
    stream.read_exact(&mut response).await?;
    let mut builder = client::Builder::new(TokioExecutor::new());
    builder
        .initial_stream_window_size(PIPE_BYTES as u32)
        .initial_connection_window_size(PIPE_BYTES as u32);
    let handshake = builder.handshake(TokioIo::new(stream)).await;
    let (sender, connection) = handshake.map_err(io::Error::other)?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn respond(
    world: Arc<World>,
    body: Arc<Body>,
    mut real: client::SendRequest<Incoming>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, hyper::Error> {
    let simulated = match request.uri().path() {
        "/v1/sync" | "/v1/clock" => no_content(),
        "/v1/freeze" => {
            body.lock().is_frozen = true;
            no_content()
        }
        "/v1/thaw" => {
            body.lock().is_frozen = false;
            no_content()
        }
        "/v1/trim" => {
            let mut inside = body.lock();
            inside.trims += 1;
            let bytes = std::mem::take(&mut inside.guest.trimmable).as_u64();
            json(&Trimmed { bytes })
        }
        "/v1/grow" => {
            let inside = body.lock();
            json(&RootSize {
                total: inside.fs_total().as_u64(),
                used: inside.guest.fs_used.as_u64(),
            })
        }
        "/v1/shutdown" => {
            world.request_shutdown(&body);
            no_content()
        }
        _ => {
            return real
                .send_request(request)
                .await
                .map(|response| response.map(BodyExt::boxed));
        }
    };
    Ok(simulated)
}

fn no_content() -> Response<ResponseBody> {
    let mut response = Response::new(full(Vec::new()));
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

fn json(value: &impl Serialize) -> Response<ResponseBody> {
    Response::new(full(serde_json::to_vec(value).unwrap_or_default()))
}

fn full(bytes: Vec<u8>) -> ResponseBody {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed()
}
