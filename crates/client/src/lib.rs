//! The Scalebox API as types: what a request may hold, what an answer holds, and (feature `http`) a
//! blocking client.
//!
//! The daemon, the command line and the tests share these, so that no two of them can disagree
//! about a field. Requests are strict, because a misspelt `disk_size_gb` that is quietly ignored is
//! a VM with the wrong disk; answers are read leniently, because a newer daemon may say more than
//! an older client knows.
//!
//! # Layout
//!
//! - `types`: every answer of the API
//! - `requests`: every request, and reading one from the bytes that a client sent
//! - `body`: reading a JSON object field by field, and [`Invalid`], what is wrong with one
//! - `idempotency`: the form of an idempotency key
//! - `error_code`: what a refused or failed request is answered
//! - `event`: what `GET /events` tells
//! - `event_stream` (feature `http`): reading it as it happens
//! - `http` (feature `http`): [`Client`], which speaks all of this to a daemon

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
