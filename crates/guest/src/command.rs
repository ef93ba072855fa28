//! The one door to outside programs: mmdebstrap, e2fsprogs, coreutils and apt.
//!
//! Programs are called by argument vector, never through a shell, with a fixed `PATH` and locale.
//! All that a failed one wrote stands in its error.

use rustix::fs::Mode;
use rustix::process::umask;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

/// The programs this crate calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Tells where this host's own packages come from.
    AptGet,
    /// Runs a program of the new root in it.
    Chroot,
    /// Checks the finished image.
    E2fsck,
    /// Makes the image from a directory, in user space.
    Mke2fs,
    /// Installs Debian into a directory.
    Mmdebstrap,
    /// Removes a tree without leaving its file system.
    Rm,
    /// Sets what `mke2fs` cannot.
    Tune2fs,
    /// Runs another program where its mounts are nobody else's, and end with it.
    Unshare,
}

impl Program {
    /// Those that a build cannot do without.
    pub const REQUIRED: [Program; 7] = [
        Program::Chroot,
        Program::E2fsck,
        Program::Mke2fs,
        Program::Mmdebstrap,
        Program::Rm,
        Program::Tune2fs,
        Program::Unshare,
    ];

    /// The name of the executable.
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

    /// The Debian package that brings it.
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

/// An outside program that could not be run, or said no.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It is not installed.
    #[error("the program {program} is missing: install the package {package} (apt-get install {package})")]
    Missing {
        /// Its name.
        program: &'static str,
        /// The package that brings it.
        package: &'static str,
    },
    /// It could not be started or listened to.
    #[error("cannot run {program}: {source}")]
    Start {
        /// Its name.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It ended with a failure.
    #[error("{command} failed ({status}):\n{output}")]
    Failed {
        /// The program and its arguments.
        command: String,
        /// Its exit status, or the signal that ended it.
        status: String,
        /// All it wrote, both streams in the order it wrote them.
        output: String,
    },
}

const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Looks for every program that a build calls.
///
/// # Errors
/// [`CommandError::Missing`] for the first one that is not there.
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

/// Runs a program to its end and returns all it wrote.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: Program,
    args: impl IntoIterator<Item = S>,
) -> Result<String, CommandError> {
    Call::new(program, args).run(|_| ())
}

/// A call with more to it than arguments.
pub(crate) struct Call {
    program: Program,
    args: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

impl Call {
    pub(crate) fn new<S: AsRef<OsStr>>(program: Program, args: impl IntoIterator<Item = S>) -> Self {
        Call {
            program,
            args: args.into_iter().map(|arg| arg.as_ref().to_owned()).collect(),
            environment: Vec::new(),
        }
    }

    pub(crate) fn env(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    /// Runs it to its end, shows each line as it is written, and returns all of them.
    pub(crate) fn run(self, mut line: impl FnMut(&str)) -> Result<String, CommandError> {
        let start = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => missing(self.program),
            _ => CommandError::Start {
                program: self.program.name(),
                source,
            },
        };
        // One pipe for both streams keeps what was said in order.
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
            // What it makes is the guest's, and for everybody there.
            let for_everybody = || {
                umask(Mode::WGRP | Mode::WOTH);
                Ok(())
            };
            // SAFETY: between fork and exec one system call is made: nothing is allocated and no
            // lock is taken.
            unsafe { command.pre_exec(for_everybody) };
        }
        let mut child = command.spawn().map_err(start)?;
        // The command holds the writing end: as long as it does, the reader sees no end.
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
    fn a_failed_program_s_error_holds_all_it_wrote() {
        let error = run(Program::E2fsck, ["-n", "/nonexistent/image"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("e2fsck -n /nonexistent/image failed"), "{error}");
        assert!(error.contains("No such file or directory"), "{error}");
    }

    #[test]
    fn lines_are_shown_as_they_are_written_and_kept() {
        let mut seen = Vec::new();
        let all = Call::new(Program::Mke2fs, ["-V"])
            .run(|line| seen.push(line.to_owned()))
            .unwrap();
        assert!(seen.len() >= 2 && seen[0].contains("mke2fs"), "{seen:?}");
        assert_eq!(all.lines().count(), seen.len());
    }
}
