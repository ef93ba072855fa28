//! The output of an exec as NDJSON: one JSON object per line.

use crate::error::ErrorBody;
use crate::exec::ExecEnd;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use scalebox_units::ExecId;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A line of an exec's output stream. Offsets count the bytes of stdout and stderr together, from
/// the start of the command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum OutputLine {
    /// The exec's id: the first line of the response to `POST /vms/{vm}/exec`.
    Started {
        /// The id.
        exec: ExecId,
    },
    /// Bytes that the command wrote to stdout.
    Stdout {
        /// The bytes, in base64.
        #[serde(rename = "stdout", serialize_with = "encode", deserialize_with = "decode")]
        #[cfg_attr(feature = "openapi", schema(value_type = String, content_encoding = "base64"))]
        bytes: Vec<u8>,
        /// Offset of the first byte.
        offset: u64,
    },
    /// Bytes that the command wrote to stderr.
    Stderr {
        /// The bytes, in base64.
        #[serde(rename = "stderr", serialize_with = "encode", deserialize_with = "decode")]
        #[cfg_attr(feature = "openapi", schema(value_type = String, content_encoding = "base64"))]
        bytes: Vec<u8>,
        /// Offset of the first byte.
        offset: u64,
    },
    /// Bytes that were dropped before a client read them.
    Lost {
        /// Number of bytes.
        lost: u64,
        /// Offset of the first lost byte.
        offset: u64,
    },
    /// The command has ended: the last line.
    Exit {
        /// The end of the command.
        exit: ExecEnd,
    },
    /// The daemon can no longer follow the command: the last line.
    Failed(ErrorBody),
}

fn encode<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(bytes))
}

fn decode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD.decode(text).map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn lines_have_the_documented_form_and_survive_a_round_trip() {
        for line in [
            json!({"exec": "exec-0123456789ab"}),
            json!({"stdout": "aGkK", "offset": 0}),
            json!({"stderr": "/w==", "offset": 3}),
            json!({"lost": 5, "offset": 4}),
            json!({"exit": {"exit_code": 3, "signal": null, "timed_out": false, "duration_ms": 12}}),
            json!({"error": "the VM stopped", "code": "wrong_state"}),
        ] {
            let read: OutputLine = serde_json::from_value(line.clone()).unwrap();
            assert_eq!(serde_json::to_value(read).unwrap(), line);
        }
        let read: OutputLine = serde_json::from_value(json!({"stderr": "/w==", "offset": 3})).unwrap();
        let expected = OutputLine::Stderr {
            bytes: vec![0xff],
            offset: 3,
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn other_lines_are_rejected() {
        for line in [
            json!({"stdout": "?", "offset": 0}),
            json!({"stdout": "aGkK"}),
            json!({}),
            json!([]),
            Value::Null,
        ] {
            assert!(serde_json::from_value::<OutputLine>(line).is_err());
        }
    }
}
