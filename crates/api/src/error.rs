//! Error responses: a sentence for people, and a code for programs.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// The body of every response with a status of 400 or above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ErrorBody {
    /// A sentence for people: what failed, why, and what to do. It may change from release to
    /// release.
    #[cfg_attr(feature = "openapi", schema(example = "there is no VM \"box\""))]
    pub error: String,
    /// The reason, for programs; newer servers may send codes that are not listed.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = String, example = "not_found"))]
    pub code: ErrorCode,
    /// The field of the request that the error is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = String, required = false, example = "disk_size_gib"))]
    pub field: Option<String>,
    /// The numbers and names in the sentence, for programs; they depend on the code.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    #[cfg_attr(feature = "openapi", schema(value_type = Object, required = false))]
    pub details: Map<String, Value>,
}

macro_rules! codes {
    ($($(#[$doc:meta])+ $name:ident = $text:literal,)+) => {
        /// The reason why a request was refused or failed.
        #[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode {
            $($(#[$doc])+ #[serde(rename = $text)] $name,)+
            /// A code that a newer daemon sends and this client does not know; empty if the daemon
            /// sends none.
            #[serde(untagged)]
            Other(String),
        }

        impl ErrorCode {
            /// All known codes, as strings of the API.
            pub const NAMES: &[&str] = &[$($text),+];

            /// Returns the API's string for the code.
            pub fn as_str(&self) -> &str {
                match self {
                    $(ErrorCode::$name => $text,)+
                    ErrorCode::Other(text) => text,
                }
            }
        }
    };
}

codes! {
    /// The request is malformed, or a value is out of range; `field` names the field.
    InvalidRequest = "invalid_request",
    /// The request has no valid token.
    Unauthorized = "unauthorized",
    /// The request is never allowed, such as deleting a protected template.
    Forbidden = "forbidden",
    /// The VM, template or path does not exist.
    NotFound = "not_found",
    /// The path does not support this method; the header `Allow` lists the methods that it does.
    MethodNotAllowed = "method_not_allowed",
    /// Another VM or template has the name.
    NameTaken = "name_taken",
    /// Another operation on the same object is running. Try again when it has ended.
    Busy = "busy",
    /// The object's state does not allow the request, such as starting a VM that is running.
    WrongState = "wrong_state",
    /// The request does not fit into the pool or on the host disk. `details` has `available_gib`
    /// and `need_gib`.
    InsufficientStorage = "insufficient_storage",
    /// The host does not have enough memory.
    InsufficientMemory = "insufficient_memory",
    /// The request exceeds a limit of the token.
    QuotaExceeded = "quota_exceeded",
    /// The body is too large.
    PayloadTooLarge = "payload_too_large",
    /// The request did not arrive, or was not completed, in time.
    Timeout = "timeout",
    /// The `Idempotency-Key` belongs to another request.
    IdempotencyMismatch = "idempotency_mismatch",
    /// The host cannot do this yet, or at the moment; its operator can change that.
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
    fn errors_survive_a_round_trip_also_without_a_code_or_with_an_unknown_one() {
        for body in [
            json!({"error": "no", "code": "not_found"}),
            json!({"error": "no", "code": "weather", "field": "sky", "details": {"rain_mm": 3}}),
        ] {
            let read: ErrorBody = serde_json::from_value(body.clone()).unwrap();
            assert_eq!(serde_json::to_value(read).unwrap(), body);
        }
        let old: ErrorBody = serde_json::from_value(json!({"error": "no"})).unwrap();
        assert_eq!(old.code, ErrorCode::default());
        assert!(ErrorCode::NAMES.contains(&"insufficient_storage"));
    }
}
