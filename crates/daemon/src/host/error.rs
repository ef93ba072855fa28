//! The errors of operations. [`http::error`](crate::http::error) gives each a status.

use crate::host::advice::advised;
use crate::state::StateError;
use scalebox_agent_api::FailureCode;
use scalebox_api::Invalid;
use scalebox_guest::AgentError;
use scalebox_images::oci::OciError;
use scalebox_programs::ProgramError;
use scalebox_storage::StorageError;
use scalebox_units::Gib;
use serde_json::Value;

/// A rejected or failed request. Input from a client never causes [`ServiceError::Internal`].
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum ServiceError {
    /// The request is malformed, or a value in it is out of bounds.
    #[error("{message}")]
    Invalid {
        /// The problem, as a sentence.
        message: String,
        /// The field with the wrong value.
        field: Option<String>,
    },
    /// The token is missing or wrong. The message does not distinguish the two.
    #[error("a valid token is required in the header Authorization: Bearer TOKEN")]
    Unauthorized,
    /// Forbidden for all clients.
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
    /// The agent in a guest cannot be reached, or violates its protocol.
    #[error("{0}")]
    Unreachable(String),
    /// The guest did not complete an operation in time.
    #[error("{message}")]
    GuestTimeout {
        /// The operation that did not finish, and the time limit, as a sentence.
        message: String,
        /// The names in `message`, as a JSON object for programs.
        details: Value,
    },
    /// A registry did not respond in time, or a pull takes longer than the client waits.
    #[error("{message}")]
    PullTimeout {
        /// The operation that did not finish, and the time limit, as a sentence.
        message: String,
        /// The names in `message`, as a JSON object for programs.
        details: Value,
    },
    /// The disk of a guest is full.
    #[error("{0}")]
    GuestFull(String),
    /// Something on the host failed.
    #[error("{0}")]
    Internal(String),
    /// A program or hypervisor on the host failed. Clients receive the sentence; the cause is for
    /// the log, because it may be a program's output with paths of the host.
    #[error("{sentence}: {cause}")]
    HostFailed {
        /// The operation that failed, as a sentence.
        sentence: String,
        /// The report of the program or hypervisor.
        cause: String,
    },
}

impl ServiceError {
    /// Returns the error of a malformed request, with no single field to blame.
    pub(crate) fn invalid(message: impl Into<String>) -> ServiceError {
        ServiceError::Invalid {
            message: message.into(),
            field: None,
        }
    }

    /// Returns the error of a field with an invalid value.
    pub(crate) fn invalid_field(field: &str, message: impl Into<String>) -> ServiceError {
        ServiceError::Invalid {
            message: message.into(),
            field: Some(field.to_owned()),
        }
    }

    /// Returns the error as a sentence for clients. The cause of a failure of the host is only
    /// logged.
    pub(crate) fn sentence(&self) -> String {
        match self {
            ServiceError::HostFailed { sentence, .. } => sentence.clone(),
            other => other.to_string(),
        }
    }

    /// Returns the error of a request to the agent of the VM `name`.
    pub(crate) fn of_agent(name: &str, error: &AgentError) -> ServiceError {
        let message = format!("VM {name}: {error}");
        let AgentError::Refused(failure) = error else {
            return ServiceError::Unreachable(message);
        };
        match failure.code {
            FailureCode::Invalid => ServiceError::invalid(message),
            FailureCode::NotFound => ServiceError::NotFound(message),
            FailureCode::Denied => ServiceError::Forbidden(message),
            FailureCode::NoSpace => ServiceError::GuestFull(message),
            FailureCode::Busy => ServiceError::Busy(message),
            FailureCode::Timeout => ServiceError::GuestTimeout {
                message,
                details: Value::Null,
            },
            _ => ServiceError::WrongState(message),
        }
    }

    /// Returns whether an admission was refused for lack of space.
    pub(crate) fn is_insufficient(&self) -> bool {
        matches!(self, ServiceError::Insufficient { .. })
    }
}

/// Quotes text from a client for a response or the log: escaped and cut to the length of a line.
pub(crate) fn quoted(text: &str) -> String {
    const MAX_CHARS: usize = 80;
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
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
        let text = advised(&error);
        match error {
            StorageError::Insufficient { available, need } => ServiceError::Insufficient { available, need },
            StorageError::NoTemplate(_) => ServiceError::NotFound(text),
            StorageError::TemplateExists(_) => ServiceError::NameTaken(text),
            StorageError::TemplateBeingMade(_) | StorageError::Busy(_) => ServiceError::Busy(text),
            StorageError::UnfitDisk(_)
            | StorageError::FileSystem(_)
            | StorageError::DamagedTemplate { .. }
            | StorageError::DamagedRecord { .. } => ServiceError::WrongState(text),
            StorageError::PoolSize(_) => ServiceError::invalid_field("size_gib", text),
            StorageError::ExistingFileSystem(_) | StorageError::NotATemplate { .. } => ServiceError::invalid(text),
            StorageError::SmallerThanTemplate { .. } | StorageError::CannotGrow { .. } => {
                ServiceError::invalid_field("disk_size_gib", text)
            }
            StorageError::NotMounted(_) => ServiceError::NotReady(text),
            StorageError::Host { doing, reason } => ServiceError::HostFailed {
                sentence: format!("the host cannot {doing}"),
                cause: reason,
            },
            StorageError::Program(ProgramError::Failed { command, .. } | ProgramError::Killed { command, .. }) => {
                ServiceError::HostFailed {
                    sentence: format!("the program {} failed", command.split(' ').next().unwrap_or_default()),
                    cause: text,
                }
            }
            _ => ServiceError::Internal(text),
        }
    }
}

impl From<OciError> for ServiceError {
    fn from(error: OciError) -> Self {
        let text = advised(&error);
        match error {
            OciError::Reference { .. } => ServiceError::invalid_field("reference", text),
            OciError::Unauthorized { .. } => ServiceError::Forbidden(text),
            OciError::NotFound { .. } => ServiceError::NotFound(text),
            OciError::Stalled { .. } | OciError::Deadline { .. } => ServiceError::PullTimeout {
                message: text,
                details: Value::Null,
            },
            OciError::Unreachable { .. } | OciError::Status { .. } => ServiceError::NotReady(text),
            OciError::Refused(reason) => match reason.downcast::<StorageError>() {
                Ok(refused) => (*refused).into(),
                Err(reason) => ServiceError::Internal(reason.to_string()),
            },
            OciError::Program(ProgramError::Failed { command, .. } | ProgramError::Killed { command, .. }) => {
                ServiceError::HostFailed {
                    sentence: format!("the program {} failed", command.split(' ').next().unwrap_or_default()),
                    cause: text,
                }
            }
            OciError::Program(_) => ServiceError::NotReady(text),
            OciError::Cancelled => ServiceError::WrongState(text),
            OciError::FileSystem(cause) => ServiceError::HostFailed {
                sentence: "the host cannot write the file system of the image".to_owned(),
                cause,
            },
            OciError::Io { .. } => ServiceError::Internal(text),
            _ => ServiceError::invalid(text),
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
        let text = advised(&error);
        match error {
            // SUBNET was changed, and the VM still has an address of the old one.
            scalebox_net::Error::NotAGuestAddress { .. } => ServiceError::WrongState(text),
            scalebox_net::Error::NoFreeAddress(_) | scalebox_net::Error::NoFreePort { .. } => {
                ServiceError::NotReady(text)
            }
            scalebox_net::Error::Nft { .. } => ServiceError::HostFailed {
                sentence: "the host's firewall rules cannot be changed".to_owned(),
                cause: text,
            },
            _ => ServiceError::Internal(text),
        }
    }
}

impl From<scalebox_vmm::Error> for ServiceError {
    fn from(error: scalebox_vmm::Error) -> Self {
        match error {
            scalebox_vmm::Error::Launch { id, why, output } => ServiceError::HostFailed {
                sentence: format!("the machine of {id} cannot be launched"),
                cause: if output.is_empty() {
                    why
                } else {
                    format!("{why}: {output}")
                },
            },
            other => ServiceError::Internal(advised(&other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_s_output_is_the_cause_and_not_the_sentence() {
        let output = "/dev/loop7: Input/output error".to_owned();
        let command = "e2fsck -fy /var/lib/scalebox/vms/x".to_owned();
        let status = "exit status 8".to_owned();
        let failures: [ServiceError; 3] = [
            StorageError::from(ProgramError::Failed {
                command,
                status: status.clone(),
                output: output.clone(),
            })
            .into(),
            StorageError::Host {
                doing: "check a file system",
                reason: output.clone(),
            }
            .into(),
            scalebox_vmm::Error::Launch {
                id: "vm-0123456789ab".parse().unwrap(),
                why: status,
                output: output.clone(),
            }
            .into(),
        ];
        for failure in failures {
            let ServiceError::HostFailed { sentence, cause } = failure else {
                panic!("{failure}")
            };
            assert!(cause.contains(&output), "{cause}");
            assert!(!sentence.contains('/') && !sentence.contains("error"), "{sentence}");
        }
    }
}
