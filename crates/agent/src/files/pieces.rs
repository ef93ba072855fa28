//! Streams between the connection and a thread, with a bounded number of pieces in between.

use crate::files::read::PIECE;
use bytes::{Buf, Bytes};
use futures::Stream;
use futures::stream::poll_fn;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::io::{self, Read, Write};
use std::task::Poll;
use tokio::sync::mpsc;

/// Number of pieces that wait in a stream.
const MAX_WAITING: usize = 4;

/// A piece; `None` is the end. A stream without an end was interrupted.
type Piece = io::Result<Option<Bytes>>;

fn interrupted() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the stream was interrupted")
}

/// Returns a stream for the host, and its writer for a thread.
pub(crate) fn to_host() -> (Writer, impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static) {
    let (sender, mut receiver) = mpsc::channel::<Piece>(MAX_WAITING);
    let stream = poll_fn(move |context| match receiver.poll_recv(context) {
        Poll::Pending => Poll::Pending,
        Poll::Ready(Some(Ok(piece))) => Poll::Ready(piece.map(Ok)),
        Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
        Poll::Ready(None) => Poll::Ready(Some(Err(interrupted()))),
    });
    let buffer = Vec::with_capacity(PIECE);
    (Writer { sender, buffer }, stream)
}

/// The end of a stream that a thread writes to.
pub(crate) struct Writer {
    sender: mpsc::Sender<Piece>,
    buffer: Vec<u8>,
}

impl Writer {
    /// Ends the stream.
    pub(crate) fn end(mut self, result: io::Result<()>) {
        let end = result.and_then(|()| self.flush());
        // The receiver is gone if the host has cancelled the request.
        let _ = self.sender.blocking_send(end.map(|()| None));
    }

    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE));
        let sent = self.sender.blocking_send(Ok(Some(Bytes::from(piece))));
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() == PIECE {
            self.send()?;
        }
        let taken = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.buffer.is_empty() {
            true => Ok(()),
            false => self.send(),
        }
    }
}

/// Returns a stream from the host: its reader for a thread, and the other end for [`feed`].
pub(crate) fn from_host() -> (Feeder, Reader) {
    let (sender, receiver) = mpsc::channel(MAX_WAITING);
    let reader = Reader {
        receiver,
        piece: Bytes::new(),
        has_ended: false,
    };
    (Feeder(sender), reader)
}

/// The end of a stream from the host that a connection writes to.
pub(crate) struct Feeder(mpsc::Sender<Piece>);

impl Feeder {
    /// Passes a body on until it ends, or until the reader is gone.
    pub(crate) async fn feed(self, mut body: Incoming) {
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                () = self.0.closed() => return,
            };
            let piece = match frame {
                None => Ok(None),
                Some(Err(error)) => Err(io::Error::other(format!("the stream was interrupted: {error}"))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => Ok(Some(data)),
                    Err(_trailers) => continue,
                },
            };
            let is_last = !matches!(piece, Ok(Some(_)));
            if self.0.send(piece).await.is_err() || is_last {
                return;
            }
        }
    }
}

/// The end of a stream that a thread reads from.
pub(crate) struct Reader {
    receiver: mpsc::Receiver<Piece>,
    piece: Bytes,
    has_ended: bool,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.has_ended {
            match self.receiver.blocking_recv() {
                Some(Ok(Some(piece))) => self.piece = piece,
                Some(Ok(None)) => self.has_ended = true,
                Some(Err(error)) => return Err(error),
                None => return Err(interrupted()),
            }
        }
        let taken = buffer.len().min(self.piece.len());
        buffer[..taken].copy_from_slice(&self.piece[..taken]);
        self.piece.advance(taken);
        Ok(taken)
    }
}
