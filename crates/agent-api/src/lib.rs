//! The protocol between the host and `scalebox-agent`, the program of Scalebox in each guest.
//!
//! # Transport
//!
//! The agent is an HTTP/2 server (prior knowledge, no TLS) on a byte stream. Under QEMU the stream
//! is the virtio-serial port [`PORT_NAME`], which carries one connection at a time; under
//! Firecracker it is a connection to the vsock port [`VSOCK_PORT`].
//!
//! A serial port does not mark where a connection begins, and may hold bytes of an earlier one. So
//! each connection starts with a [`hello`]: the host sends it, and repeats it until the agent
//! responds with the same nonce. Bytes before the response belong to an earlier connection.
//!
//! # Requests
//!
//! Bodies are JSON unless stated otherwise. A path in the guest is the query parameter `path`,
//! percent-encoded, so that it may be any bytes.
//!
//! | request | body → response |
//! |---|---|
//! | `GET /v1/info` | → [`Info`] |
//! | `POST /v1/execs?follow=BOOL` | [`StartExec`] → [`ExecStatus`], or [frames](frame) from the start on |
//! | `GET /v1/execs` | → list of [`ExecStatus`] |
//! | `GET /v1/execs/{id}` | → [`ExecStatus`] |
//! | `GET /v1/execs/{id}/output?since=OFFSET&follow=BOOL` | → [frames](frame) |
//! | `POST /v1/execs/{id}/stdin?close=BOOL` | bytes → nothing |
//! | `POST /v1/execs/{id}/signal` | [`Signal`] → nothing |
//! | `POST /v1/execs/{id}/resize` | [`WindowSize`] → nothing |
//! | `GET /v1/files?path=` | → bytes, with the headers of [`headers`] |
//! | `PUT /v1/files?path=&mode=&user=&parents=` | bytes → [`FileInfo`] |
//! | `DELETE /v1/files?path=&recursive=` | → nothing |
//! | `GET /v1/files/info?path=` | → [`FileInfo`] |
//! | `GET /v1/files/list?path=` | → [`Listing`] |
//! | `GET /v1/files/tar?path=` | → a tar archive |
//! | `PUT /v1/files/tar?path=&user=&parents=` | a tar archive → nothing |
//! | `POST /v1/files/mkdir?path=&mode=&user=&parents=` | → [`FileInfo`] |
//! | `POST /v1/files/rename?path=&to=` | → [`FileInfo`] |
//! | `GET /v1/stats` | → [`Stats`] |
//! | `POST /v1/sync`, `/v1/freeze`, `/v1/thaw` | → nothing |
//! | `POST /v1/trim` | → [`Trimmed`] |
//! | `POST /v1/grow` | → [`RootSize`] |
//! | `POST /v1/clock` | [`Clock`] → nothing |
//! | `POST /v1/shutdown` | [`Shutdown`] → nothing |
//!
//! An error has a status of 400 to 599 and the body [`AgentFailure`].
//!
//! The host does not trust the agent: anyone who controls the guest can respond in its place.

pub mod exec;
pub mod failure;
pub mod files;
pub mod frame;
pub mod hello;
pub mod main_process;
pub mod system;

pub use exec::{ExecEnd, ExecStatus, Restarts, Signal, StartExec, Terminal, WindowSize};
pub use failure::{AgentFailure, FailureCode};
pub use files::{FileInfo, FileKind, Listing, headers};
pub use main_process::{MainProcess, RestartPolicy};
pub use system::{Clock, Info, InitKind, RootSize, Shutdown, Stats, Trimmed};

/// The virtio-serial port of the agent, as in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "scalebox.agent.0";

/// The vsock port on which the agent listens.
pub const VSOCK_PORT: u32 = 1025;

/// The version of the protocol, in the [`hello`]. Host and agent come from the same release, except
/// for guests that booted before an upgrade of the host.
pub const PROTOCOL: u32 = 1;
