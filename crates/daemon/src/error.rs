//! What the service answers when it cannot do what was asked, and the HTTP status that says so.

use crate::state::StateError;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use scalebox_client::{ErrorBody, Invalid};
use scalebox_storage::StorageError;

/// A refusal or a failure. What a client sent never ends in [`ServiceError::Internal`].
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// 400: the request is not one that can be carried out.
    #[error("{0}")]
    Invalid(String),
    /// 401: no token, or not the right one. No hint which.
    #[error("a valid token is required in the header Authorization: Bearer TOKEN")]
    Unauthorized,
    /// 403: not allowed to anyone.
    #[error("{0}")]
    Forbidden(String),
    /// 404.
    #[error("{0}")]
    NotFound(String),
    /// 405.
    #[error("{0}")]
    MethodNotAllowed(String),
    /// 408: the client did not finish its request in time.
    #[error("{0}")]
    Timeout(String),
    /// 409: it does not go with what is there, or with what is under way.
    #[error("{0}")]
    Conflict(String),
    /// 413.
    #[error("{0}")]
    TooLarge(String),
    /// 422: understood, and not to be done.
    #[error("{0}")]
    Unprocessable(String),
    /// 503: the host is not ready for it; its operator can change that.
    #[error("{0}")]
    Unavailable(String),
    /// 507: it does not fit, and nothing was made.
    #[error("{0}")]
    Insufficient(String),
    /// 500: something on the host failed. The whole chain is in the log; clients get the sentence.
    #[error("{0}")]
    Internal(String),
}

impl ServiceError {
    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            ServiceError::Invalid(_) => StatusCode::BAD_REQUEST,
            ServiceError::Unauthorized => StatusCode::UNAUTHORIZED,
            ServiceError::Forbidden(_) => StatusCode::FORBIDDEN,
            ServiceError::NotFound(_) => StatusCode::NOT_FOUND,
            ServiceError::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            ServiceError::Timeout(_) => StatusCode::REQUEST_TIMEOUT,
            ServiceError::Conflict(_) => StatusCode::CONFLICT,
            ServiceError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            ServiceError::Unprocessable(_) => StatusCode::UNPROCESSABLE_ENTITY,
            ServiceError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            ServiceError::Insufficient(_) => StatusCode::INSUFFICIENT_STORAGE,
            ServiceError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for ServiceError {
    fn into_response(self) -> Response {
        let status = self.status();
        match self {
            ServiceError::Internal(_) => tracing::error!(status = status.as_u16(), error = %self, "request failed"),
            // Logged with its peer, and not each time (see `logins`).
            ServiceError::Unauthorized => {}
            _ => tracing::info!(status = status.as_u16(), error = %self, "request refused"),
        }
        (
            status,
            Json(ErrorBody {
                error: self.to_string(),
            }),
        )
            .into_response()
    }
}

impl From<Invalid> for ServiceError {
    fn from(error: Invalid) -> Self {
        ServiceError::Invalid(error.to_string())
    }
}

impl From<StorageError> for ServiceError {
    fn from(error: StorageError) -> Self {
        let text = error.to_string();
        match error {
            StorageError::Insufficient { .. } => ServiceError::Insufficient(text),
            StorageError::NoTemplate(_) => ServiceError::NotFound(text),
            StorageError::TemplateExists(_)
            | StorageError::TemplateBeingMade(_)
            | StorageError::Unfit(_)
            | StorageError::FileSystem(_) => ServiceError::Conflict(text),
            StorageError::PoolSize(_) | StorageError::Given(_) => ServiceError::Invalid(text),
            StorageError::Busy(_) => ServiceError::Conflict(text),
            StorageError::NotMounted(_) => ServiceError::Unavailable(text),
            StorageError::SmallerThanTemplate { .. } | StorageError::NotATemplate { .. } | StorageError::Name(_) => {
                ServiceError::Invalid(text)
            }
            _ => ServiceError::Internal(text),
        }
    }
}

impl From<StateError> for ServiceError {
    fn from(error: StateError) -> Self {
        ServiceError::Internal(error.to_string())
    }
}

impl From<scalebox_net::Error> for ServiceError {
    fn from(error: scalebox_net::Error) -> Self {
        match error {
            // SUBNET was changed under a VM that has its address from before.
            scalebox_net::Error::NotAGuestAddress { .. } => ServiceError::Conflict(error.to_string()),
            _ => ServiceError::Internal(error.to_string()),
        }
    }
}

impl From<scalebox_vmm::Error> for ServiceError {
    fn from(error: scalebox_vmm::Error) -> Self {
        ServiceError::Internal(error.to_string())
    }
}
