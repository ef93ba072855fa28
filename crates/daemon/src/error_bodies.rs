//! The JSON body for errors that hyper answers by itself, before there is a request: a head that is
//! malformed or too large.
//!
//! hyper writes such an answer without a body, and has no setting for another one. The writing half
//! of a connection is therefore looked at: while no request is being answered, an answer of hyper's
//! at the end of what is written gets a body. No content can be taken for it, because content is
//! only written while its request is being answered.

use crate::error::ServiceError;
use axum::body::Body;
use axum::http::Response;
use hyper::body::{Bytes, Frame, SizeHint};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// hyper's limits: `max_headers`, and `max_buf_size` for all of a head.
const MALFORMED: &str = "this is not a well-formed HTTP/1.1 request: check its request line, its header fields, and the length that it gives for its body";
const TARGET_TOO_LONG: &str = "the request's target is too long: at most 65534 bytes";
const HEAD_TOO_LARGE: &str = "the request's head is too large: at most 100 header fields, and 400 KiB in all";

/// The requests of a connection that are being answered, to the last byte of their bodies.
#[derive(Clone, Default)]
pub struct Answering(Arc<AtomicUsize>);

impl Answering {
    /// Counts a request until the guard is dropped.
    pub fn begin(&self) -> AnsweringGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        AnsweringGuard(self.clone())
    }

    fn is_idle(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

/// A request that is being answered.
pub struct AnsweringGuard(Answering);

impl AnsweringGuard {
    /// Keeps the guard until the answer's body has ended.
    pub fn until_sent(self, answer: Response<Body>) -> Response<Body> {
        answer.map(|body| Body::new(Guarded { body, _guard: self }))
    }
}

impl Drop for AnsweringGuard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body with the guard of its request.
struct Guarded {
    body: Body,
    _guard: AnsweringGuard,
}

impl hyper::body::Body for Guarded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection whose errors all have a body.
pub struct ErrorBodies<S> {
    stream: S,
    answering: Answering,
    /// What stands in place of an answer of hyper's, and was not written yet.
    pending: Vec<u8>,
}

impl<S> ErrorBodies<S> {
    /// Wraps a connection whose requests are counted in `answering`.
    pub fn new(stream: S, answering: Answering) -> Self {
        ErrorBodies {
            stream,
            answering,
            pending: Vec::new(),
        }
    }
}

impl<S: AsyncWrite + Unpin> ErrorBodies<S> {
    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.pending))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.pending.drain(..written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ErrorBodies<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ErrorBodies<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_pending(cx))?;
        if self.answering.is_idle()
            && let Some(with_body) = with_body(buffer)
        {
            self.pending = with_body;
            // Taken, all of it; what could not be written now is written before anything else.
            if let Poll::Ready(Err(error)) = self.poll_pending(cx) {
                return Poll::Ready(Err(error));
            }
            return Poll::Ready(Ok(buffer.len()));
        }
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.answering.is_idle() && with_body(&tail(buffers)).is_some() {
            let whole: Vec<&[u8]> = buffers.iter().map(|buffer| &**buffer).collect();
            return self.as_mut().poll_write(cx, &whole.concat());
        }
        ready!(self.poll_pending(cx))?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// How much of the end of what is written is looked at: the head of such an answer has four lines.
const TAIL: usize = 256;

fn tail(buffers: &[io::IoSlice<'_>]) -> Vec<u8> {
    let mut pieces = Vec::new();
    let mut length = 0;
    for buffer in buffers.iter().rev() {
        pieces.push(&buffer[buffer.len().saturating_sub(TAIL - length)..]);
        length = (length + buffer.len()).min(TAIL);
    }
    pieces.reverse();
    pieces.concat()
}

/// What is to be written instead, if `written` ends with an answer of hyper's to a head that it
/// could not read.
fn with_body(written: &[u8]) -> Option<Vec<u8>> {
    const NO_BODY: &[u8] = b"content-length: 0\r\n";
    let from = written.len().saturating_sub(TAIL);
    let at = from + find_last(&written[from..], b"HTTP/1.1 ")?;
    let head = &written[at..];
    let message = match head.get(9..12)? {
        b"400" => MALFORMED,
        b"414" => TARGET_TOO_LONG,
        b"431" => HEAD_TOO_LARGE,
        _ => return None,
    };
    let length = find_last(head, NO_BODY)?;
    let ends_here = head.ends_with(b"\r\n\r\n") && find_last(&head[..head.len() - 4], b"\r\n\r\n").is_none();
    // Every answer of the API's own has an id.
    if !ends_here || find_last(head, b"x-request-id:").is_some() {
        return None;
    }
    let body = serde_json::to_vec(&ServiceError::invalid(message).body()).ok()?;
    let mut instead = written[..at + length].to_vec();
    instead.extend(format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len()).into_bytes());
    instead.extend(&head[length + NO_BODY.len()..]);
    instead.extend(body);
    Some(instead)
}

fn find_last(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).rposition(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    const OF_HYPER: &[u8] = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\ndate: Fri, 02 Jan 2026 03:04:05 GMT\r\n\r\n";
    const BEFORE: &[u8] = b"HTTP/1.1 200 OK\r\nx-request-id: 1\r\ncontent-length: 2\r\n\r\n{}";

    async fn written(pieces: &[&[u8]], answering: &Answering) -> String {
        let (near, far) = tokio::io::duplex(4096);
        let mut near = ErrorBodies::new(near, answering.clone());
        for piece in pieces {
            near.write_all(piece).await.unwrap();
        }
        near.shutdown().await.unwrap();
        let mut read = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut { far }, &mut read)
            .await
            .unwrap();
        String::from_utf8(read).unwrap()
    }

    #[tokio::test]
    async fn an_answer_of_hyper_s_gets_a_body_of_the_length_that_it_names() {
        for pieces in [&[OF_HYPER][..], &[BEFORE, OF_HYPER], &[&[BEFORE, OF_HYPER].concat()]] {
            let text = written(pieces, &Answering::default()).await;
            let (head, body) = text.rsplit_once("\r\n\r\n").unwrap();
            assert!(
                body.contains("well-formed HTTP/1.1")
                    && serde_json::from_str::<scalebox_client::ErrorBody>(body).is_ok()
            );
            let length = format!("content-length: {}\r\n", body.len());
            assert!(head.contains(&length) && head.contains("connection: close"), "{head}");
            assert!(!text.contains("content-length: 0"));
        }
    }

    #[test]
    fn the_end_of_several_buffers_is_their_last_bytes() {
        let whole: Vec<u8> = (0..=255).cycle().take(700).collect();
        for cuts in [[0, 0], [1, 2], [400, 401], [500, 699], [699, 700], [700, 700]] {
            let pieces = [&whole[..cuts[0]], &whole[cuts[0]..cuts[1]], &whole[cuts[1]..]];
            assert_eq!(tail(&pieces.map(io::IoSlice::new)), whole[700 - TAIL..], "{cuts:?}");
        }
        assert_eq!(tail(&[io::IoSlice::new(b"ab"), io::IoSlice::new(b"c")]), b"abc");
    }

    #[tokio::test]
    async fn content_that_looks_like_one_is_left_alone() {
        let answering = Answering::default();
        let guard = answering.begin();
        let sent = String::from_utf8(OF_HYPER.to_vec()).unwrap();
        assert_eq!(written(&[OF_HYPER], &answering).await, sent);
        drop(guard);
        let own = sent.replace("date:", "x-request-id: 7\r\ndate:");
        assert_eq!(written(&[own.as_bytes()], &answering).await, own);
        let inside = [OF_HYPER, b"0\r\n\r\n"].concat();
        assert_eq!(written(&[&inside], &answering).await.as_bytes(), inside);
    }
}
