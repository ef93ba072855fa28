//! The output of an exec as a stream of frames.
//!
//! A frame is a header of 13 bytes and its content: the kind (one byte), the offset of the content
//! in the exec's output (8 bytes, little-endian), the length of the content (4 bytes,
//! little-endian).
//!
//! stdout and stderr share one sequence of offsets, in the order in which the agent read them. A
//! stream starts at the requested offset, or at the oldest byte that the guest still has; a gap is
//! reported by [`Lost`](Frame::Lost). The stream of an ended exec ends with [`End`](Frame::End). A
//! stream that ends without it was interrupted, or `follow` was not requested.

use crate::exec::ExecEnd;

/// Length of a frame's header, in bytes.
pub const HEADER: usize = 13;
/// Maximum length of a frame's content, in bytes.
pub const MAX_CONTENT: usize = 64 << 10;

/// Maximum length of the content of [`Frame::End`], in bytes.
const END_CONTENT: usize = 9;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Bytes that the command wrote to stdout, or to its terminal.
    Stdout {
        /// Offset of the first byte.
        offset: u64,
        /// At most [`MAX_CONTENT`] bytes.
        bytes: Vec<u8>,
    },
    /// Bytes that the command wrote to stderr.
    Stderr {
        /// Offset of the first byte.
        offset: u64,
        /// At most [`MAX_CONTENT`] bytes.
        bytes: Vec<u8>,
    },
    /// Output that the guest no longer has.
    Lost {
        /// Offset of the first lost byte.
        offset: u64,
        /// Number of lost bytes.
        count: u64,
    },
    /// The command has ended, and all of its output was sent.
    End {
        /// Total length of the output.
        offset: u64,
        /// The end of the command.
        end: ExecEnd,
    },
}

/// The reason why bytes are not a stream of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the guest agent sent an invalid frame of output")
    }
}

impl std::error::Error for Malformed {}

const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const LOST: u8 = 3;
const END: u8 = 4;

impl Frame {
    /// Appends the encoded frame to `to`.
    pub fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Frame::Stdout { offset, bytes } => put(to, STDOUT, *offset, bytes),
            Frame::Stderr { offset, bytes } => put(to, STDERR, *offset, bytes),
            Frame::Lost { offset, count } => put(to, LOST, *offset, &count.to_le_bytes()),
            Frame::End { offset, end } => {
                let mut content = [0; END_CONTENT];
                content[0] = u8::from(end.timed_out);
                content[1..5].copy_from_slice(&end.exit_code.unwrap_or(-1).to_le_bytes());
                content[5..9].copy_from_slice(&end.signal.unwrap_or(0).to_le_bytes());
                put(to, END, *offset, &content);
            }
        }
    }
}

fn put(to: &mut Vec<u8>, kind: u8, offset: u64, content: &[u8]) {
    to.push(kind);
    to.extend_from_slice(&offset.to_le_bytes());
    to.extend_from_slice(&u32::try_from(content.len()).unwrap_or(u32::MAX).to_le_bytes());
    to.extend_from_slice(content);
}

/// Decodes a stream of frames that arrives in pieces. Buffers at most one frame.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Adds bytes of the stream, and appends the frames that are complete to `frames`.
    ///
    /// # Errors
    /// [`Malformed`] for an unknown kind, a length over the limit, or invalid content. Nothing
    /// after it can be decoded.
    pub fn push(&mut self, mut bytes: &[u8], frames: &mut Vec<Frame>) -> Result<(), Malformed> {
        while !bytes.is_empty() {
            let needed = match frame_length(&self.buffer)? {
                Some(length) => length,
                None => HEADER,
            };
            let taken = bytes.len().min(needed - self.buffer.len());
            let (now, later) = bytes.split_at(taken);
            self.buffer.extend_from_slice(now);
            bytes = later;
            if frame_length(&self.buffer)? == Some(self.buffer.len()) {
                frames.push(decode(&self.buffer)?);
                self.buffer.clear();
            }
        }
        Ok(())
    }

    /// Returns `true` if the stream may end here: no frame has begun.
    pub fn is_at_boundary(&self) -> bool {
        self.buffer.is_empty()
    }
}

/// Returns the length of the frame that `bytes` begins with; `None` if its header is incomplete.
fn frame_length(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some(length) = bytes.get(9..HEADER).and_then(|field| field.first_chunk::<4>()) else {
        return Ok(None);
    };
    match u32::from_le_bytes(*length) as usize {
        length if length > MAX_CONTENT => Err(Malformed),
        length => Ok(Some(HEADER + length)),
    }
}

fn decode(frame: &[u8]) -> Result<Frame, Malformed> {
    let (header, content) = frame.split_first_chunk::<HEADER>().ok_or(Malformed)?;
    let offset = u64::from_le_bytes(*header[1..9].first_chunk().ok_or(Malformed)?);
    offset.checked_add(content.len() as u64).ok_or(Malformed)?;
    match header[0] {
        STDOUT => Ok(Frame::Stdout {
            offset,
            bytes: content.to_vec(),
        }),
        STDERR => Ok(Frame::Stderr {
            offset,
            bytes: content.to_vec(),
        }),
        LOST => {
            let count = u64::from_le_bytes(content.try_into().map_err(|_| Malformed)?);
            offset.checked_add(count).ok_or(Malformed)?;
            Ok(Frame::Lost { offset, count })
        }
        END => Ok(Frame::End {
            offset,
            end: decode_end(content)?,
        }),
        _ => Err(Malformed),
    }
}

fn decode_end(content: &[u8]) -> Result<ExecEnd, Malformed> {
    let content: &[u8; END_CONTENT] = content.try_into().map_err(|_| Malformed)?;
    let number = |at: usize| {
        let bytes = content[at..].first_chunk().ok_or(Malformed)?;
        Ok(i32::from_le_bytes(*bytes))
    };
    let (exit_code, signal) = (number(1)?, number(5)?);
    match (content[0], exit_code, signal) {
        (timed_out @ 0..=1, 0..=255, 0) => Ok(ExecEnd {
            exit_code: Some(exit_code),
            signal: None,
            timed_out: timed_out == 1,
        }),
        (timed_out @ 0..=1, -1, 1..=64) => Ok(ExecEnd {
            exit_code: None,
            signal: Some(signal),
            timed_out: timed_out == 1,
        }),
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn end() -> impl Strategy<Value = ExecEnd> {
        let exited = (0..=255).prop_map(|code| (Some(code), None));
        let killed = (1..=64).prop_map(|signal| (None, Some(signal)));
        (prop_oneof![exited, killed], any::<bool>()).prop_map(|((exit_code, signal), timed_out)| ExecEnd {
            exit_code,
            signal,
            timed_out,
        })
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let offset = 0..u64::MAX / 4;
        let bytes = proptest::collection::vec(any::<u8>(), 0..100);
        prop_oneof![
            (offset.clone(), bytes.clone()).prop_map(|(offset, bytes)| Frame::Stdout { offset, bytes }),
            (offset.clone(), bytes).prop_map(|(offset, bytes)| Frame::Stderr { offset, bytes }),
            (offset.clone(), 0..u64::MAX / 4).prop_map(|(offset, count)| Frame::Lost { offset, count }),
            (offset, end()).prop_map(|(offset, end)| Frame::End { offset, end }),
        ]
    }

    proptest! {
        #[test]
        fn frames_are_decoded_from_pieces_of_any_size(frames in proptest::collection::vec(frame(), 0..10), piece in 1..50_usize) {
            let mut encoded = Vec::new();
            frames.iter().for_each(|frame| frame.encode(&mut encoded));
            let (mut decoder, mut decoded) = (Decoder::default(), Vec::new());
            for bytes in encoded.chunks(piece) {
                decoder.push(bytes, &mut decoded).unwrap();
            }
            prop_assert!(decoder.is_at_boundary());
            prop_assert_eq!(decoded, frames);
        }

        #[test]
        fn any_bytes_are_decoded_or_rejected_in_bounded_memory(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let (mut decoder, mut frames) = (Decoder::default(), Vec::new());
            let _ = decoder.push(&bytes, &mut frames);
            prop_assert!(decoder.buffer.len() <= HEADER + MAX_CONTENT);
        }
    }

    #[test]
    fn huge_lengths_and_unknown_kinds_are_rejected() {
        let mut frames = Vec::new();
        let mut huge = vec![STDOUT; HEADER];
        huge[9..13].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Decoder::default().push(&huge, &mut frames), Err(Malformed));
        let mut unknown = Vec::new();
        put(&mut unknown, 9, 0, b"x");
        assert_eq!(Decoder::default().push(&unknown, &mut frames), Err(Malformed));
        let mut both = Vec::new();
        put(&mut both, END, 0, &[2, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Decoder::default().push(&both, &mut frames), Err(Malformed));
        assert!(frames.is_empty());
    }
}
