//! The host's side of the hello.

use crate::agent::error::AgentError;
use scalebox_agent_api::PROTOCOL;
use scalebox_agent_api::hello::{LINE, MAX_SKIPPED, NONCE, find_response, request};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::time::{Instant, interval, timeout};

/// Interval of requests, until the agent responds: a serial port drops them while the guest boots.
const REPEAT_INTERVAL: Duration = Duration::from_millis(250);

/// Waits until the agent at the other end responds. Then the next byte of the stream is the first
/// of its HTTP/2 connection.
///
/// # Errors
/// [`AgentError::Timeout`] after `within`; [`AgentError::Malformed`] if the stream has more than
/// [`MAX_SKIPPED`] bytes of an earlier connection; [`AgentError::Unreachable`] if it ends.
pub(crate) async fn greet<S>(stream: &mut S, within: Duration) -> Result<(), AgentError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let nonce = nonce().map_err(AgentError::unreachable)?;
    let (mut reader, mut writer) = split(stream);
    let exchange = async {
        tokio::select! {
            biased;
            found = response(&mut reader, &nonce) => found,
            error = repeat(&mut writer, &nonce) => Err(AgentError::stream(&error)),
        }
    };
    let begun = Instant::now();
    let greeted = timeout(within, exchange).await;
    tracing::trace!(elapsed = ?begun.elapsed(), ok = matches!(greeted, Ok(Ok(()))), "hello to a guest's agent");
    greeted.unwrap_or(Err(AgentError::Timeout { after: within }))
}

/// Sends requests until the stream fails. A write may wait for ever: a guest that boots reads
/// nothing.
async fn repeat(writer: &mut (impl AsyncWrite + Unpin), nonce: &[u8; NONCE]) -> io::Error {
    let mut ticks = interval(REPEAT_INTERVAL);
    loop {
        ticks.tick().await;
        if let Err(error) = writer.write_all(&request(nonce, PROTOCOL)).await {
            return error;
        }
        if let Err(error) = writer.flush().await {
            return error;
        }
    }
}

/// Skips bytes until the response to `nonce`.
async fn response(reader: &mut (impl AsyncRead + Unpin), nonce: &[u8; NONCE]) -> Result<(), AgentError> {
    let mut newest = Newest::default();
    for _ in 0..MAX_SKIPPED {
        // The response is read byte by byte, because the bytes after it belong to HTTP/2.
        newest.push(reader.read_u8().await.map_err(|error| AgentError::stream(&error))?);
        if newest.last() == Some(&b'\n')
            && let Some((answered, _agent)) = find_response(newest.bytes())
            && answered == *nonce
        {
            return Ok(());
        }
    }
    Err(AgentError::malformed(format!("no hello within {MAX_SKIPPED} bytes")))
}

/// The newest bytes of a stream: at least [`LINE`], if there are that many.
#[derive(Default)]
struct Newest(Vec<u8>);

impl Newest {
    fn push(&mut self, byte: u8) {
        if self.0.len() == 4 * LINE {
            self.0.drain(..3 * LINE);
        }
        self.0.push(byte);
    }

    fn last(&self) -> Option<&u8> {
        self.0.last()
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Returns random hexadecimal digits.
fn nonce() -> io::Result<[u8; NONCE]> {
    let mut random = [0; NONCE];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(random.map(|byte| b"0123456789abcdef"[usize::from(byte % 16)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_agent_api::hello::{find_request, response as ready};
    use tokio::io::{DuplexStream, duplex};

    /// Reads until a request; returns its nonce.
    async fn requested(stream: &mut DuplexStream) -> [u8; NONCE] {
        let mut read = Vec::new();
        loop {
            read.push(stream.read_u8().await.unwrap());
            if let Some((nonce, _)) = find_request(&read) {
                return nonce;
            }
        }
    }

    #[tokio::test]
    async fn bytes_of_an_earlier_connection_are_skipped_and_later_ones_kept() {
        let (mut host, mut guest) = duplex(1 << 20);
        let agent = async {
            let nonce = requested(&mut guest).await;
            guest.write_all(&vec![b'x'; 100_000]).await.unwrap();
            guest.write_all(&ready(&[b'0'; NONCE], 1)).await.unwrap();
            guest.write_all(&ready(&nonce, 1)).await.unwrap();
            guest.write_all(b"h2").await.unwrap();
        };
        let (greeted, ()) = tokio::join!(greet(&mut host, Duration::from_secs(5)), agent);
        greeted.unwrap();
        let mut next = [0; 2];
        host.read_exact(&mut next).await.unwrap();
        assert_eq!(&next, b"h2");
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_boots_is_asked_again_until_the_deadline() {
        let (mut host, mut guest) = duplex(1 << 20);
        let late = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            let nonce = requested(&mut guest).await;
            guest.write_all(&ready(&nonce, 1)).await.unwrap();
        };
        let (greeted, ()) = tokio::join!(greet(&mut host, Duration::from_secs(5)), late);
        greeted.unwrap();

        // No process reads: the stream's buffer is full after a few requests.
        let (mut host, _guest) = duplex(1 << 15);
        let error = greet(&mut host, Duration::from_secs(5)).await.unwrap_err();
        assert!(matches!(error, AgentError::Timeout { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_flood_and_a_closed_stream_are_errors() {
        let (mut host, guest) = duplex(1 << 16);
        let (_reads, mut writes) = split(guest);
        let flood = async { while writes.write_all(&[b'\n'; 65536]).await.is_ok() {} };
        let greeted = tokio::select! {
            greeted = greet(&mut host, Duration::from_secs(60)) => greeted,
            () = flood => unreachable!("the host reads"),
        };
        assert!(matches!(greeted, Err(AgentError::Malformed { .. })), "{greeted:?}");

        let (mut host, guest) = duplex(1 << 16);
        drop(guest);
        let error = greet(&mut host, Duration::from_secs(60)).await.unwrap_err();
        assert!(matches!(error, AgentError::Unreachable { .. }), "{error}");
    }
}
