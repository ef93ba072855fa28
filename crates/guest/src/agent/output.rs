//! The output of a command.

use crate::agent::connection::Download;
use crate::agent::error::AgentError;
use scalebox_agent_api::frame::{Decoder, Frame, Malformed};
use std::collections::VecDeque;

/// The output of a command, frame by frame.
///
/// Frames follow each other without a gap or an overlap; lost output is a frame of its own.
pub struct Output {
    download: Download,
    decoder: Decoder,
    frames: VecDeque<Frame>,
    /// Nothing after the last frame can be decoded.
    malformed: Option<Malformed>,
    /// Offset of the next frame.
    next: u64,
    has_ended: bool,
}

impl Output {
    /// Returns the output from the offset `since`.
    pub(crate) fn new(download: Download, since: u64) -> Output {
        Output {
            download,
            decoder: Decoder::default(),
            frames: VecDeque::new(),
            malformed: None,
            next: since,
            has_ended: false,
        }
    }

    /// Returns the next frame. `None` after [`Frame::End`]; without it, the output so far was
    /// requested.
    ///
    /// # Errors
    /// [`AgentError`] if the stream is interrupted or malformed; nothing follows.
    pub async fn next(&mut self) -> Option<Result<Frame, AgentError>> {
        if self.has_ended {
            return None;
        }
        let next = self.read().await;
        self.has_ended = !matches!(&next, Some(Ok(frame)) if !matches!(frame, Frame::End { .. }));
        next
    }

    async fn read(&mut self) -> Option<Result<Frame, AgentError>> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Some(self.in_order(frame));
            }
            if let Some(malformed) = self.malformed {
                return Some(Err(AgentError::malformed(malformed)));
            }
            let piece = match self.download.next().await {
                Some(Ok(piece)) => piece,
                Some(Err(error)) => return Some(Err(error)),
                None if self.decoder.is_at_boundary() => return None,
                None => return Some(Err(AgentError::malformed("a frame of output that is cut off"))),
            };
            let mut decoded = Vec::new();
            self.malformed = self.decoder.push(&piece, &mut decoded).err();
            self.frames.extend(decoded);
        }
    }

    fn in_order(&mut self, frame: Frame) -> Result<Frame, AgentError> {
        let (offset, length) = match &frame {
            Frame::Stdout { offset, bytes } | Frame::Stderr { offset, bytes } => (*offset, bytes.len() as u64),
            Frame::Lost { offset, count } => (*offset, *count),
            Frame::End { offset, .. } => (*offset, 0),
        };
        if offset != self.next {
            let why = format!("output of offset {offset} instead of {}", self.next);
            return Err(AgentError::malformed(why));
        }
        // The decoder has checked that the sum does not overflow.
        self.next = offset.saturating_add(length);
        Ok(frame)
    }
}
