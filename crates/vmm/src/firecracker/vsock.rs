//! Connects to a guest's vsock under Firecracker.
//!
//! Firecracker exposes the vsock on the host as a Unix socket, on which a client requests a guest
//! port (docs/vsock.md of Firecracker).

use crate::firecracker::jail;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Timeout for the guest to accept. A guest that is booting never does.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The response is `OK `, a number of up to ten digits, and a newline.
const MAX_RESPONSE_BYTES: usize = 16;

/// Connects to a port of the guest.
pub(crate) async fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let timed_out = |_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the guest's port {port} does not respond"),
        )
    };
    timeout(CONNECT_TIMEOUT, request_port(socket, port))
        .await
        .map_err(timed_out)?
}

async fn request_port(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = jail::connect(socket).await?;
    // The request is sent in one write, because Firecracker reads it once.
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut response = Vec::new();
    // The response is read byte by byte: data after the line comes from the guest.
    while !response.ends_with(b"\n") && response.len() < MAX_RESPONSE_BYTES {
        response.push(match stream.read_u8().await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    format!("no program listens on the guest's port {port}"),
                ));
            }
            other => other?,
        });
    }
    match response.starts_with(b"OK ") && response.ends_with(b"\n") {
        true => Ok(stream),
        false => Err(io::Error::other(format!(
            "unexpected response: {:?}",
            String::from_utf8_lossy(&response)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// Imitates a Firecracker that sends one response, then closes.
    async fn connect_with_response(response: &'static str) -> io::Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let firecracker = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 64];
            let read = stream.read(&mut request).await.unwrap();
            assert_eq!(&request[..read], b"CONNECT 1024\n", "in one piece");
            stream.write_all(response.as_bytes()).await.unwrap();
        });
        let connected = connect(&socket, 1024).await;
        firecracker.await.unwrap();
        let mut received = String::new();
        connected?.read_to_string(&mut received).await?;
        Ok(received)
    }

    #[tokio::test]
    async fn data_after_the_response_comes_from_the_guest() {
        assert_eq!(connect_with_response("OK 1073741824\nhello").await.unwrap(), "hello");
    }

    #[tokio::test]
    async fn closed_ports_and_invalid_responses_are_different_errors() {
        let closed = connect_with_response("").await.unwrap_err();
        assert_eq!(closed.kind(), io::ErrorKind::ConnectionRefused, "{closed}");
        let invalid = connect_with_response("HTTP/1.1 400 Bad Request\n")
            .await
            .unwrap_err()
            .to_string();
        assert!(invalid.contains("HTTP/1.1 400"), "{invalid}");
    }

    #[tokio::test]
    async fn connecting_to_a_silent_guest_times_out() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        let error = connect(&socket, 1024).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
