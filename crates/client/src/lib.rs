//! The Scalebox API as types: requests, responses and (feature `http`) a blocking client.
//!
//! The daemon, the command line and the tests share these types, so that they cannot disagree about
//! a field. Requests are parsed strictly: if a misspelt `disk_size_gb` were ignored, the VM would
//! have the wrong disk. Responses are parsed leniently, because a newer daemon may send fields that
//! an older client does not know.
//!
//! # Layout
//!
//! - `types`: every response of the API
//! - `requests`: every request with a body, and its parser
//! - `body`: parses a JSON object field by field; [`Invalid`] is the error of an invalid request
//! - `idempotency`: idempotency keys
//! - `error_code`: the body of error responses, and the error codes
//! - `event`: the events of `GET /events`
//! - `event_stream` (feature `http`): reads the stream of events
//! - `http` (feature `http`): [`Client`], which sends requests to a daemon

#![warn(missing_docs)]

mod body;
mod error_code;
mod event;
#[cfg(feature = "http")]
mod event_stream;
#[cfg(feature = "http")]
mod http;
mod idempotency;
mod requests;
mod types;

pub use body::Invalid;
pub use error_code::{ErrorBody, ErrorCode};
pub use event::{Event, EventKind, EventVm};
#[cfg(feature = "http")]
pub use event_stream::EventStream;
#[cfg(feature = "http")]
pub use http::{Client, ClientError, Export};
pub use idempotency::IdempotencyKey;
pub use requests::{CreateVm, Limits, ResizePool, SnapshotVm, UpdateVm};
pub use scalebox_units::{InvalidFormat, SshPublicKey, TemplateName, VmId, VmName};
pub use types::{
    AutoExtend, Cpu, Disk, Health, HostInfo, HostLimits, Memory, PoolInfo, Snapshot, StorageUsage, Template,
    TemplateList, Trimmed, Vm, VmCounts, VmList, VmStatus,
};
