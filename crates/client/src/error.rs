//! The error of a call to the API.

use scalebox_api::{ErrorBody, ErrorCode};

/// The error of a call to the API.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server's address is invalid.
    #[error("{url:?} is not the address of a server: {why}; write it as http://HOST:PORT or https://HOST")]
    Url {
        /// The address as it was given.
        url: String,
        /// The reason.
        why: &'static str,
    },
    /// The token cannot be sent in a header. The message does not show it.
    #[error("the token must be printable ASCII without spaces, and not empty")]
    Token,
    /// No connection could be opened: the daemon has not received the request.
    #[error("cannot reach scaleboxd at {url}: {why}; {hint}")]
    Unreachable {
        /// The daemon's address.
        url: String,
        /// The system's error.
        why: String,
        /// The remedy.
        hint: &'static str,
    },
    /// The connection ended without a complete response: the daemon may or may not have completed
    /// the request.
    #[error("no response from {call}: {why}; {hint}")]
    Lost {
        /// Method and address.
        call: String,
        /// The reason.
        why: String,
        /// The remedy.
        hint: &'static str,
    },
    /// The daemon returned an error.
    #[error("{message}")]
    Refused {
        /// The HTTP status, 400 or above.
        status: u16,
        /// The daemon's message, with a hint if the address may be wrong.
        message: String,
        /// The response, with its code.
        body: Box<ErrorBody>,
    },
    /// The response is not from scaleboxd, or from a version that this client does not support.
    #[error("{call} returned {why}; is this the address of scaleboxd?")]
    Protocol {
        /// Method and address.
        call: String,
        /// The problem with the response.
        why: String,
    },
}

impl ClientError {
    /// Returns the HTTP status, if the daemon returned an error.
    pub fn status(&self) -> Option<u16> {
        match self {
            ClientError::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Returns the error code, if the daemon returned an error.
    pub fn code(&self) -> Option<&ErrorCode> {
        match self {
            ClientError::Refused { body, .. } => Some(&body.code),
            _ => None,
        }
    }

    /// Returns the id of the job that still pulls the image of a VM, if `POST /vms` did not wait
    /// for its end. No VM was created.
    pub fn pending_pull(&self) -> Option<&str> {
        match self {
            ClientError::Refused { body, .. } if body.code == ErrorCode::Timeout => body.details.get("job")?.as_str(),
            _ => None,
        }
    }
}
