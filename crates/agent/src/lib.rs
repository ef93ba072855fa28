//! `scalebox-agent`: the program of Scalebox in each guest.
//!
//! It serves the protocol of [`scalebox_agent_api`] on the machine's agent port: commands, files
//! and the state of the guest. It comes with the initramfs and is never on the guest's disk.
//!
//! # Layout
//!
//! | folder | content |
//! |---|---|
//! | `server` | the connection: hello, HTTP/2, routes, errors |
//! | `exec` | commands: start, output, signals, terminals |
//! | `files` | files and directories |
//! | `system` | statistics, flush, freeze, trim, growth, clock, shutdown |
//! | `transport` | the serial port and the vsock |
//! | `serve` | the process that serves the host |
//! | `init` | from the start of the kernel to the root file system; process 1 without an init |
//!
//! `accounts` finds the guest's users and groups, `blocking` has the threads for operations that
//! block, and `run_dir` the files by which process 1 and the agent know about the main process.
//!
//! The agent runs on one thread, plus short-lived threads for operations that block. The host is
//! trusted: it owns the guest. Programs in the guest cannot reach the agent's port, because only
//! root may open it.

mod accounts;
mod blocking;
mod exec;
mod files;
mod init;
mod run_dir;
mod serve;
mod server;
mod system;
mod transport;

pub use init::run as init;
pub use serve::{ServeOptions, run};
pub use server::{Agent, serve};
