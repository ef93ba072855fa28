//! The Scalebox API as types: requests, responses, events and errors.
//!
//! The daemon, its clients and the tests share these types, so that they cannot disagree about a
//! field. Requests are parsed strictly: if a misspelt `disk_size_gb` were ignored, the VM would
//! have the wrong disk. Responses are parsed leniently, because a newer daemon may send fields that
//! an older client does not know.
//!
//! # Layout
//!
//! | file | contents |
//! |---|---|
//! | `vms` | VMs, and the requests that create and change them |
//! | `exec` | commands that run in a VM |
//! | `command` | arguments and environment of commands |
//! | `main_process` | the main process of a VM |
//! | `output` | the output of an exec, as lines of NDJSON |
//! | `attach` | the messages of an attached terminal |
//! | `signal` | signals by name and number |
//! | `files` | files in a VM |
//! | `stats` | load and memory of a VM |
//! | `templates` | templates and snapshots |
//! | `jobs` | jobs, and the request that pulls a template |
//! | `pool` | the pool, its size, and the usage of disks |
//! | `host` | the host's hardware, limits and counts |
//! | `events` | the events of `GET /events` |
//! | `error` | the body of error responses, and the error codes |
//! | `idempotency` | idempotency keys |
//! | `limits` | the limits of a host that requests are checked against |
//! | `body` | parses a JSON object field by field; [`Invalid`] is the error of an invalid request |
//! | `suggestion` | guesses which field a client meant |

#![warn(missing_docs)]

pub mod attach;
mod body;
mod command;
mod error;
mod events;
mod exec;
pub mod files;
mod host;
mod idempotency;
mod jobs;
mod limits;
mod main_process;
mod output;
mod pool;
mod signal;
mod stats;
mod suggestion;
mod templates;
mod vms;

pub use attach::AttachMessage;
pub use body::Invalid;
pub use error::{ErrorBody, ErrorCode};
pub use events::{Event, EventKind, EventVm};
pub use exec::{
    CreateExec, Encoding, Exec, ExecEnd, ExecList, ExecResult, ExecStatus, SignalExec, StartedExec, Tty, WindowSize,
};
pub use files::{FileEntry, FileKind, FileList, FileMode, FileOwner, GuestPath, MakeDirectory, RenameFile};
pub use host::{Cpu, Health, HostInfo, HostLimits, Memory, VmCounts};
pub use idempotency::IdempotencyKey;
pub use jobs::{Job, JobList, PullTemplate};
pub use limits::Limits;
pub use main_process::{CreateMain, MainProcess, RestartPolicy};
pub use output::OutputLine;
pub use pool::{PoolInfo, ResizePool, StorageUsage, Trimmed};
pub use scalebox_units::{
    ExecId, ImageConfig, ImageReference, Init, InvalidFormat, SshPublicKey, TemplateName, VmId, VmName,
};
pub use signal::Signal;
pub use stats::{AgentInfo, VmStats};
pub use templates::{Snapshot, SnapshotVm, Template, TemplateList};
pub use vms::{AutoExtend, CreateVm, CreateVmQuery, Disk, UpdateVm, Vm, VmList, VmSource, VmStatus, WaitFor};
