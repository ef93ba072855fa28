//! A stream that fails if the agent sends more than was requested.
//!
//! HTTP/2 limits the data of a stream, but not the frames around it: an agent may send pings,
//! settings and empty frames for ever, and each costs the host a little work. So each request and
//! each byte of its bodies allows the agent some bytes, and so does time, for pings.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::Instant;

/// Bytes that are always allowed. More than the connection's window, whose data may be unread.
const BASE: u64 = 4 << 20;
/// Bytes for the head of a response, and for frames that concern one request.
const PER_REQUEST: u64 = 64 << 10;
/// Bytes for each byte of a body: itself, and its share of a frame's header if frames are short.
const PER_BODY_BYTE: u64 = 4;
/// Bytes for each second: responses to pings.
const PER_SECOND: u64 = 4 << 10;

/// The number of bytes that the agent may send.
#[derive(Debug)]
pub(crate) struct Budget {
    allowed: AtomicU64,
    received: AtomicU64,
    begun: Instant,
}

impl Budget {
    pub(crate) fn new() -> Arc<Budget> {
        Arc::new(Budget {
            allowed: AtomicU64::new(BASE),
            received: AtomicU64::new(0),
            begun: Instant::now(),
        })
    }

    /// Counts a request that is about to be sent.
    pub(crate) fn request(&self) {
        self.allowed.fetch_add(PER_REQUEST, Ordering::Relaxed);
    }

    /// Counts bytes of a body, sent or received.
    pub(crate) fn body(&self, bytes: usize) {
        let more = (bytes as u64).saturating_mul(PER_BODY_BYTE);
        self.allowed.fetch_add(more, Ordering::Relaxed);
    }

    fn receive(&self, bytes: usize) -> io::Result<()> {
        let received = self.received.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        let seconds = self.begun.elapsed().as_secs();
        let allowed = self.allowed.load(Ordering::Relaxed) + seconds.saturating_mul(PER_SECOND);
        match received <= allowed {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the guest sends more than was requested",
            )),
        }
    }
}

/// The stream below a connection.
pub(crate) struct Budgeted {
    stream: UnixStream,
    budget: Arc<Budget>,
}

impl Budgeted {
    pub(crate) fn new(stream: UnixStream, budget: Arc<Budget>) -> Budgeted {
        Budgeted { stream, budget }
    }
}

impl AsyncRead for Budgeted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Ready(Ok(())) => Poll::Ready(self.budget.receive(buffer.filled().len() - before)),
            other => other,
        }
    }
}

impl AsyncWrite for Budgeted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
