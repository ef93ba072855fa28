//! Runs external programs: mmdebstrap, e2fsprogs, coreutils and apt. No other module does.
//!
//! Programs are run with an argument vector, never through a shell, and with a fixed `PATH` and
//! locale. The error of a failed program contains its whole output.

use rustix::fs::Mode;
use rustix::process::umask;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

/// The programs that this crate runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Lists the package sources of this host.
    AptGet,
    /// Runs a program of the new root, inside it.
    Chroot,
    /// Checks the finished image.
    E2fsck,
    /// Creates the image from a directory, in user space.
    Mke2fs,
    /// Installs Debian into a directory.
    Mmdebstrap,
    /// Removes a tree without crossing into other file systems.
    Rm,
    /// Sets options that `mke2fs` lacks.
    Tune2fs,
    /// Runs another program in a mount namespace of its own.
    Unshare,
}

impl Program {
    /// The programs that a build requires.
    pub const REQUIRED: [Program; 7] = [
        Program::Chroot,
        Program::E2fsck,
        Program::Mke2fs,
        Program::Mmdebstrap,
        Program::Rm,
        Program::Tune2fs,
        Program::Unshare,
    ];

    /// Returns the name of the executable.
    pub fn name(self) -> &'static str {
        match self {
            Program::AptGet => "apt-get",
            Program::Chroot => "chroot",
            Program::E2fsck => "e2fsck",
            Program::Mke2fs => "mke2fs",
            Program::Mmdebstrap => "mmdebstrap",
            Program::Rm => "rm",
            Program::Tune2fs => "tune2fs",
            Program::Unshare => "unshare",
        }
    }

    /// Returns the Debian package that contains the program.
    pub fn package(self) -> &'static str {
        match self {
            Program::AptGet => "apt",
            Program::Chroot | Program::Rm => "coreutils",
            Program::E2fsck | Program::Mke2fs | Program::Tune2fs => "e2fsprogs",
            Program::Mmdebstrap => "mmdebstrap",
            Program::Unshare => "util-linux",
        }
    }
}

/// Why an external program could not be run, or failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is not installed.
    #[error("the program {program} is missing; install the package {package} (apt-get install {package})")]
    Missing {
        /// The program's name.
        program: &'static str,
        /// The package that contains the program.
        package: &'static str,
    },
    /// The program could not be started, or its output not read.
    #[error("cannot run {program}: {source}")]
    Start {
        /// The program's name.
        program: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The program exited with an error.
    #[error("{command} failed ({status}):\n{output}")]
    Failed {
        /// The program and its arguments.
        command: String,
        /// The exit status, or the signal that ended it.
        status: String,
        /// The whole output: both streams, in the order of writing.
        output: String,
    },
}

const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Checks that all programs of a build are installed.
///
/// # Errors
/// [`CommandError::Missing`] for the first missing program.
pub fn require_programs() -> Result<(), CommandError> {
    for program in Program::REQUIRED {
        if !SEARCH_PATH
            .split(':')
            .any(|dir| Path::new(dir).join(program.name()).is_file())
        {
            return Err(missing(program));
        }
    }
    Ok(())
}

/// Runs a program to completion and returns its whole output.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: Program,
    args: impl IntoIterator<Item = S>,
) -> Result<String, CommandError> {
    Invocation::new(program, args).run(|_| ())
}

/// A program run, with arguments and environment.
pub(crate) struct Invocation {
    program: Program,
    args: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

impl Invocation {
    pub(crate) fn new<S: AsRef<OsStr>>(program: Program, args: impl IntoIterator<Item = S>) -> Self {
        Invocation {
            program,
            args: args.into_iter().map(|arg| arg.as_ref().to_owned()).collect(),
            environment: Vec::new(),
        }
    }

    pub(crate) fn env(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    /// Runs the program to completion. Passes each line to `line` as it is written, and returns the
    /// whole output.
    pub(crate) fn run(self, mut line: impl FnMut(&str)) -> Result<String, CommandError> {
        let start = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => missing(self.program),
            _ => CommandError::Start {
                program: self.program.name(),
                source,
            },
        };
        // One pipe for both streams preserves the order of the output.
        let (reader, writer) = io::pipe().map_err(start)?;
        let mut command = Command::new(self.program.name());
        command
            .args(&self.args)
            .env("PATH", SEARCH_PATH)
            .env("LC_ALL", "C.UTF-8")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(writer.try_clone().map_err(start)?)
            .stderr(writer);
        if self.program == Program::Chroot {
            // Files that it creates belong to the guest and must be readable by all users there.
            let set_umask = || {
                umask(Mode::WGRP | Mode::WOTH);
                Ok(())
            };
            // SAFETY: between fork and exec the closure makes one system call: it allocates nothing
            // and takes no lock.
            unsafe { command.pre_exec(set_umask) };
        }
        let mut child = command.spawn().map_err(start)?;
        // The command holds the write end of the pipe; while it does, the reader sees no end.
        drop(command);
        let read = read_lines(reader, &mut line);
        let status = child.wait().map_err(start)?;
        let output = read.map_err(start)?;
        if status.success() {
            Ok(output)
        } else {
            Err(self.failed(status, output))
        }
    }

    fn failed(&self, status: ExitStatus, output: String) -> CommandError {
        let mut command = self.program.name().to_owned();
        for arg in &self.args {
            command.push(' ');
            command.push_str(&arg.to_string_lossy());
        }
        CommandError::Failed {
            command,
            status: status.to_string(),
            output: output.trim().to_owned(),
        }
    }
}

fn read_lines(reader: io::PipeReader, line: &mut impl FnMut(&str)) -> io::Result<String> {
    let mut reader = BufReader::new(reader);
    let mut output = String::new();
    let mut bytes = Vec::new();
    while reader.read_until(b'\n', &mut bytes)? > 0 {
        let text = String::from_utf8_lossy(&bytes);
        line(text.trim_end());
        output.push_str(&text);
        bytes.clear();
    }
    Ok(output)
}

fn missing(program: Program) -> CommandError {
    CommandError::Missing {
        program: program.name(),
        package: program.package(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_failed_program_has_its_output() {
        let error = run(Program::E2fsck, ["-n", "/nonexistent/image"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("e2fsck -n /nonexistent/image failed"), "{error}");
        assert!(error.contains("No such file or directory"), "{error}");
    }

    #[test]
    fn lines_are_passed_on_and_returned() {
        let mut seen = Vec::new();
        let all = Invocation::new(Program::Mke2fs, ["-V"])
            .run(|line| seen.push(line.to_owned()))
            .unwrap();
        assert!(seen.len() >= 2 && seen[0].contains("mke2fs"), "{seen:?}");
        assert_eq!(all.lines().count(), seen.len());
    }
}
