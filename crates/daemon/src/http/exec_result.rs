//! The response to a command that has ended, streamed: its output may be in a file.

use crate::host::blocking;
use crate::host::error::ServiceError;
use crate::vm::exec::Finished;
use crate::vm::spool::{Pieces, Spool};
use axum::body::{Body, Bytes};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::stream::{self, Stream, StreamExt};
use serde_json::json;
use std::io;

/// Returns the JSON of an [`ExecResult`](scalebox_api::ExecResult).
pub(crate) fn body(finished: Finished) -> Body {
    let Finished {
        id,
        end,
        stdout,
        stderr,
        truncated,
    } = finished;
    let head = json!({
        "exec": id.as_str(), "exit_code": end.exit_code, "signal": end.signal, "timed_out": end.timed_out,
    });
    let mut tail = json!({ "truncated": truncated, "duration_ms": end.duration_ms });
    for (name, spool) in [("stdout_encoding", &stdout), ("stderr_encoding", &stderr)] {
        if !spool.is_text() {
            tail[name] = "base64".into();
        }
    }
    let head = head.to_string();
    let parts = [
        Part::Json(format!("{},\"stdout\":\"", head.trim_end_matches('}'))),
        Part::Output(Text::new(stdout)),
        Part::Json("\",\"stderr\":\"".to_owned()),
        Part::Output(Text::new(stderr)),
        Part::Json(format!("\",{}", tail.to_string().trim_start_matches('{'))),
    ];
    Body::from_stream(stream::iter(parts).flat_map(Part::stream))
}

enum Part {
    Json(String),
    Output(Text),
}

impl Part {
    fn stream(self) -> stream::BoxStream<'static, io::Result<Bytes>> {
        match self {
            Part::Json(text) => stream::once(async { Ok(Bytes::from(text)) }).boxed(),
            Part::Output(text) => text.stream().boxed(),
        }
    }
}

/// Output that becomes the content of a JSON string.
struct Text {
    pieces: Pieces,
    is_text: bool,
    /// The first bytes of a character whose rest is in the next piece.
    partial: Vec<u8>,
}

impl Text {
    fn new(spool: Spool) -> Text {
        Text {
            is_text: spool.is_text(),
            pieces: spool.into_pieces(),
            partial: Vec::new(),
        }
    }

    fn stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send {
        stream::unfold(Some(self), |text| async {
            let mut text = text?;
            let (piece, mut text) = match text.pieces.blocks() {
                false => (text.pieces.next(), text),
                true => {
                    let read = blocking(move || Ok::<_, ServiceError>((text.pieces.next(), text))).await;
                    match read {
                        Ok(read) => read,
                        Err(error) => return Some((Err(io::Error::other(error.to_string())), None)),
                    }
                }
            };
            match piece {
                Ok(piece) if piece.is_empty() => None,
                Ok(piece) => Some((Ok(text.encode(&piece)), Some(text))),
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    fn encode(&mut self, piece: &[u8]) -> Bytes {
        if !self.is_text {
            return STANDARD.encode(piece).into();
        }
        self.partial.extend_from_slice(piece);
        let length = match std::str::from_utf8(&self.partial) {
            Ok(text) => text.len(),
            Err(error) => error.valid_up_to(),
        };
        let rest = self.partial.split_off(length);
        let whole = std::mem::replace(&mut self.partial, rest);
        let quoted = json!(String::from_utf8_lossy(&whole)).to_string();
        // The quotes are those of the whole string.
        let content = 1..quoted.len() - 1;
        Bytes::from(quoted).slice(content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::to_bytes;
    use scalebox_api::{Encoding, ExecEnd, ExecResult, Signal};
    use std::path::Path;

    fn spool(bytes: &[u8]) -> Spool {
        let mut spool = Spool::new(Path::new("/tmp"));
        for piece in bytes.chunks(60_000) {
            if let Some(bytes) = spool.push(piece.to_vec()) {
                spool.write(&bytes);
            }
        }
        spool
    }

    async fn result(stdout: &[u8], stderr: &[u8]) -> ExecResult {
        let finished = Finished {
            id: "exec-0123456789ab".parse().unwrap(),
            end: ExecEnd {
                exit_code: None,
                signal: Some(Signal::KILL),
                timed_out: true,
                duration_ms: 7,
            },
            stdout: spool(stdout),
            stderr: spool(stderr),
            truncated: true,
        };
        let json = to_bytes(body(finished), usize::MAX).await.unwrap();
        serde_json::from_slice(&json).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&json)))
    }

    #[tokio::test]
    async fn the_response_is_the_json_of_its_type_whatever_the_output() {
        let text = "a\"\\\n\u{1}ö😀".repeat(30_000);
        let bytes: Vec<u8> = (0..=255).cycle().take(200_001).collect();
        for (stdout, stderr) in [
            (&b""[..], &b""[..]),
            (b"hi\n", b"\xff"),
            (text.as_bytes(), &bytes),
            (&bytes[..65_537], &text.as_bytes()[..13]),
        ] {
            let result = result(stdout, stderr).await;
            assert_eq!(
                (result.signal, result.timed_out, result.duration_ms),
                (Some(Signal::KILL), true, 7)
            );
            for (encoding, sent, expected) in [
                (result.stdout_encoding, result.stdout, stdout),
                (result.stderr_encoding, result.stderr, stderr),
            ] {
                let decoded = match encoding {
                    Encoding::Utf8 => sent.into_bytes(),
                    Encoding::Base64 => STANDARD.decode(sent).unwrap(),
                };
                assert!(
                    decoded == expected,
                    "{} bytes instead of {}",
                    decoded.len(),
                    expected.len()
                );
                assert_eq!(encoding == Encoding::Utf8, std::str::from_utf8(expected).is_ok());
            }
        }
    }
}
