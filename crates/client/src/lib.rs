//! A blocking client of the Scalebox API. Requests and responses are types of `scalebox-api`.
//!
//! # Layout
//!
//! - `http`: [`Client`], which sends requests to a daemon
//! - `execs`: starts, lists and controls commands in VMs
//! - `output_stream`: reads the output of a command
//! - `attachment`: [`Attachment`], a connection to the input and output of a running command
//! - `transport`: opens the connection of an attachment
//! - `files`: reads and writes files in VMs
//! - `event_stream`: reads the stream of events
//! - `error`: [`ClientError`], the error of a call

#![warn(missing_docs)]

mod attachment;
mod error;
mod event_stream;
mod execs;
mod files;
mod http;
mod output_stream;
mod transport;

pub use attachment::{AttachSender, Attachment, Detached};
pub use error::ClientError;
pub use event_stream::EventStream;
pub use files::{Download, Upload};
pub use http::{Client, Export};
pub use output_stream::OutputStream;
