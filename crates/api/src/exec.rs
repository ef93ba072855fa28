//! Execs: commands that run in a VM.

use crate::body::{Fields, Invalid};
use crate::command::{Text, form, read_argv, read_env, size_of_env};
use crate::files::{FileOwner, GuestPath};
use crate::signal::Signal;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use scalebox_agent_api::exec::MAX_ARGUMENT_BYTES;
use scalebox_units::{ExecId, InvalidFormat};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The body of `POST /vms/{vm}/exec`. Exactly one of `argv` and `command` is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateExec {
    /// The program and its arguments. Without a slash, the program is searched for in `PATH`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, min_items = 1, example = json!(["df", "-h", "/"])))]
    pub argv: Option<Vec<String>>,
    /// A command line for `/bin/sh -c`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, min_length = 1))]
    pub command: Option<String>,
    /// The environment, in addition to that of the VM and its image. `HOME`, `USER`, `LOGNAME`,
    /// `PATH` and, with a terminal, `TERM` are added if they are absent.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "openapi", schema(required = false))]
    pub env: BTreeMap<String, String>,
    /// The working directory; by default that of the image, or `/`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub cwd: Option<GuestPath>,
    /// The user, by name or number, optionally with a group; by default that of the image, or root.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub user: Option<FileOwner>,
    /// The content of stdin; empty by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub stdin: Option<String>,
    /// The encoding of `stdin`.
    #[serde(skip_serializing_if = "Encoding::is_utf8")]
    #[cfg_attr(feature = "openapi", schema(required = false, default = "utf8"))]
    pub stdin_encoding: Encoding,
    /// Gives the command a terminal, `true` for one of 24 rows and 80 columns. Its output to stderr
    /// is then part of stdout.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub tty: Option<Tty>,
    /// Time after which the command and its children are killed, 1 to 604800.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, minimum = 1, maximum = 604_800))]
    pub timeout_seconds: Option<u64>,
    /// `true` for a response when the command has started, with its id.
    #[serde(skip_serializing_if = "is_false")]
    #[cfg_attr(feature = "openapi", schema(required = false, default = false))]
    pub background: bool,
    /// `true` if stdin stays open after `stdin`, for `POST …/stdin` and an attached client; only
    /// with `background`.
    #[serde(skip_serializing_if = "is_false")]
    #[cfg_attr(feature = "openapi", schema(required = false, default = false))]
    pub open_stdin: bool,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// The form in which a string of the API represents bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// The string is the text.
    #[default]
    Utf8,
    /// The bytes in base64 (RFC 4648, section 4), with padding.
    Base64,
}

impl Encoding {
    fn is_utf8(&self) -> bool {
        *self == Encoding::Utf8
    }
}

impl FromStr for Encoding {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        match text {
            "utf8" => Ok(Encoding::Utf8),
            "base64" => Ok(Encoding::Base64),
            _ => Err(InvalidFormat::new("must be \"utf8\" or \"base64\"")),
        }
    }
}

/// A terminal for a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum Tty {
    /// `true` for a terminal of the default size, `false` for none.
    Default(bool),
    /// A terminal of this size.
    Size(WindowSize),
}

impl Tty {
    /// Returns the terminal's size; `None` without a terminal.
    pub fn size(self) -> Option<WindowSize> {
        match self {
            Tty::Default(false) => None,
            Tty::Default(true) => Some(WindowSize { rows: 24, cols: 80 }),
            Tty::Size(size) => Some(size),
        }
    }
}

/// The size of a terminal, in characters; also the body of `POST /vms/{vm}/execs/{exec}/resize`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct WindowSize {
    /// Number of rows, at least 1.
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 65_535))]
    pub rows: u16,
    /// Number of columns, at least 1.
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 65_535))]
    pub cols: u16,
}

impl WindowSize {
    const FIELDS: [&str; 2] = ["rows", "cols"];
    const ROWS: &str = "send the number of rows of the terminal";
    const COLS: &str = "send the number of columns of the terminal";

    /// Parses a client's body.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        WindowSize::read(&Fields::read(body, &Self::FIELDS)?, "rows", "cols")
    }

    fn read(fields: &Fields<'_>, rows: &'static str, cols: &'static str) -> Result<Self, Invalid> {
        let size = |field, what| {
            let number = fields.number(field, 1..=u16::MAX.into(), what)?;
            Ok(u16::try_from(number).unwrap_or(u16::MAX))
        };
        Ok(WindowSize {
            rows: size(rows, Self::ROWS)?,
            cols: size(cols, Self::COLS)?,
        })
    }
}

/// Any string.
struct Any(String);

impl FromStr for Any {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        Ok(Any(text.to_owned()))
    }
}

impl CreateExec {
    const FIELDS: [&str; 11] = [
        "argv",
        "command",
        "env",
        "cwd",
        "user",
        "stdin",
        "stdin_encoding",
        "tty",
        "timeout_seconds",
        "background",
        "open_stdin",
    ];
    const TTY: [&str; 2] = ["tty.rows", "tty.cols"];

    /// The maximum of `timeout_seconds`: a week.
    pub const MAX_TIMEOUT_SECONDS: u64 = 7 * 86_400;

    /// Creates a request that runs a program with its arguments.
    pub fn of_argv(argv: Vec<String>) -> Self {
        CreateExec {
            argv: Some(argv),
            ..CreateExec::default()
        }
    }

    /// Creates a request that runs a command line of `/bin/sh`.
    pub fn of_command(command: impl Into<String>) -> Self {
        CreateExec {
            command: Some(command.into()),
            ..CreateExec::default()
        }
    }

    /// Parses a client's body.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values. Arguments and
    /// environment are within the agent's limits.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &Self::FIELDS)?;
        let request = CreateExec {
            argv: read_argv(&fields, "argv")?,
            command: fields.optional_text("command")?.map(|Text(text)| text),
            env: read_env(&fields)?,
            cwd: fields.optional_text("cwd")?,
            user: fields.optional_text("user")?,
            stdin: fields.optional_text("stdin")?.map(|Any(text)| text),
            stdin_encoding: fields.optional_text("stdin_encoding")?.unwrap_or_default(),
            tty: Self::read_tty(&fields)?,
            timeout_seconds: fields.optional_number("timeout_seconds", 1..=Self::MAX_TIMEOUT_SECONDS)?,
            background: fields.optional_bool("background")?.unwrap_or(false),
            open_stdin: fields.optional_bool("open_stdin")?.unwrap_or(false),
        };
        request.check()?;
        Ok(request)
    }

    fn read_tty(fields: &Fields<'_>) -> Result<Option<Tty>, Invalid> {
        if !fields.is_object("tty") {
            let tty = fields.optional_bool("tty").map_err(|invalid| match invalid {
                Invalid::Type { field, kind, .. } => Invalid::Type {
                    field,
                    expected: "true, false or an object with rows and cols",
                    kind,
                },
                other => other,
            });
            return Ok(tty?.map(Tty::Default));
        }
        let size = fields.optional_object("tty", &Self::TTY)?;
        let size = size.map(|size| WindowSize::read(&size, "tty.rows", "tty.cols"));
        Ok(size.transpose()?.map(Tty::Size))
    }

    fn check(&self) -> Result<(), Invalid> {
        match (&self.argv, &self.command) {
            (None, None) => Err(Invalid::Missing {
                field: "argv",
                what: "send the program and its arguments, or a command line as command",
            }),
            (Some(_), Some(_)) => Err(form("command", "must not be sent together with argv")),
            (None, Some(command)) if command.trim().is_empty() => Err(form("command", "must not be empty")),
            _ => Ok(()),
        }?;
        self.check_sizes()?;
        if self.open_stdin && !self.background {
            return Err(form("open_stdin", "is only valid together with \"background\": true"));
        }
        if self.stdin.is_none() && self.stdin_encoding != Encoding::Utf8 {
            return Err(form("stdin_encoding", "is only valid together with stdin"));
        }
        self.stdin_bytes().map(drop)
    }

    /// Checks the limits of execve(2), as far as they depend on the request.
    fn check_sizes(&self) -> Result<(), Invalid> {
        let argv = self.argv.iter().flatten().chain(&self.command);
        let size: usize = argv.map(|text| text.len() + 1).sum();
        if size + size_of_env(&self.env) > MAX_ARGUMENT_BYTES {
            let field = if size > MAX_ARGUMENT_BYTES { "argv" } else { "env" };
            let why = format!("is too large: arguments and environment together may have {MAX_ARGUMENT_BYTES} bytes");
            return Err(form(field, why));
        }
        Ok(())
    }

    /// Returns the program and its arguments; for a command line, those of the shell.
    pub fn arguments(&self) -> Vec<String> {
        match (&self.argv, &self.command) {
            (Some(argv), _) => argv.clone(),
            (None, command) => ["/bin/sh", "-c", command.as_deref().unwrap_or_default()]
                .map(str::to_owned)
                .to_vec(),
        }
    }

    /// Returns the bytes of stdin; `None` if the request has none.
    ///
    /// # Errors
    /// `stdin` is not valid base64; never for a parsed request.
    pub fn stdin_bytes(&self) -> Result<Option<Vec<u8>>, Invalid> {
        let Some(stdin) = &self.stdin else { return Ok(None) };
        match self.stdin_encoding {
            Encoding::Utf8 => Ok(Some(stdin.clone().into_bytes())),
            Encoding::Base64 => match STANDARD.decode(stdin) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(why) => Err(form("stdin", format!("must be base64 with padding: {why}"))),
            },
        }
    }
}

/// The response to `POST /vms/{vm}/exec` with `background`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StartedExec {
    /// The exec's id.
    pub exec: ExecId,
}

/// The end of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecEnd {
    /// The exit status, 0 to 255; null if a signal killed the command.
    pub exit_code: Option<i32>,
    /// The signal that killed the command, such as `KILL`.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub signal: Option<Signal>,
    /// `true` if the command was killed because of its timeout.
    pub timed_out: bool,
    /// Time between start and end, in milliseconds.
    pub duration_ms: u64,
}

/// The response to `POST /vms/{vm}/exec`, when the command has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecResult {
    /// The exec's id.
    pub exec: ExecId,
    /// The exit status, 0 to 255; null if a signal killed the command.
    pub exit_code: Option<i32>,
    /// The signal that killed the command, such as `KILL`.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub signal: Option<Signal>,
    /// `true` if the command was killed because of its timeout.
    pub timed_out: bool,
    /// The first MiB of stdout.
    pub stdout: String,
    /// The first MiB of stderr.
    pub stderr: String,
    /// The encoding of `stdout`: `base64` if it is not UTF-8, absent otherwise.
    #[serde(default, skip_serializing_if = "Encoding::is_utf8")]
    #[cfg_attr(feature = "openapi", schema(required = false))]
    pub stdout_encoding: Encoding,
    /// The encoding of `stderr`: `base64` if it is not UTF-8, absent otherwise.
    #[serde(default, skip_serializing_if = "Encoding::is_utf8")]
    #[cfg_attr(feature = "openapi", schema(required = false))]
    pub stderr_encoding: Encoding,
    /// `true` if the command wrote more than the response contains.
    pub truncated: bool,
    /// Time between start and end, in milliseconds.
    pub duration_ms: u64,
}

/// An exec, as `GET /vms/{vm}/execs/{exec}` returns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Exec {
    /// The id.
    pub exec: ExecId,
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Present status.
    pub status: ExecStatus,
    /// The exit status, 0 to 255; absent while the command runs and if a signal killed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The signal that killed the command, such as `KILL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub signal: Option<Signal>,
    /// `true` if the command was killed because of its timeout; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timed_out: Option<bool>,
    /// Time of the start by the guest's clock: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub started_at: String,
    /// Time since the start, or between start and end, in milliseconds.
    pub duration_ms: u64,
    /// `true` if the command has a terminal.
    pub tty: bool,
    /// Offset of the oldest byte of the output that can still be read.
    pub output_start: u64,
    /// Number of bytes that the command has written.
    pub output_end: u64,
    /// Number of times that a main process was started again; absent for other execs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub restarts: Option<u64>,
}

/// The status of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum ExecStatus {
    /// The command runs.
    Running,
    /// The main process of the VM has ended, and is about to be started again.
    Restarting,
    /// The command has ended.
    Ended,
}

impl ExecStatus {
    /// Returns the API's string for the status.
    pub const fn as_str(self) -> &'static str {
        match self {
            ExecStatus::Running => "running",
            ExecStatus::Restarting => "restarting",
            ExecStatus::Ended => "ended",
        }
    }
}

impl fmt::Display for ExecStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The response to `GET /vms/{vm}/execs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecList {
    /// All execs that run, and the latest that have ended.
    pub execs: Vec<Exec>,
}

/// The body of `POST /vms/{vm}/execs/{exec}/signal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SignalExec {
    /// The signal for the command and its children: a name such as `TERM` or `SIGTERM`, or a
    /// number.
    pub signal: Signal,
}

impl SignalExec {
    /// Parses a client's body.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &["signal"])?;
        if let Some(number) = fields.as_number("signal") {
            let signal = number.to_string().parse();
            return signal
                .map(|signal| SignalExec { signal })
                .map_err(|form| Invalid::Form { field: "signal", form });
        }
        let signal = fields.text("signal", "send the name or the number of a signal, such as \"TERM\"")?;
        Ok(SignalExec { signal })
    }
}
