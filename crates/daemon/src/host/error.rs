//! Errors of the service, and the HTTP status and error code that each one maps to.

use crate::state::StateError;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use scalebox_client::{ErrorBody, ErrorCode, Invalid};
use scalebox_storage::StorageError;
use scalebox_units::Gib;
use serde_json::{Map, Value, json};

/// A rejected or failed request. Input from a client never causes [`ServiceError::Internal`].
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The request is malformed, or a value in it is out of bounds.
    #[error("{message}")]
    Invalid {
        /// What is wrong, in a sentence.
        message: String,
        /// The field with the wrong value.
        field: Option<String>,
    },
    /// The token is missing or wrong. The message does not say which.
    #[error("a valid token is required in the header Authorization: Bearer TOKEN")]
    Unauthorized,
    /// Forbidden for everyone.
    #[error("{0}")]
    Forbidden(String),
    /// No VM, template or route has this name.
    #[error("{0}")]
    NotFound(String),
    /// The route does not support this method.
    #[error("{0}")]
    MethodNotAllowed(String),
    /// The client did not send its whole request in time.
    #[error("{0}")]
    Timeout(String),
    /// Another VM or template has this name.
    #[error("{0}")]
    NameTaken(String),
    /// Another operation is running on the same object.
    #[error("{0}")]
    Busy(String),
    /// The object's state does not allow this operation.
    #[error("{0}")]
    WrongState(String),
    /// The body is larger than the limit.
    #[error("{0}")]
    TooLarge(String),
    /// The body has an encoding that is not supported.
    #[error("{0}")]
    Unsupported(String),
    /// The idempotency key belongs to another request.
    #[error("{0}")]
    IdempotencyMismatch(String),
    /// The host cannot do this yet, or not at the moment; its operator can change that.
    #[error("{0}")]
    NotReady(String),
    /// The request does not fit into the pool or on the host disk; nothing was created. The seed
    /// fixes this message.
    #[error("Insufficient storage: {available}GB available, need {need}GB")]
    Insufficient {
        /// The largest size that would still be admitted, rounded down.
        available: Gib,
        /// The requested size plus the buffer, rounded up.
        need: Gib,
    },
    /// The disk of `STATE_DIR` is full.
    #[error("{0}")]
    StateFull(String),
    /// Something on the host failed.
    #[error("{0}")]
    Internal(String),
}

impl ServiceError {
    /// A malformed request, with no single field to blame.
    pub fn invalid(message: impl Into<String>) -> ServiceError {
        ServiceError::Invalid {
            message: message.into(),
            field: None,
        }
    }

    /// A field with an invalid value.
    pub fn invalid_field(field: &str, message: impl Into<String>) -> ServiceError {
        ServiceError::Invalid {
            message: message.into(),
            field: Some(field.to_owned()),
        }
    }

    /// Returns the API's error code and the HTTP status that goes with it.
    fn code_and_status(&self) -> (ErrorCode, StatusCode) {
        match self {
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
            ServiceError::Internal(_) => (ErrorCode::Internal, StatusCode::INTERNAL_SERVER_ERROR),
        }
    }

    /// Returns the response body.
    pub fn body(&self) -> ErrorBody {
        let (field, details) = match self {
            ServiceError::Invalid { field, .. } => (field.clone(), json!({})),
            ServiceError::Insufficient { available, need } => (
                None,
                json!({ "available_gib": available.as_u64(), "need_gib": need.as_u64() }),
            ),
            _ => (None, json!({})),
        };
        ErrorBody {
            error: self.to_string(),
            code: self.code_and_status().0,
            field,
            details: match details {
                Value::Object(details) => details,
                _ => Map::new(),
            },
        }
    }
}

/// Quotes text from a client for a response or the log: escaped and cut to the length of a line.
pub fn quoted(text: &str) -> String {
    const MAX_CHARS: usize = 80;
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

impl IntoResponse for ServiceError {
    fn into_response(self) -> Response {
        let (_, status) = self.code_and_status();
        match self {
            ServiceError::Internal(_) => tracing::error!(status = status.as_u16(), error = %self, "request failed"),
            // `logins` logs these, with the peer and rate-limited.
            ServiceError::Unauthorized => {}
            _ => tracing::info!(status = status.as_u16(), error = %self, "request rejected"),
        }
        (status, Json(self.body())).into_response()
    }
}

impl From<Invalid> for ServiceError {
    fn from(error: Invalid) -> Self {
        ServiceError::Invalid {
            message: error.to_string(),
            field: error.field().map(str::to_owned),
        }
    }
}

impl From<StorageError> for ServiceError {
    fn from(error: StorageError) -> Self {
        let text = error.to_string();
        match error {
            StorageError::Insufficient { available, need } => ServiceError::Insufficient { available, need },
            StorageError::NoTemplate(_) => ServiceError::NotFound(text),
            StorageError::TemplateExists(_) => ServiceError::NameTaken(text),
            StorageError::TemplateBeingMade(_) | StorageError::Busy(_) => ServiceError::Busy(text),
            StorageError::UnfitDisk(_) | StorageError::FileSystem(_) | StorageError::DamagedTemplate { .. } => {
                ServiceError::WrongState(text)
            }
            StorageError::PoolSize(_) => ServiceError::invalid_field("size_gib", text),
            StorageError::ExistingFileSystem(_) | StorageError::NotATemplate { .. } => ServiceError::invalid(text),
            StorageError::SmallerThanTemplate { .. } | StorageError::CannotGrow { .. } => {
                ServiceError::invalid_field("disk_size_gib", text)
            }
            StorageError::NotMounted(_) => ServiceError::NotReady(text),
            _ => ServiceError::Internal(text),
        }
    }
}

impl From<StateError> for ServiceError {
    fn from(error: StateError) -> Self {
        let text = error.to_string();
        match error.root() {
            StateError::Full(_) => ServiceError::StateFull(text),
            StateError::ReadOnly(_) => ServiceError::NotReady(text),
            _ => ServiceError::Internal(text),
        }
    }
}

impl From<scalebox_net::Error> for ServiceError {
    fn from(error: scalebox_net::Error) -> Self {
        match error {
            // SUBNET was changed, and the VM still has an address of the old one.
            scalebox_net::Error::NotAGuestAddress { .. } => ServiceError::WrongState(error.to_string()),
            _ => ServiceError::Internal(error.to_string()),
        }
    }
}

impl From<scalebox_vmm::Error> for ServiceError {
    fn from(error: scalebox_vmm::Error) -> Self {
        ServiceError::Internal(error.to_string())
    }
}
