//! A guest's vsock as Firecracker shows it on the host: a Unix socket on which one asks for a port
//! of the guest (docs/vsock.md of Firecracker).

use crate::jail;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The longest that a guest takes to accept: one that boots never does.
const DEADLINE: Duration = Duration::from_secs(1);
/// The longest answer: `OK `, a number of ten digits, and the end of the line.
const ANSWER_LIMIT: usize = 16;

/// Connects to a port of the guest.
pub(crate) async fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let late = |_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the guest's port {port} does not answer"),
        )
    };
    timeout(DEADLINE, ask(socket, port)).await.map_err(late)?
}

async fn ask(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = jail::connect(socket).await?;
    // It is one message or none: Firecracker reads it once.
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // What follows the line is the guest's.
    while !answer.ends_with(b"\n") && answer.len() < ANSWER_LIMIT {
        answer.push(match stream.read_u8().await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    format!("nobody listens on the guest's port {port}"),
                ));
            }
            other => other?,
        });
    }
    match answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
        true => Ok(stream),
        false => Err(io::Error::other(format!(
            "not an answer: {:?}",
            String::from_utf8_lossy(&answer)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// A Firecracker that gives one answer, then closes.
    async fn answered_with(answer: &'static str) -> io::Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let firecracker = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 64];
            let read = stream.read(&mut asked).await.unwrap();
            assert_eq!(&asked[..read], b"CONNECT 1024\n", "in one piece");
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let connected = connect(&socket, 1024).await;
        firecracker.await.unwrap();
        let mut said = String::new();
        connected?.read_to_string(&mut said).await?;
        Ok(said)
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_the_guest_s() {
        assert_eq!(answered_with("OK 1073741824\nhello").await.unwrap(), "hello");
    }

    #[tokio::test]
    async fn a_port_that_nobody_listens_on_is_told_from_nonsense() {
        let closed = answered_with("").await.unwrap_err();
        assert_eq!(closed.kind(), io::ErrorKind::ConnectionRefused, "{closed}");
        let nonsense = answered_with("HTTP/1.1 400 Bad Request\n")
            .await
            .unwrap_err()
            .to_string();
        assert!(nonsense.contains("HTTP/1.1 400"), "{nonsense}");
    }

    #[tokio::test]
    async fn a_guest_that_does_not_answer_is_not_waited_for_long() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        let late = connect(&socket, 1024).await.unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    }
}
