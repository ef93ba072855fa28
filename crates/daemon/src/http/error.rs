//! The HTTP status, the code and the body of each error. No other module uses a status.

use crate::host::error::ServiceError;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use scalebox_api::{ErrorBody, ErrorCode};
use serde_json::{Map, Value, json};

/// Returns the API's error code and the HTTP status that goes with it.
fn code_and_status(error: &ServiceError) -> (ErrorCode, StatusCode) {
    match error {
        ServiceError::Invalid { .. } => (ErrorCode::InvalidRequest, StatusCode::BAD_REQUEST),
        ServiceError::Unauthorized => (ErrorCode::Unauthorized, StatusCode::UNAUTHORIZED),
        ServiceError::Forbidden(_) => (ErrorCode::Forbidden, StatusCode::FORBIDDEN),
        ServiceError::NotFound(_) => (ErrorCode::NotFound, StatusCode::NOT_FOUND),
        ServiceError::MethodNotAllowed(_) => (ErrorCode::MethodNotAllowed, StatusCode::METHOD_NOT_ALLOWED),
        ServiceError::Timeout(_) => (ErrorCode::Timeout, StatusCode::REQUEST_TIMEOUT),
        ServiceError::NameTaken(_) => (ErrorCode::NameTaken, StatusCode::CONFLICT),
        ServiceError::Busy(_) => (ErrorCode::Busy, StatusCode::CONFLICT),
        ServiceError::WrongState(_) => (ErrorCode::WrongState, StatusCode::CONFLICT),
        ServiceError::TooLarge(_) => (ErrorCode::PayloadTooLarge, StatusCode::PAYLOAD_TOO_LARGE),
        ServiceError::Unsupported(_) => (ErrorCode::InvalidRequest, StatusCode::UNSUPPORTED_MEDIA_TYPE),
        ServiceError::IdempotencyMismatch(_) => (ErrorCode::IdempotencyMismatch, StatusCode::UNPROCESSABLE_ENTITY),
        ServiceError::NotReady(_) => (ErrorCode::NotReady, StatusCode::SERVICE_UNAVAILABLE),
        ServiceError::Insufficient { .. } | ServiceError::StateFull(_) => {
            (ErrorCode::InsufficientStorage, StatusCode::INSUFFICIENT_STORAGE)
        }
        ServiceError::Unreachable(_) => (ErrorCode::Unreachable, StatusCode::SERVICE_UNAVAILABLE),
        ServiceError::GuestTimeout { .. } | ServiceError::PullTimeout { .. } => {
            (ErrorCode::Timeout, StatusCode::GATEWAY_TIMEOUT)
        }
        ServiceError::GuestFull(_) => (ErrorCode::InsufficientStorage, StatusCode::INSUFFICIENT_STORAGE),
        ServiceError::Internal(_) | ServiceError::HostFailed { .. } => {
            (ErrorCode::Internal, StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}

/// Returns the response body.
pub(crate) fn body(error: &ServiceError) -> ErrorBody {
    let (field, details) = match error {
        ServiceError::Invalid { field, .. } => (field.clone(), json!({})),
        ServiceError::Insufficient { available, need } => (
            None,
            json!({ "available_gib": available.as_u64(), "need_gib": need.as_u64() }),
        ),
        ServiceError::GuestTimeout { details, .. } | ServiceError::PullTimeout { details, .. } => {
            (None, details.clone())
        }
        _ => (None, json!({})),
    };
    ErrorBody {
        error: match error {
            ServiceError::HostFailed { sentence, .. } => {
                format!("{sentence}: the cause is in the log of scaleboxd, under the id in the header x-request-id")
            }
            other => other.to_string(),
        },
        code: code_and_status(error).0,
        field,
        details: match details {
            Value::Object(details) => details,
            _ => Map::new(),
        },
    }
}

impl IntoResponse for ServiceError {
    fn into_response(self) -> Response {
        let (_, status) = code_and_status(&self);
        match self {
            ServiceError::Internal(_) | ServiceError::HostFailed { .. } => {
                tracing::error!(status = status.as_u16(), error = %self, "request failed")
            }
            // `logins` logs these, with the peer and rate-limited.
            ServiceError::Unauthorized => {}
            _ => tracing::info!(status = status.as_u16(), error = %self, "request rejected"),
        }
        (status, Json(body(&self))).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_receive_a_sentence_and_not_a_program_s_output() {
        let failed = ServiceError::HostFailed {
            sentence: "the host cannot check a file system".to_owned(),
            cause: "e2fsck: /dev/loop7: Input/output error".to_owned(),
        };
        let body = body(&failed);
        assert_eq!(body.code, ErrorCode::Internal);
        assert!(
            body.error.starts_with("the host cannot check a file system: "),
            "{}",
            body.error
        );
        assert!(!body.error.contains("loop7"), "{}", body.error);
    }
}
