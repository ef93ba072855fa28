//! The Scalebox API as types: requests, responses, events and errors.
//!
//! The daemon, its clients and the tests share these types, so that they cannot disagree about a
//! field. Requests are parsed strictly: if a misspelt `disk_size_gb` were ignored, the VM would
//! have the wrong disk. Responses are parsed leniently, because a newer daemon may send fields that
//! an older client does not know.
//!
//! # Layout
//!
//! - `types`: every response of the API
//! - `requests`: every request with a body, and its parser
//! - `body`: parses a JSON object field by field; [`Invalid`] is the error of an invalid request
//! - `idempotency`: idempotency keys
//! - `error`: the body of error responses, and the error codes
//! - `events`: the events of `GET /events`

#![warn(missing_docs)]

mod body;
mod error;
mod events;
mod idempotency;
mod requests;
mod types;

pub use body::Invalid;
pub use error::{ErrorBody, ErrorCode};
pub use events::{Event, EventKind, EventVm};
pub use idempotency::IdempotencyKey;
pub use requests::{CreateVm, Limits, ResizePool, SnapshotVm, UpdateVm};
pub use scalebox_units::{InvalidFormat, SshPublicKey, TemplateName, VmName, is_vm_id};
pub use types::{
    AutoExtend, Cpu, Disk, Health, HostInfo, HostLimits, Memory, PoolInfo, Snapshot, StorageUsage, Template,
    TemplateList, Trimmed, Vm, VmCounts, VmList, VmStatus,
};
