//! A client for our own agent in a guest: commands, files, statistics.
//!
//! [`AgentConnection::open`] starts a connection on a stream to the agent's port; clones of it
//! share the connection. The protocol is described in [`scalebox_agent_api`].
//!
//! The agent runs in the guest and is not trusted. Everything that it sends is bounded: the bytes
//! before its [`hello`], the size of headers and of JSON, unread data, and all other bytes. Every
//! wait has a timeout, except for the output of a command, which may be silent for days; pings then
//! detect an agent that has ended.
//!
//! | file | content |
//! |---|---|
//! | `hello` | finds where the agent's bytes begin |
//! | `budget` | a stream that fails if the agent sends more than was requested |
//! | `connection` | HTTP/2: one connection, requests, streams of bytes |
//! | `calls` | the typed requests |
//! | `output` | the output of a command, as frames |
//! | `error` | the errors |

mod budget;
mod calls;
mod connection;
mod error;
mod hello;
mod output;

pub use calls::{FileHead, PutFile};
pub use connection::{AgentConnection, Download, Upload};
pub use error::AgentError;
pub use output::Output;
