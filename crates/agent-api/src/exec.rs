//! Running commands.
//!
//! # The end of an exec
//!
//! An exec ends when its main process has ended and its output was read: at the end of the pipes,
//! or 200 ms later if processes that it left behind hold them open. Later output of those processes
//! is dropped, and they live on. With a terminal, they receive `SIGHUP`. Signals and the timeout
//! reach the process group of the main process, but not processes that have left it, as daemons do.
//!
//! # Output buffers
//!
//! The guest keeps the newest output of an exec, also after its end. While a `follow`ing request
//! exists, unread output is not dropped: the command waits for the slowest reader, for at most 10
//! s.
//!
//! All buffers of a guest share [`TOTAL_BUFFER`], so that the agent's memory stays small. When they
//! exceed it, the largest are cut to the same size, at least [`MIN_BUFFER`] each, oldest output
//! first. Unread output is never cut; the command waits instead. More than `TOTAL_BUFFER /
//! MIN_BUFFER` = 85 full buffers take more than the total, at most (`MAX_RUNNING + MAX_ENDED`) ×
//! `MIN_BUFFER` = 30 MiB. A buffer's size is the memory that it takes, which includes 64 bytes for
//! each change between stdout and stderr.

use serde::{Deserialize, Serialize};

/// Maximum total size of the arguments and the environment of an exec, in bytes. The kernel's limit
/// is a quarter of the stack limit, 2 MiB by default (execve(2)).
pub const MAX_ARGUMENT_BYTES: usize = 1 << 20;
/// Maximum length of one argument or `NAME=value`, in bytes: `MAX_ARG_STRLEN` minus the zero.
pub const MAX_ARGUMENT: usize = (128 << 10) - 1;
/// Maximum number of arguments, and of variables.
pub const MAX_ARGUMENTS: usize = 16 << 10;
/// Maximum number of execs that run at the same time in one guest.
pub const MAX_RUNNING: usize = 1024;
/// Number of ended execs that the agent keeps; the oldest are removed first.
pub const MAX_ENDED: usize = 256;
/// Default size of an exec's output buffer in the guest, in bytes.
pub const DEFAULT_BUFFER: u64 = 1 << 20;
/// Minimum size of an exec's output buffer in the guest, in bytes.
pub const MIN_BUFFER: u64 = 24 << 10;
/// Maximum size of an exec's output buffer in the guest, in bytes.
pub const MAX_BUFFER: u64 = TOTAL_BUFFER;
/// Size of all output buffers of a guest together, in bytes.
pub const TOTAL_BUFFER: u64 = 2 << 20;
/// Maximum size of the arguments in an [`ExecStatus`], in bytes.
pub const MAX_STATUS_ARGV: usize = 1 << 10;

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartExec {
    /// The exec's id: `exec-` and 12 hexadecimal digits, chosen by the host. A request with the id
    /// of an existing exec fails with [`Exists`](crate::FailureCode::Exists).
    pub id: String,
    /// The program and its arguments; at least one. The program is searched for in the `PATH` of
    /// `env` unless it contains a slash. No argument contains a zero byte.
    pub argv: Vec<String>,
    /// The environment, complete except for variables that the agent adds. These are `HOME`,
    /// `USER`, `LOGNAME`, `SHELL`, `PATH`, and `TERM` with a terminal, if they are absent and
    /// known.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// The working directory, an absolute path; by default `/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// `NAME|UID[:GROUP|GID]`, as in an image's `User`; by default root. A number need not have an
    /// entry in `/etc/passwd`. With a group, the command has no supplementary groups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// A terminal for the command. Without one, its output is separated into stdout and stderr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<Terminal>,
    /// `true` if stdin is a stream that the host writes to. Otherwise it is `/dev/null`. A terminal
    /// can always be written to; closing it sends its end-of-file character to a command that reads
    /// lines.
    #[serde(default)]
    pub stdin: bool,
    /// The process group is killed after this time, at least 1 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Size of the output buffer in bytes, up to [`MAX_BUFFER`]; by default [`DEFAULT_BUFFER`].
    /// Sizes below [`MIN_BUFFER`] count as [`MIN_BUFFER`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buffer: Option<u64>,
    /// `true` if the host reads the output from the start. The command then waits up to 10 s for
    /// the reader when the buffer is full. With `false`, the oldest output is dropped while there
    /// is no reader.
    #[serde(default)]
    pub attached: bool,
}

/// The terminal of an exec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// The initial size.
    pub size: WindowSize,
    /// The value of `TERM`; by default `xterm-256color`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<String>,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Number of rows.
    pub rows: u16,
    /// Number of columns.
    pub cols: u16,
}

/// A signal for the process group of an exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signal {
    /// The signal's number, 1 to 64.
    pub signal: i32,
}

/// The state of an exec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecStatus {
    /// The exec's id.
    pub id: String,
    /// The command. Arguments beyond [`MAX_STATUS_ARGV`] bytes are left out, and the last remaining
    /// argument then ends with `…`.
    pub argv: Vec<String>,
    /// The process id in the guest; 0 if the main process has not started, or could not be started.
    pub pid: u32,
    /// The start time, in milliseconds since 1970 by the guest's clock.
    pub started_at_ms: u64,
    /// Time since the start, or between start and end, in milliseconds.
    pub duration_ms: u64,
    /// `true` if the command has a terminal.
    pub tty: bool,
    /// Offset of the oldest byte in the output buffer.
    pub output_start: u64,
    /// Offset after the newest byte: the number of bytes that the command has written.
    pub output_end: u64,
    /// The end of the command; none while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<ExecEnd>,
    /// The restarts of the main process; none for other execs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<Restarts>,
}

/// How often the main process was started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restarts {
    /// The number of restarts.
    pub count: u64,
    /// `true` if it has ended and is about to be started again.
    pub pending: bool,
}

/// The end of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecEnd {
    /// The exit status, 0 to 255, if the command exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The signal's number, if a signal killed the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// `true` if the agent killed the command after its timeout.
    #[serde(default)]
    pub timed_out: bool,
}
