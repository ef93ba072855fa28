//! A blocking client of the Scalebox API. Requests and responses are types of `scalebox-api`.
//!
//! # Layout
//!
//! - `http`: [`Client`], which sends requests to a daemon
//! - `event_stream`: reads the stream of events
//! - `error`: [`ClientError`], the error of a call

#![warn(missing_docs)]

mod error;
mod event_stream;
mod http;

pub use error::ClientError;
pub use event_stream::EventStream;
pub use http::{Client, Export};
