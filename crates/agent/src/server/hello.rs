//! The agent's side of the hello: finds where a connection begins.

use scalebox_agent_api::PROTOCOL;
use scalebox_agent_api::hello::{FILLER, LINE, NONCE, find_request, response};
use std::io;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};

/// First byte of the HTTP/2 connection preface, `PRI * HTTP/2.0`.
const PREFACE: u8 = b'P';

/// Size of the read buffer, in bytes. Larger reads bypass it.
const BUFFER: usize = 4 << 10;

/// Skips bytes until a request arrives, and responds once to each nonce. Returns the stream at the
/// first byte of HTTP/2.
///
/// # Errors
/// The stream's errors; [`io::ErrorKind::UnexpectedEof`] if it ends before.
pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(stream: S) -> io::Result<BufReader<S>> {
    let mut stream = BufReader::with_capacity(BUFFER, stream);
    let mut search = Search::default();
    loop {
        let buffered = stream.fill_buf().await?;
        if buffered.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (used, found) = search.next(buffered);
        stream.consume(used);
        match found {
            Some(Found::Http) => return Ok(stream),
            Some(Found::Request(nonce)) => {
                stream.write_all(&response(&nonce, PROTOCOL)).await?;
                stream.flush().await?;
            }
            None => {}
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// A request with a new nonce.
    Request([u8; NONCE]),
    /// The first byte of HTTP/2, after a request. It is not consumed.
    Http,
}

/// A search for requests in a stream that arrives in pieces.
#[derive(Default)]
struct Search {
    /// The newest bytes since the last filler or request.
    newest: Vec<u8>,
    answered: Option<[u8; NONCE]>,
}

impl Search {
    /// Searches `bytes`. Returns the number of consumed bytes, and the request or the start of
    /// HTTP/2 that was found.
    fn next(&mut self, bytes: &[u8]) -> (usize, Option<Found>) {
        for (at, &byte) in bytes.iter().enumerate() {
            if byte == FILLER {
                self.newest.clear();
                continue;
            }
            if byte == PREFACE && self.newest.is_empty() && self.answered.is_some() {
                return (at, Some(Found::Http));
            }
            if self.newest.len() == 2 * LINE {
                self.newest.drain(..LINE);
            }
            self.newest.push(byte);
            let Some((nonce, _protocol)) = find_request(&self.newest) else {
                continue;
            };
            self.newest.clear();
            if self.answered != Some(nonce) {
                self.answered = Some(nonce);
                return (at + 1, Some(Found::Request(nonce)));
            }
        }
        (bytes.len(), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_agent_api::hello::request;

    const A: [u8; NONCE] = *b"0123456789abcdef0123456789abcdef";
    const B: [u8; NONCE] = *b"fedcba9876543210fedcba9876543210";

    /// Searches a stream that arrives in pieces of `size`, until HTTP/2 begins or the stream ends.
    fn search(stream: &[u8], size: usize) -> Vec<Found> {
        let (mut search, mut all) = (Search::default(), Vec::new());
        for mut piece in stream.chunks(size) {
            while !piece.is_empty() {
                let (used, found) = search.next(piece);
                piece = &piece[used..];
                let ended = found == Some(Found::Http);
                all.extend(found);
                if ended {
                    return all;
                }
            }
        }
        all
    }

    #[test]
    fn repeated_requests_are_answered_once_and_newer_ones_again() {
        let mut stream = b"PRI * HTTP/2.0 of an earlier connection".to_vec();
        for nonce in [A, A, B, B] {
            stream.extend(request(&nonce, PROTOCOL));
        }
        stream.extend(b"PRI * HTTP/2.0");
        for size in [1, 7, 4096, stream.len()] {
            assert_eq!(
                search(&stream, size),
                [Found::Request(A), Found::Request(B), Found::Http],
                "in pieces of {size} bytes"
            );
        }
    }

    #[test]
    fn garbage_is_skipped() {
        assert_eq!(search(&[b'x'; 10_000], 100), []);
        let mut stream = vec![b'\n'; 1000];
        stream.extend(&request(&A, PROTOCOL)[100..]);
        stream.push(b'P');
        assert_eq!(search(&stream, 33), [Found::Request(A), Found::Http]);
    }
}
