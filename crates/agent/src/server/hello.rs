//! The agent's side of the hello: finds where a connection begins.

use scalebox_agent_api::PROTOCOL;
use scalebox_agent_api::hello::{FILLER, LINE, NONCE, find_request, response};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

/// First byte of the HTTP/2 connection preface, `PRI * HTTP/2.0`.
const PREFACE: u8 = b'P';

/// Skips bytes until a request arrives, responds once to each nonce, and returns the stream at the
/// first byte of HTTP/2.
///
/// # Errors
/// The stream's errors; [`io::ErrorKind::UnexpectedEof`] if it ends before.
pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) -> io::Result<Started<S>> {
    let mut newest: Vec<u8> = Vec::with_capacity(2 * LINE);
    let mut answered: Option<[u8; NONCE]> = None;
    loop {
        let byte = stream.read_u8().await?;
        if answered.is_some() && newest.is_empty() && byte == PREFACE {
            return Ok(Started {
                first: Some(byte),
                stream,
            });
        }
        if byte == FILLER {
            newest.clear();
            continue;
        }
        if newest.len() == 2 * LINE {
            newest.drain(..LINE);
        }
        newest.push(byte);
        if let Some((nonce, _host)) = find_request(&newest) {
            newest.clear();
            if answered != Some(nonce) {
                stream.write_all(&response(&nonce, PROTOCOL)).await?;
                stream.flush().await?;
                answered = Some(nonce);
            }
        }
    }
}

/// A stream after the hello, with the byte that was read ahead.
pub(crate) struct Started<S> {
    first: Option<u8>,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Started<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.first.take() {
            Some(byte) => {
                buffer.put_slice(&[byte]);
                Poll::Ready(Ok(()))
            }
            None => Pin::new(&mut self.stream).poll_read(context, buffer),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Started<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
