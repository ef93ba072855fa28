//! Runs outside programs: e2fsprogs, btrfs-progs and util-linux. No other module starts a program.
//!
//! Programs are called with an argument vector, never through a shell, with a fixed `PATH` and
//! locale. The error of a failed program contains its complete output.
//!
//! Exit code and standard error together decide whether a program succeeded: several of e2fsprogs
//! exit with 0 after printing an error. The callers verify that a program changed nothing else.
//!
//! Some programs read file systems that guests have written, so none is trusted to end by itself:
//! each has a deadline and a limit on its output, and dies with the daemon.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, set_parent_process_death_signal};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Timeout of a program that works on one image. The largest disks take seconds; a file system
/// crafted to keep the program busy or waiting would take hours.
const IMAGE_TIMEOUT: Duration = Duration::from_secs(300);
/// Maximum output of a program, in bytes: ten times the longest folder listing that is read.
const MAX_OUTPUT: u64 = 16 << 20;

/// The programs this crate runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Detects the file system in an image.
    Blkid,
    /// Grows and shrinks the pool's file system.
    Btrfs,
    /// Edits an ext4 file system, in user space.
    Debugfs,
    /// Checks an ext4 file system and replays its journal, in user space.
    E2fsck,
    /// Discards the free blocks of a file system.
    Fstrim,
    /// Sets direct I/O on a loop device, and updates the device after its file was resized.
    Losetup,
    /// Makes the pool's file system.
    MkfsBtrfs,
    /// Mounts the pool and creates its loop device.
    Mount,
    /// Grows an ext4 file system, in user space.
    Resize2fs,
    /// Unmounts the pool, which also removes its loop device.
    Umount,
}

impl Program {
    /// All programs, to check for at start.
    pub const ALL: [Program; 10] = [
        Program::Blkid,
        Program::Btrfs,
        Program::Debugfs,
        Program::E2fsck,
        Program::Fstrim,
        Program::Losetup,
        Program::MkfsBtrfs,
        Program::Mount,
        Program::Resize2fs,
        Program::Umount,
    ];

    /// Returns the name of the executable.
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
            Program::Umount => "umount",
        }
    }

    /// Returns the Debian package that contains the program.
    pub fn package(self) -> &'static str {
        match self {
            Program::Debugfs | Program::E2fsck | Program::Resize2fs => "e2fsprogs",
            Program::Btrfs | Program::MkfsBtrfs => "btrfs-progs",
            Program::Blkid | Program::Fstrim => "util-linux",
            Program::Losetup | Program::Mount | Program::Umount => "mount",
        }
    }

    /// Returns the program's timeout; `None` for programs whose duration depends on the size of the
    /// pool.
    fn deadline(self) -> Option<Duration> {
        match self {
            Program::Blkid | Program::Debugfs | Program::E2fsck | Program::Resize2fs => Some(IMAGE_TIMEOUT),
            Program::Btrfs
            | Program::Fstrim
            | Program::Losetup
            | Program::MkfsBtrfs
            | Program::Mount
            | Program::Umount => None,
        }
    }

    /// Returns whether the program is installed in this crate's search path, which is not the
    /// caller's `PATH`.
    pub fn is_installed(self) -> bool {
        SEARCH_PATH
            .split(':')
            .any(|dir| Path::new(dir).join(self.name()).is_file())
    }
}

/// An outside program could not be run, or failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is not installed.
    #[error("the program {program} is missing: install the package {package} (apt-get install {package})")]
    Missing {
        /// The name of the program.
        program: &'static str,
        /// The package that contains the program.
        package: &'static str,
    },
    /// The program could not be started.
    #[error("cannot run {program}: {source}")]
    Start {
        /// The name of the program.
        program: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The program failed.
    #[error("{command} failed ({status}): {output}")]
    Failed {
        /// The program and its arguments.
        command: String,
        /// The exit status, or the signal that killed the program.
        status: String,
        /// The output on both streams.
        output: String,
    },
    /// The program was killed: it did not end, or wrote too much.
    #[error("{command} was killed: it {why}")]
    Killed {
        /// The program and its arguments.
        command: String,
        /// The cause.
        why: String,
    },
}

/// Checks that every program of [`Program::ALL`] is installed.
///
/// # Errors
/// [`CommandError::Missing`] for the first missing program.
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

/// Returns the search path for programs; tests can prepend a folder.
fn search_path() -> OsString {
    let mut path = OsString::new();
    if let Some(first) = scalebox_fault_points::programs() {
        path.push(first);
        path.push(":");
    }
    path.push(SEARCH_PATH);
    path
}

/// Runs a program and returns its standard output.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: Program,
    args: impl IntoIterator<Item = S>,
) -> Result<String, CommandError> {
    run_accepting(program, args, |code| code == 0).map(|(_, stdout)| stdout)
}

/// Runs a program with several successful exit codes (`e2fsck`, `blkid`); `good` returns whether a
/// code is a success.
pub(crate) fn run_accepting<S: AsRef<OsStr>>(
    program: Program,
    args: impl IntoIterator<Item = S>,
    good: impl Fn(i32) -> bool,
) -> Result<(i32, String), CommandError> {
    let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    let output = output_of(program, &args, None, None)?;
    match output.status.code() {
        Some(code) if good(code) => Ok((code, String::from_utf8_lossy(&output.stdout).into_owned())),
        _ => Err(failed(program, &args, &output)),
    }
}

/// The result of a program that worked on an image.
#[derive(Debug)]
pub(crate) struct ImageRun {
    /// Exit code; `None` when a signal killed the program.
    pub(crate) code: Option<i32>,
    /// The exit code or the signal, as text.
    pub(crate) status: String,
    stdout: String,
    /// Standard error, without the banner.
    complaints: String,
    /// The name under which the program got the image.
    image: String,
}

impl ImageRun {
    /// Returns the first line on standard error that is not `harmless`. A program that prints such
    /// a line has failed, whatever its exit code.
    pub(crate) fn complaint(&self, harmless: impl Fn(&str) -> bool) -> Option<&str> {
        let mut lines = self.complaints.lines().map(str::trim);
        lines.find(|line| !line.is_empty() && !harmless(line))
    }

    /// Returns the program's output on both streams, with the name of the image replaced.
    pub(crate) fn output(&self) -> String {
        let stdout = self.stdout.replace(&self.image, "the image");
        let parts = [stdout.trim(), self.complaints.trim()];
        parts
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// Returns whether the host caused the failure, not the image: a system call failed, or the
    /// program was killed.
    pub(crate) fn is_fault_of_host(&self) -> bool {
        let output = self.output();
        self.code.is_none() || HOST_FAULTS.iter().any(|fault| output.contains(fault))
    }

    /// Returns the same as [`ImageRun::is_fault_of_host`], for an image that was just found sound
    /// and is therefore readable.
    pub(crate) fn is_fault_on_sound_image(&self) -> bool {
        let output = self.output();
        self.is_fault_of_host() || UNREADABLE.iter().any(|fault| output.contains(fault))
    }
}

/// Messages of e2fsprogs when they cannot read or write part of an image, whatever the cause.
const UNREADABLE: [&str; 3] = ["Can't read ", "Can't write ", "Attempt to "];

/// Messages of the C library and e2fsprogs for errors that a sound host does not have. A truncated
/// or damaged file system has other messages, such as "Attempt to read block from filesystem
/// resulted in short read".
const HOST_FAULTS: [&str; 16] = [
    "Input/output error",
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "Cannot allocate memory",
    "Memory allocation failed",
    "Too many open files",
    "File too large",
    "Permission denied",
    "Operation not permitted",
    "No such file or directory",
    "Bad file descriptor",
    "Interrupted system call",
    "resulted in short write",
    "Device or resource busy",
    "Resource temporarily unavailable",
];

/// Runs a program on an image. The program runs in the image's folder and gets the bare name, so
/// that its output contains no path. `input` becomes its standard input.
pub(crate) fn run_on_image(
    image: &Path,
    program: Program,
    options: &[&str],
    input: Option<File>,
) -> Result<ImageRun, CommandError> {
    let bare = bare_name(image);
    let mut args: Vec<OsString> = options.iter().map(OsString::from).collect();
    args.push(bare.clone());
    let output = output_of(program, &args, image.parent(), input)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = stderr.lines().filter(|line| !is_banner(program, line)).collect();
    let image = bare.to_string_lossy().into_owned();
    Ok(ImageRun {
        code: output.status.code(),
        status: output.status.to_string(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        complaints: complaints.join("\n").replace(&image, "the image"),
        image,
    })
}

/// Returns the file's name relative to its folder, in a form that no program takes for an option.
pub(crate) fn bare_name(file: &Path) -> OsString {
    let mut name = OsString::from("./");
    name.push(file.file_name().unwrap_or_default());
    name
}

/// Recognizes `debugfs 1.47.0 (5-Feb-2023)`, the first line of e2fsprogs on standard error.
fn is_banner(program: Program, line: &str) -> bool {
    let version = line
        .strip_prefix(program.name())
        .and_then(|rest| rest.strip_prefix(' '));
    version.is_some_and(|rest| rest.starts_with(|digit: char| digit.is_ascii_digit()) && rest.ends_with(')'))
}

fn output_of(
    program: Program,
    args: &[OsString],
    folder: Option<&Path>,
    input: Option<File>,
) -> Result<Output, CommandError> {
    let not_started = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => CommandError::Missing {
            program: program.name(),
            package: program.package(),
        },
        _ => CommandError::Start {
            program: program.name(),
            source,
        },
    };
    let mut command = Command::new(program.name());
    if let Some(folder) = folder {
        command.current_dir(folder);
    }
    command
        .args(args)
        .env("PATH", search_path())
        .env("LC_ALL", "C")
        .stdin(input.map_or_else(Stdio::null, Stdio::from))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let parent = getpid();
    // SAFETY: two system calls, which do not allocate.
    unsafe {
        command.pre_exec(move || {
            // The signal is sent when the thread that starts the program ends; that thread waits
            // for the program.
            set_parent_process_death_signal(Some(Signal::KILL))?;
            match getppid() == Some(parent) {
                true => Ok(()),
                // The parent died before the signal was requested.
                false => Err(io::ErrorKind::BrokenPipe.into()),
            }
        });
    }
    let child = command.spawn().map_err(not_started)?;
    match wait_for_output(child, program.deadline()).map_err(not_started)? {
        Ok(output) => Ok(output),
        Err(why) => Err(CommandError::Killed {
            command: command_line(program, args),
            why,
        }),
    }
}

/// Collects a program's output until the program ends. Kills a program over its limits; `Err` then
/// names the reason.
fn wait_for_output(mut child: Child, deadline: Option<Duration>) -> io::Result<Result<Output, String>> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        let stdout = scope.spawn(move || read_up_to_limit(stdout));
        let stderr = scope.spawn(move || read_up_to_limit(stderr));
        let ended = match wait(&mut child, deadline) {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err(format!(
                "did not end within {} s",
                deadline.unwrap_or_default().as_secs()
            )),
            Err(error) => Err(format!("could not be waited for: {error}")),
        };
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
        }
        let joined = |output: thread::ScopedJoinHandle<'_, io::Result<Option<Vec<u8>>>>| {
            output
                .join()
                .map_err(|_| io::Error::other("reading its output panicked"))?
        };
        // A program whose output is no longer read ends by SIGPIPE.
        let (stdout, stderr) = (joined(stdout)?, joined(stderr)?);
        Ok(ended.and_then(|status| match (stdout, stderr) {
            (Some(stdout), Some(stderr)) => Ok(Output { status, stdout, stderr }),
            _ => Err(format!("wrote more than {} MiB", MAX_OUTPUT >> 20)),
        }))
    })
}

/// Reads the whole stream; `None` if it is longer than [`MAX_OUTPUT`].
fn read_up_to_limit(stream: Option<impl Read>) -> io::Result<Option<Vec<u8>>> {
    let mut output = Vec::new();
    if let Some(stream) = stream {
        stream.take(MAX_OUTPUT + 1).read_to_end(&mut output)?;
    }
    Ok((output.len() as u64 <= MAX_OUTPUT).then_some(output))
}

/// Waits for a program to end; `None` when it is still running at the deadline.
fn wait(child: &mut Child, deadline: Option<Duration>) -> io::Result<Option<ExitStatus>> {
    let Some(deadline) = deadline else {
        return child.wait().map(Some);
    };
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let begun = Instant::now();
    loop {
        let left = deadline.saturating_sub(begun.elapsed());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(None),
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn command_line(program: Program, args: &[OsString]) -> String {
    let mut command = program.name().to_owned();
    for arg in args {
        command.push(' ');
        command.push_str(&arg.to_string_lossy());
    }
    command
}

fn failed(program: Program, args: &[OsString], output: &Output) -> CommandError {
    let mut written = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !written.is_empty() && !stderr.trim().is_empty() {
        written.push('\n');
    }
    written.push_str(stderr.trim());
    CommandError::Failed {
        command: command_line(program, args),
        status: output.status.to_string(),
        output: written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_contain_the_output_of_the_failed_program() {
        let error = run(Program::E2fsck, ["-n", "/nonexistent/image"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("e2fsck -n /nonexistent/image failed"), "{error}");
        assert!(error.contains("No such file or directory"), "{error}");
    }

    fn answer(code: i32, complaints: &str) -> ImageRun {
        ImageRun {
            code: Some(code),
            status: format!("exit status: {code}"),
            stdout: String::new(),
            complaints: complaints.to_owned(),
            image: "./x".to_owned(),
        }
    }

    #[test]
    fn any_line_on_standard_error_except_the_banner_is_a_complaint() {
        assert!(is_banner(Program::Debugfs, "debugfs 1.47.0 (5-Feb-2023)"));
        assert!(!is_banner(Program::E2fsck, "debugfs 1.47.0 (5-Feb-2023)"));
        assert!(!is_banner(Program::E2fsck, "e2fsck: Input/output error"));
        assert_eq!(answer(0, "\n \n").complaint(|_| false), None);
        let complains = answer(0, "fine\nresize2fs: Input/output error while closing");
        assert_eq!(
            complains.complaint(|line| line == "fine"),
            Some("resize2fs: Input/output error while closing")
        );
    }

    #[test]
    fn failed_system_calls_are_host_faults_and_short_reads_are_not() {
        assert!(answer(4, "Error writing block 7 (Input/output error).").is_fault_of_host());
        assert!(
            !answer(
                4,
                "Error reading block 7 (Attempt to read block from filesystem resulted in short read)"
            )
            .is_fault_of_host()
        );
        assert!(
            ImageRun {
                code: None,
                ..answer(0, "")
            }
            .is_fault_of_host()
        );
    }

    fn shell(script: &str) -> Child {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", script])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    fn output_on_both_streams_is_collected() {
        let child = shell("seq 100000; seq 100000 >&2; exit 3");
        let output = wait_for_output(child, Some(IMAGE_TIMEOUT)).unwrap().unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert!(output.stdout == output.stderr && output.stdout.ends_with(b"100000\n"));
    }

    #[test]
    fn programs_past_their_deadline_are_killed() {
        // Ignores SIGTERM and keeps its output open.
        let child = shell("trap '' TERM; exec sleep 1000");
        let pid = child.id();
        let why = wait_for_output(child, Some(Duration::from_millis(50)))
            .unwrap()
            .unwrap_err();
        assert!(why.starts_with("did not end within"), "{why}");
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn programs_with_too_much_output_are_killed() {
        let why = wait_for_output(shell("exec yes"), Some(IMAGE_TIMEOUT))
            .unwrap()
            .unwrap_err();
        assert_eq!(why, "wrote more than 16 MiB");
    }
}
