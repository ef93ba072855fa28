//! Errors as codes.

use rustix::io::Errno;
use scalebox_agent_api::{AgentFailure, FailureCode};
use std::io;

/// The reason why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure(pub(crate) AgentFailure);

impl Failure {
    /// Creates a failure. The sentence states the operation and the cause.
    pub(crate) fn new(code: FailureCode, error: impl Into<String>) -> Failure {
        Failure(AgentFailure {
            error: error.into(),
            code,
        })
    }

    /// Returns a function that converts the error of an operation: "cannot {action}: …".
    pub(crate) fn io<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Failure {
        let action = action.into();
        move |error| {
            let error = error.into();
            Failure::new(code(&error), format!("cannot {action}: {error}"))
        }
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
        Some(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::XDEV) => FailureCode::Unsupported,
        _ => FailureCode::Other,
    }
}
