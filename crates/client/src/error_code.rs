//! What a refused or failed request is answered: a sentence for people, and a code for programs.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// The body of every answer with a status of 400 or above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ErrorBody {
    /// A sentence for people: what failed, why, and what to do. It may change from release to
    /// release.
    #[cfg_attr(feature = "openapi", schema(example = "there is no VM \"box\""))]
    pub error: String,
    /// The reason, for programs; a word of [`ErrorCode`], to which newer servers add.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = String, example = "not_found"))]
    pub code: ErrorCode,
    /// The field of the request that the error is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = String, required = false, example = "disk_size_gib"))]
    pub field: Option<String>,
    /// Numbers and names of the sentence, for programs; which ones, depends on the code.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    #[cfg_attr(feature = "openapi", schema(value_type = Object, required = false))]
    pub details: Map<String, Value>,
}

macro_rules! codes {
    ($($(#[$doc:meta])+ $name:ident = $word:literal,)+) => {
        /// Why a request was refused or failed.
        #[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode {
            $($(#[$doc])+ #[serde(rename = $word)] $name,)+
            /// A code that a newer daemon knows, and this client does not; empty for a daemon that
            /// sends none.
            #[serde(untagged)]
            Other(String),
        }

        impl ErrorCode {
            /// The words of all codes.
            pub const WORDS: &[&str] = &[$($word),+];

            /// The word of the API.
            pub fn as_str(&self) -> &str {
                match self {
                    $(ErrorCode::$name => $word,)+
                    ErrorCode::Other(word) => word,
                }
            }
        }
    };
}

codes! {
    /// The request is malformed, or a value in it is out of bounds. `field` where it is about one.
    InvalidRequest = "invalid_request",
    /// No valid token.
    Unauthorized = "unauthorized",
    /// Allowed to nobody, such as the deletion of a protected template.
    Forbidden = "forbidden",
    /// No such VM, template or path.
    NotFound = "not_found",
    /// The path does not answer this method; the header `Allow` lists those that it does.
    MethodNotAllowed = "method_not_allowed",
    /// Another VM or template has the name.
    NameTaken = "name_taken",
    /// Another operation is running on the same thing. Try again when it has ended.
    Busy = "busy",
    /// The thing is in a state in which this cannot be done, such as a start of a VM that runs.
    WrongState = "wrong_state",
    /// It does not fit into the pool or on the host disk. `available_gib` and `need_gib` in
    /// `details`.
    InsufficientStorage = "insufficient_storage",
    /// The host has not enough memory.
    InsufficientMemory = "insufficient_memory",
    /// A limit of the token.
    QuotaExceeded = "quota_exceeded",
    /// The body is larger than what is read.
    PayloadTooLarge = "payload_too_large",
    /// The request did not arrive, or was not carried out, in time.
    Timeout = "timeout",
    /// The `Idempotency-Key` belongs to another request.
    IdempotencyMismatch = "idempotency_mismatch",
    /// The host cannot do this yet or at the moment; its operator can change that.
    NotReady = "not_ready",
    /// The host of the VM cannot be reached.
    Unreachable = "unreachable",
    /// Something on the host failed. The log has the cause.
    Internal = "internal",
}

impl Default for ErrorCode {
    fn default() -> Self {
        ErrorCode::Other(String::new())
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_error_is_read_as_it_is_written_also_one_of_an_older_or_newer_daemon() {
        for body in [
            json!({"error": "no", "code": "not_found"}),
            json!({"error": "no", "code": "weather", "field": "sky", "details": {"rain_mm": 3}}),
        ] {
            let read: ErrorBody = serde_json::from_value(body.clone()).unwrap();
            assert_eq!(serde_json::to_value(read).unwrap(), body);
        }
        let old: ErrorBody = serde_json::from_value(json!({"error": "no"})).unwrap();
        assert_eq!(old.code, ErrorCode::default());
        assert!(ErrorCode::WORDS.contains(&"insufficient_storage"));
    }
}
