//! The guest's end of a connection, as a hostile guest uses it.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up must fail")]
#![allow(dead_code, reason = "each test uses some of it")]

use scalebox_agent_api::hello::{find_request, response};
use scalebox_guest::{AgentConnection, AgentError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Types of HTTP/2 frames (RFC 9113, section 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
/// The flag of the last frame of a block of headers.
pub(crate) const END_HEADERS: u8 = 4;
/// `:status: 200`, compressed (RFC 7541, appendix A).
pub(crate) const STATUS_200: &[u8] = &[0x88];
/// The stream of the first request of a connection.
pub(crate) const FIRST: u32 = 1;

/// Returns an HTTP/2 frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Reads until the head of the host's first request.
pub(crate) async fn wait_for_request(stream: &mut UnixStream) {
    let mut preface = [0; 24];
    let mut head = [0; 9];
    stream.read_exact(&mut preface).await.unwrap();
    while head[3] != HEADERS {
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload).await.unwrap();
    }
}

/// Responds to the host's hello.
pub(crate) async fn greet(stream: &mut UnixStream) {
    let mut read = Vec::new();
    loop {
        read.push(stream.read_u8().await.unwrap());
        if let Some((nonce, protocol)) = find_request(&read) {
            return stream.write_all(&response(&nonce, protocol)).await.unwrap();
        }
    }
}

/// Connects a host to a guest that does something after the hello. Returns the host's connection.
pub(crate) async fn connect<F>(guest: impl FnOnce(UnixStream) -> F) -> Result<AgentConnection, AgentError>
where
    F: Future<Output = ()> + Send + 'static,
{
    let (host, mut stream) = UnixStream::pair().unwrap();
    let opening = AgentConnection::open(host, Duration::from_secs(5));
    let (opened, ()) = tokio::join!(opening, greet(&mut stream));
    tokio::spawn(guest(stream));
    opened
}
