//! Errors as responses.

use crate::server::http::Response;
use hyper::StatusCode;
use rustix::io::Errno;
use scalebox_agent_api::{AgentFailure, FailureCode};
use std::io;

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure(pub(crate) AgentFailure);

impl Failure {
    /// Creates a failure from what failed and why, in one sentence.
    pub(crate) fn new(code: FailureCode, error: impl Into<String>) -> Failure {
        Failure(AgentFailure {
            error: error.into(),
            code,
        })
    }

    /// Returns a function that converts the error of an operation: "cannot {action}: …".
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Failure {
        let action = action.into();
        move |error| Failure::new(code(&error), format!("cannot {action}: {error}"))
    }

    /// Returns the response.
    pub(crate) fn response(&self) -> Response {
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = crate::server::json(&self.0);
        *response.status_mut() = status;
        response
    }
}

fn code(error: &io::Error) -> FailureCode {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) => FailureCode::NotFound,
        Some(Errno::EXIST | Errno::NOTEMPTY) => FailureCode::Exists,
        Some(Errno::NOTDIR | Errno::ISDIR | Errno::LOOP | Errno::NOTBLK | Errno::NXIO) => FailureCode::WrongKind,
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY) => FailureCode::Denied,
        Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => FailureCode::NoSpace,
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN | Errno::BUSY) => FailureCode::Busy,
        Some(Errno::INVAL | Errno::NAMETOOLONG | Errno::TOOBIG | Errno::NOEXEC) => FailureCode::Invalid,
        Some(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => FailureCode::Unsupported,
        _ => FailureCode::Other,
    }
}
