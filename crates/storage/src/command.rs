//! The one door to outside programs: e2fsprogs, btrfs-progs and util-linux.
//!
//! Programs are called by argument vector, never through a shell, with a fixed `PATH` and locale. All that a failed one wrote
//! stands in its error.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::process::{Command, Output, Stdio};

/// The programs this crate calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Tells what file system an image holds.
    Blkid,
    /// Grows and shrinks the pool's file system.
    Btrfs,
    /// Edits an ext4 file system, in user space.
    Debugfs,
    /// Checks an ext4 file system and replays its journal, in user space.
    E2fsck,
    /// Discards the free blocks of a file system.
    Fstrim,
    /// Sets direct I/O on a loop device, and tells it that its file has another size.
    Losetup,
    /// Makes the pool's file system.
    MkfsBtrfs,
    /// Mounts the pool, making its loop device.
    Mount,
    /// Grows an ext4 file system, in user space.
    Resize2fs,
    /// Takes an ext4 file system's journal away and makes a new one.
    Tune2fs,
    /// Unmounts the pool; its loop device goes with it.
    Umount,
}

impl Program {
    /// All of them, to look for at start.
    pub const ALL: [Program; 11] = [
        Program::Blkid,
        Program::Btrfs,
        Program::Debugfs,
        Program::E2fsck,
        Program::Fstrim,
        Program::Losetup,
        Program::MkfsBtrfs,
        Program::Mount,
        Program::Resize2fs,
        Program::Tune2fs,
        Program::Umount,
    ];

    /// The name of the executable.
    pub fn name(self) -> &'static str {
        match self {
            Program::Blkid => "blkid",
            Program::Btrfs => "btrfs",
            Program::Debugfs => "debugfs",
            Program::E2fsck => "e2fsck",
            Program::Fstrim => "fstrim",
            Program::Losetup => "losetup",
            Program::MkfsBtrfs => "mkfs.btrfs",
            Program::Mount => "mount",
            Program::Resize2fs => "resize2fs",
            Program::Tune2fs => "tune2fs",
            Program::Umount => "umount",
        }
    }

    /// The Debian package that brings it.
    pub fn package(self) -> &'static str {
        match self {
            Program::Debugfs | Program::E2fsck | Program::Resize2fs | Program::Tune2fs => "e2fsprogs",
            Program::Btrfs | Program::MkfsBtrfs => "btrfs-progs",
            Program::Blkid | Program::Fstrim => "util-linux",
            Program::Losetup | Program::Mount | Program::Umount => "mount",
        }
    }

    /// Whether it is installed where this crate looks for it, which is not the caller's `PATH`.
    pub fn is_installed(self) -> bool {
        SEARCH_PATH
            .split(':')
            .any(|dir| std::path::Path::new(dir).join(self.name()).is_file())
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
    /// It could not be started.
    #[error("cannot run {program}: {source}")]
    Start {
        /// Its name.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It ended with a failure.
    #[error("{command} failed ({status}): {output}")]
    Failed {
        /// The program and its arguments.
        command: String,
        /// Its exit status, or the signal that ended it.
        status: String,
        /// All it wrote, on both streams.
        output: String,
    },
}

/// Looks for every program of [`Program::ALL`].
///
/// # Errors
/// [`CommandError::Missing`] for the first one that is not there.
pub fn require_programs() -> Result<(), CommandError> {
    for program in Program::ALL {
        if !program.is_installed() {
            return Err(CommandError::Missing {
                program: program.name(),
                package: program.package(),
            });
        }
    }
    Ok(())
}

const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs a program to its end and returns its standard output.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: Program,
    args: impl IntoIterator<Item = S>,
) -> Result<String, CommandError> {
    run_accepting(program, args, |code| code == 0).map(|(_, stdout)| stdout)
}

/// Runs a program whose exit codes are more than yes and no (`e2fsck`, `blkid`); `good` says which are a success.
pub(crate) fn run_accepting<S: AsRef<OsStr>>(
    program: Program,
    args: impl IntoIterator<Item = S>,
    good: impl Fn(i32) -> bool,
) -> Result<(i32, String), CommandError> {
    let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    let output = output_of(program, &args, None)?;
    match output.status.code() {
        Some(code) if good(code) => Ok((code, String::from_utf8_lossy(&output.stdout).into_owned())),
        _ => Err(failed(program, &args, &output)),
    }
}

/// Runs a program that must not complain: a line on standard error for which `harmless` does not hold is a failure, whatever the exit
/// code says (`debugfs` always ends with 0). `input` becomes its standard input. Returns its standard output.
pub(crate) fn run_without_complaint<S: AsRef<OsStr>>(
    program: Program,
    args: impl IntoIterator<Item = S>,
    input: Option<File>,
    harmless: impl Fn(&str) -> bool,
) -> Result<Vec<u8>, CommandError> {
    let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    let output = output_of(program, &args, input)?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    if output.status.success() && complaints.lines().all(|line| line.trim().is_empty() || harmless(line)) {
        return Ok(output.stdout);
    }
    Err(failed(program, &args, &output))
}

fn output_of(program: Program, args: &[OsString], input: Option<File>) -> Result<Output, CommandError> {
    Command::new(program.name())
        .args(args)
        .env("PATH", SEARCH_PATH)
        .env("LC_ALL", "C")
        .stdin(input.map_or_else(Stdio::null, Stdio::from))
        .output()
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CommandError::Missing {
                program: program.name(),
                package: program.package(),
            },
            _ => CommandError::Start {
                program: program.name(),
                source,
            },
        })
}

fn failed(program: Program, args: &[OsString], output: &Output) -> CommandError {
    let mut command = program.name().to_owned();
    for arg in args {
        command.push(' ');
        command.push_str(&arg.to_string_lossy());
    }
    let mut said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !said.is_empty() && !stderr.trim().is_empty() {
        said.push('\n');
    }
    said.push_str(stderr.trim());
    CommandError::Failed {
        command,
        status: output.status.to_string(),
        output: said,
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
}
