//! The reason why a request to the agent failed.

use scalebox_agent_api::AgentFailure;
use std::error::Error;
use std::io;
use std::time::Duration;

/// The reason why a request to the agent failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    /// There is no connection, or the connection has ended: the guest or the agent is restarting or
    /// has ended.
    #[error("its agent cannot be reached: {why}")]
    Unreachable {
        /// The error of the connection.
        why: String,
    },
    /// No response: the guest is booting, hangs, or has no agent.
    #[error("its agent does not respond within {} s", after.as_secs())]
    Timeout {
        /// The timeout.
        after: Duration,
    },
    /// The agent responded with an error.
    #[error("{}", .0.error)]
    Refused(AgentFailure),
    /// The bytes from the guest are not the protocol's, or exceed a limit of the host.
    #[error("its agent sends invalid data: {why}")]
    Malformed {
        /// The problem.
        why: String,
    },
}

impl AgentError {
    pub(crate) fn unreachable(why: impl ToString) -> AgentError {
        AgentError::Unreachable { why: why.to_string() }
    }

    pub(crate) fn malformed(why: impl ToString) -> AgentError {
        AgentError::Malformed { why: why.to_string() }
    }

    /// Returns whether the agent has the operation but rejected this request. The connection is
    /// fine then.
    pub fn is_refusal(&self) -> bool {
        matches!(self, AgentError::Refused(_))
    }

    /// Converts an error of the HTTP/2 connection. `ping` is the time after which the connection to
    /// an agent that does not respond to pings is closed.
    pub(crate) fn http(error: &hyper::Error, ping: Duration) -> AgentError {
        if error.is_timeout() {
            return AgentError::Timeout { after: ping };
        }
        let cause = find::<h2::Error>(error);
        if let Some(io) = cause.and_then(h2::Error::get_io).or_else(|| find::<io::Error>(error)) {
            return AgentError::stream(io);
        }
        match cause {
            Some(cause) if cause.is_reset() && cause.is_remote() => {
                AgentError::unreachable("the agent interrupted the stream")
            }
            Some(cause) if cause.is_go_away() && cause.is_remote() => {
                AgentError::unreachable("the agent closed the connection")
            }
            Some(cause) => AgentError::malformed(cause),
            None if error.is_canceled() || error.is_closed() => AgentError::unreachable("the connection was closed"),
            None => AgentError::unreachable(root(error)),
        }
    }

    /// Converts an error of the stream below the connection.
    pub(crate) fn stream(error: &io::Error) -> AgentError {
        match error.kind() {
            io::ErrorKind::InvalidData => AgentError::malformed(error),
            // The streams of a connection that has ended, for example because of a missing ping.
            io::ErrorKind::BrokenPipe => AgentError::unreachable("the connection was lost"),
            _ => AgentError::unreachable(error),
        }
    }
}

fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        current = error.source();
    }
    None
}

fn root(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
