//! The errors of the agent.

use serde::{Deserialize, Serialize};

/// An error of the agent: the body of a response with a status of 400 to 599.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentFailure {
    /// The failed operation and the cause, in one sentence.
    pub error: String,
    /// The kind of the error.
    pub code: FailureCode,
}

/// The kind of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureCode {
    /// The request is malformed or out of bounds, or a file is not a program (`EINVAL`, `E2BIG`,
    /// `ENAMETOOLONG`, `ENOEXEC`).
    Invalid,
    /// The exec, the file, the program, the user or the directory does not exist (`ENOENT`).
    NotFound,
    /// The exec or the file exists (`EEXIST`, `ENOTEMPTY`).
    Exists,
    /// A path component is not a directory, or a file is a directory (`ENOTDIR`, `EISDIR`,
    /// `ELOOP`).
    WrongKind,
    /// The operation is not permitted (`EACCES`, `EPERM`, `EROFS`).
    Denied,
    /// The file system is full, or a quota is used up (`ENOSPC`, `EDQUOT`).
    NoSpace,
    /// The exec has ended, or has no stdin or terminal.
    Ended,
    /// A limit of the agent is reached: retry later (`EMFILE`, `ENOMEM`, `EAGAIN`).
    Busy,
    /// A timeout of the agent has expired.
    Timeout,
    /// The guest's kernel does not support the operation (`EOPNOTSUPP`, `ENOTTY`, `ENOSYS`,
    /// `EXDEV`).
    Unsupported,
    /// Any other error.
    #[serde(other)]
    Other,
}

impl FailureCode {
    /// Returns the HTTP status of a response with this code.
    pub fn status(self) -> u16 {
        match self {
            FailureCode::Invalid => 400,
            FailureCode::NotFound => 404,
            FailureCode::Denied => 403,
            FailureCode::Exists | FailureCode::WrongKind | FailureCode::Ended => 409,
            FailureCode::Busy => 429,
            FailureCode::Unsupported => 501,
            FailureCode::Timeout => 504,
            FailureCode::NoSpace => 507,
            FailureCode::Other => 500,
        }
    }
}
