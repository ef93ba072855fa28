//! JSON bodies for the errors that hyper sends by itself.
//!
//! hyper responds to a malformed or too large head before there is a request. It sends no body, and
//! has no setting to change that. Therefore this module inspects the bytes written to a connection:
//! while no response is being written, an error response from hyper at the end of the written bytes
//! gets a body. Content cannot be mistaken for such a response, because content is only written as
//! a part of a response.

use crate::host::error::ServiceError;
use crate::http::error;
use axum::body::Body;
use axum::http::Response;
use hyper::body::{Bytes, Frame, SizeHint};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The texts of errors that hyper sends. hyper limits the number of fields (`max_headers`) and the
/// whole head (`max_buf_size`).
const MALFORMED: &str =
    "malformed HTTP/1.1 request: check the request line, the header fields and the length given for the body";
const TARGET_TOO_LONG: &str = "the request target is too long: at most 65534 bytes are allowed";
const HEAD_TOO_LARGE: &str = "the request head is too large: at most 100 header fields and 400 KiB are allowed";

/// Counts a connection's requests in progress; each counts until its response is sent.
#[derive(Clone, Default)]
pub(crate) struct RequestsInProgress(Arc<AtomicUsize>);

impl RequestsInProgress {
    /// Counts a request until the guard is dropped.
    pub(crate) fn begin(&self) -> RequestGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        RequestGuard(self.clone())
    }

    fn is_idle(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

/// Counts one request as in progress; dropping it ends that.
pub(crate) struct RequestGuard(RequestsInProgress);

impl RequestGuard {
    /// Holds the guard until the response's body has been sent.
    pub(crate) fn until_sent(self, response: Response<Body>) -> Response<Body> {
        response.map(|body| Body::new(Guarded { body, _guard: self }))
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A response body that holds the guard of its request.
struct Guarded {
    body: Body,
    _guard: RequestGuard,
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

/// A connection on which every error response has a body.
pub(crate) struct ErrorBodies<S> {
    stream: S,
    in_progress: RequestsInProgress,
    /// The rewritten response, as far as it is not yet written.
    pending: Vec<u8>,
}

impl<S> ErrorBodies<S> {
    /// Wraps a connection whose requests are counted in `in_progress`.
    pub(crate) fn new(stream: S, in_progress: RequestsInProgress) -> Self {
        ErrorBodies {
            stream,
            in_progress,
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
        if self.in_progress.is_idle()
            && let Some(with_body) = with_body(buffer)
        {
            self.pending = with_body;
            // All of `buffer` counts as written; the rest of `pending` goes out before anything
            // else.
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
        if self.in_progress.is_idle() && with_body(&tail(buffers)).is_some() {
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

/// Number of bytes at the end of a write that are inspected. The head of such a response has four
/// lines.
const TAIL_BYTES: usize = 256;

fn tail(buffers: &[io::IoSlice<'_>]) -> Vec<u8> {
    let mut pieces = Vec::new();
    let mut length = 0;
    for buffer in buffers.iter().rev() {
        pieces.push(&buffer[buffer.len().saturating_sub(TAIL_BYTES - length)..]);
        length = (length + buffer.len()).min(TAIL_BYTES);
    }
    pieces.reverse();
    pieces.concat()
}

/// Returns `written` with a body added, if it ends with an error response from hyper itself.
fn with_body(written: &[u8]) -> Option<Vec<u8>> {
    const NO_BODY: &[u8] = b"content-length: 0\r\n";
    let from = written.len().saturating_sub(TAIL_BYTES);
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
    // Every response of the API's own routes has a request id.
    if !ends_here || find_last(head, b"x-request-id:").is_some() {
        return None;
    }
    let body = serde_json::to_vec(&error::body(&ServiceError::invalid(message))).ok()?;
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

    const FROM_HYPER: &[u8] = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\ndate: Fri, 02 Jan 2026 03:04:05 GMT\r\n\r\n";
    const FROM_ROUTE: &[u8] = b"HTTP/1.1 200 OK\r\nx-request-id: 1\r\ncontent-length: 2\r\n\r\n{}";

    async fn written(pieces: &[&[u8]], in_progress: &RequestsInProgress) -> String {
        let (near, far) = tokio::io::duplex(4096);
        let mut near = ErrorBodies::new(near, in_progress.clone());
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
    async fn error_responses_from_hyper_get_a_body_with_a_matching_content_length() {
        for pieces in [
            &[FROM_HYPER][..],
            &[FROM_ROUTE, FROM_HYPER],
            &[&[FROM_ROUTE, FROM_HYPER].concat()],
        ] {
            let text = written(pieces, &RequestsInProgress::default()).await;
            let (head, body) = text.rsplit_once("\r\n\r\n").unwrap();
            assert!(
                body.contains("malformed HTTP/1.1") && serde_json::from_str::<scalebox_api::ErrorBody>(body).is_ok()
            );
            let length = format!("content-length: {}\r\n", body.len());
            assert!(head.contains(&length) && head.contains("connection: close"), "{head}");
            assert!(!text.contains("content-length: 0"));
        }
    }

    #[test]
    fn the_tail_of_several_buffers_is_their_last_bytes() {
        let whole: Vec<u8> = (0..=255).cycle().take(700).collect();
        for cuts in [[0, 0], [1, 2], [400, 401], [500, 699], [699, 700], [700, 700]] {
            let pieces = [&whole[..cuts[0]], &whole[cuts[0]..cuts[1]], &whole[cuts[1]..]];
            assert_eq!(
                tail(&pieces.map(io::IoSlice::new)),
                whole[700 - TAIL_BYTES..],
                "{cuts:?}"
            );
        }
        assert_eq!(tail(&[io::IoSlice::new(b"ab"), io::IoSlice::new(b"c")]), b"abc");
    }

    #[tokio::test]
    async fn content_that_looks_like_an_error_response_is_not_changed() {
        let in_progress = RequestsInProgress::default();
        let guard = in_progress.begin();
        let sent = String::from_utf8(FROM_HYPER.to_vec()).unwrap();
        assert_eq!(written(&[FROM_HYPER], &in_progress).await, sent);
        drop(guard);
        let own = sent.replace("date:", "x-request-id: 7\r\ndate:");
        assert_eq!(written(&[own.as_bytes()], &in_progress).await, own);
        let inside = [FROM_HYPER, b"0\r\n\r\n"].concat();
        assert_eq!(written(&[&inside], &in_progress).await.as_bytes(), inside);
    }
}
