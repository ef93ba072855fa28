//! The WebSocket messages of `GET /vms/{vm}/execs/{exec}/attach`.
//!
//! Each binary message has one byte for its channel, and then the content. The client may send
//! stdin, its end, window sizes and signals; the daemon sends output, and at last the end.

use crate::error::ErrorBody;
use crate::exec::{ExecEnd, WindowSize};
use crate::signal::Signal;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;

/// The WebSocket subprotocol (RFC 6455, section 1.9).
pub const SUBPROTOCOL: &str = "v1.exec.scalebox";

/// Maximum size of a message that either side sends, in bytes. A longer output has several
/// messages.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const END: u8 = 3;
const RESIZE: u8 = 4;
const SIGNAL: u8 = 5;
const CLOSE_STDIN: u8 = 255;

/// A message of an attached exec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttachMessage {
    /// Bytes for stdin (channel 0, from the client).
    Stdin(Vec<u8>),
    /// Output (channel 1, from the daemon). An exec with a terminal has no other output.
    Stdout(Vec<u8>),
    /// Output to stderr (channel 2, from the daemon).
    Stderr(Vec<u8>),
    /// The command has ended; the last message (channel 3, from the daemon).
    End(ExecEnd),
    /// The daemon can no longer determine how the command ends; the last message (channel 3).
    Failed(Box<ErrorBody>),
    /// A new window size (channel 4, from the client).
    Resize(WindowSize),
    /// A signal for the process group (channel 5, from the client).
    Signal(Signal),
    /// The end of stdin (channel 255, from the client).
    CloseStdin,
}

/// A message that has no channel, or whose content does not have the form of its channel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the message {0}")]
pub struct InvalidMessage(String);

impl AttachMessage {
    /// Returns the binary message.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            AttachMessage::Stdin(bytes) => message(STDIN, bytes),
            AttachMessage::Stdout(bytes) => message(STDOUT, bytes),
            AttachMessage::Stderr(bytes) => message(STDERR, bytes),
            AttachMessage::End(end) => json_message(END, end),
            AttachMessage::Failed(error) => json_message(END, error),
            AttachMessage::Resize(size) => json_message(RESIZE, size),
            AttachMessage::Signal(signal) => json_message(SIGNAL, &serde_json::json!({ "signal": signal })),
            AttachMessage::CloseStdin => vec![CLOSE_STDIN],
        }
    }

    /// Parses a binary message.
    ///
    /// # Errors
    /// The message is empty, has an unknown channel, or its content is not valid.
    pub fn decode(message: &[u8]) -> Result<Self, InvalidMessage> {
        let (channel, content) = message
            .split_first()
            .ok_or_else(|| InvalidMessage("is empty".to_owned()))?;
        match *channel {
            STDIN => Ok(AttachMessage::Stdin(content.to_vec())),
            STDOUT => Ok(AttachMessage::Stdout(content.to_vec())),
            STDERR => Ok(AttachMessage::Stderr(content.to_vec())),
            END => match json(END, content) {
                Ok(end) => Ok(AttachMessage::End(end)),
                Err(not_an_end) => match json(END, content) {
                    Ok(error) => Ok(AttachMessage::Failed(Box::new(error))),
                    Err(_) => Err(not_an_end),
                },
            },
            RESIZE => WindowSize::parse(content)
                .map(AttachMessage::Resize)
                .map_err(|why| invalid(RESIZE, why)),
            SIGNAL => crate::exec::SignalExec::parse(content)
                .map(|request| AttachMessage::Signal(request.signal))
                .map_err(|why| invalid(SIGNAL, why)),
            CLOSE_STDIN if content.is_empty() => Ok(AttachMessage::CloseStdin),
            CLOSE_STDIN => Err(invalid(CLOSE_STDIN, "it has content")),
            channel => Err(InvalidMessage(format!("has the unknown channel {channel}"))),
        }
    }
}

fn message(channel: u8, content: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(content.len() + 1);
    message.push(channel);
    message.extend_from_slice(content);
    message
}

fn json_message(channel: u8, content: &impl Serialize) -> Vec<u8> {
    // These types have only strings as keys and no failing serializer, so they always serialize.
    message(channel, &serde_json::to_vec(content).unwrap_or_default())
}

fn json<T: DeserializeOwned>(channel: u8, content: &[u8]) -> Result<T, InvalidMessage> {
    serde_json::from_slice(content).map_err(|why| invalid(channel, why))
}

fn invalid(channel: u8, why: impl fmt::Display) -> InvalidMessage {
    InvalidMessage(format!("on channel {channel} is invalid: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorCode;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_a_round_trip() {
        let end = ExecEnd {
            exit_code: None,
            signal: Some(Signal::KILL),
            timed_out: true,
            duration_ms: 12,
        };
        let error = ErrorBody {
            error: "VM box: its agent does not respond".into(),
            code: ErrorCode::Unreachable,
            field: None,
            details: Default::default(),
        };
        for sent in [
            AttachMessage::Stdin(b"a\0\xff".to_vec()),
            AttachMessage::Stdout(vec![]),
            AttachMessage::Stderr(b"x".to_vec()),
            AttachMessage::End(end),
            AttachMessage::Failed(Box::new(error)),
            AttachMessage::Resize(WindowSize { rows: 24, cols: 80 }),
            AttachMessage::Signal(Signal::INT),
            AttachMessage::CloseStdin,
        ] {
            assert_eq!(AttachMessage::decode(&sent.encode()), Ok(sent));
        }
        assert_eq!(
            AttachMessage::Resize(WindowSize { rows: 1, cols: 2 }).encode(),
            b"\x04{\"rows\":1,\"cols\":2}"
        );
        assert_eq!(
            AttachMessage::Signal(Signal::TERM).encode(),
            b"\x05{\"signal\":\"TERM\"}"
        );
    }

    #[test]
    fn other_messages_are_rejected() {
        for message in [
            &b""[..],
            b"\x03{}",
            b"\x03null",
            b"\x04{\"rows\":0,\"cols\":1}",
            b"\x04{\"rows\":1}",
            b"\x05{\"signal\":99}",
            b"\x06x",
            b"\xffx",
        ] {
            assert!(AttachMessage::decode(message).is_err(), "{message:?}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_do_not_break_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = AttachMessage::decode(&bytes);
        }
    }
}
