//! Runs the programs that the benchmark compares with or needs.

use crate::outcome::Outcome;
use std::process::{Command, Stdio};

/// Runs a command, and returns its output.
///
/// # Errors
/// The command cannot be started, or fails; with its standard error.
pub(crate) fn run(command: &mut Command) -> Outcome<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run {program}: {error}; install it with scripts/deps.sh"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(format!("{program} failed: {}{}", text(&output.stdout), text(&output.stderr)).into()),
    }
}

/// Options of `ssh` and `scp` for guests, whose host keys are new.
pub(crate) const SSH_OPTIONS: [&str; 8] = [
    "-o",
    "BatchMode=yes",
    "-o",
    "StrictHostKeyChecking=no",
    "-o",
    "UserKnownHostsFile=/dev/null",
    "-o",
    "LogLevel=ERROR",
];
