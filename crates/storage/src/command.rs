//! The one door to outside programs: e2fsprogs, btrfs-progs and util-linux.
//!
//! Programs are called by argument vector, never through a shell, with a fixed `PATH` and locale.
//! All that a failed one wrote stands in its error.
//!
//! Exit code and standard error decide together whether one has succeeded: several of e2fsprogs end
//! with 0 after a failure and a complaint. What they must not change is verified where they are
//! used.
//!
//! Some read what guests have written, so none is trusted to come to an end by itself: each has a
//! deadline, a limit to what it may say, and dies with the daemon.

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

/// How long a program may take that works on one image. The largest disks take it seconds; one
/// whose file system was made to keep it busy, or to keep it waiting, would take hours.
const IMAGE_DEADLINE: Duration = Duration::from_secs(300);
/// What a program may write, in bytes: the longest listing of a folder that is read is a tenth of
/// it.
const MOST_SAID: u64 = 16 << 20;

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
    /// Unmounts the pool; its loop device goes with it.
    Umount,
}

impl Program {
    /// All of them, to look for at start.
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
            Program::Umount => "umount",
        }
    }

    /// The Debian package that brings it.
    pub fn package(self) -> &'static str {
        match self {
            Program::Debugfs | Program::E2fsck | Program::Resize2fs => "e2fsprogs",
            Program::Btrfs | Program::MkfsBtrfs => "btrfs-progs",
            Program::Blkid | Program::Fstrim => "util-linux",
            Program::Losetup | Program::Mount | Program::Umount => "mount",
        }
    }

    /// How long it may take; `None` for one that takes as long as the pool is large.
    fn deadline(self) -> Option<Duration> {
        match self {
            Program::Blkid | Program::Debugfs | Program::E2fsck | Program::Resize2fs => Some(IMAGE_DEADLINE),
            Program::Btrfs
            | Program::Fstrim
            | Program::Losetup
            | Program::MkfsBtrfs
            | Program::Mount
            | Program::Umount => None,
        }
    }

    /// Whether it is installed where this crate looks for it, which is not the caller's `PATH`.
    pub fn is_installed(self) -> bool {
        SEARCH_PATH
            .split(':')
            .any(|dir| Path::new(dir).join(self.name()).is_file())
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
    /// It did not come to an end, or wrote without one, and was killed.
    #[error("{command} was ended: it {why}")]
    Endless {
        /// The program and its arguments.
        command: String,
        /// What it did.
        why: String,
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

/// Where programs are looked for; tests can put others before them.
fn search_path() -> OsString {
    let mut path = OsString::new();
    if let Some(first) = scalebox_fault_points::programs() {
        path.push(first);
        path.push(":");
    }
    path.push(SEARCH_PATH);
    path
}

/// Runs a program to its end and returns its standard output.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: Program,
    args: impl IntoIterator<Item = S>,
) -> Result<String, CommandError> {
    run_accepting(program, args, |code| code == 0).map(|(_, stdout)| stdout)
}

/// Runs a program whose exit codes are more than yes and no (`e2fsck`, `blkid`); `good` says which
/// are a success.
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

/// What a program that works on an image has answered.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Its exit code; `None` when a signal ended it.
    pub(crate) code: Option<i32>,
    /// The exit code or the signal, in words.
    pub(crate) status: String,
    stdout: String,
    /// Standard error, without the banner.
    complaints: String,
    /// The name by which the image was given to it.
    image: String,
}

impl Answer {
    /// The first line on standard error for which `harmless` does not hold. A program that
    /// complains has failed, whatever its exit code.
    pub(crate) fn complaint(&self, harmless: impl Fn(&str) -> bool) -> Option<&str> {
        let mut lines = self.complaints.lines().map(str::trim);
        lines.find(|line| !line.is_empty() && !harmless(line))
    }

    /// All that it wrote, on both streams. The image has no name in it.
    pub(crate) fn said(&self) -> String {
        let stdout = self.stdout.replace(&self.image, "the image");
        let parts = [stdout.trim(), self.complaints.trim()];
        parts
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// Whether the host is to blame for a failure, and not the image: a system call failed, or the
    /// program was killed.
    pub(crate) fn is_fault_of_host(&self) -> bool {
        let said = self.said();
        self.code.is_none() || HOST_FAULTS.iter().any(|fault| said.contains(fault))
    }

    /// As [`Answer::is_fault_of_host`], of a program that worked on an image just found sound: all
    /// of it is there to be read.
    pub(crate) fn is_fault_on_sound_image(&self) -> bool {
        let said = self.said();
        self.is_fault_of_host() || UNREADABLE.iter().any(|fault| said.contains(fault))
    }
}

/// What e2fsprogs say when they cannot read or write a part of an image, whatever the cause.
const UNREADABLE: [&str; 3] = ["Can't read ", "Can't write ", "Attempt to "];

/// What the C library and e2fsprogs call errors that a sound host does not have. A file system that
/// is cut off or damaged has others, such as "Attempt to read block from filesystem resulted in
/// short read".
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

/// Runs a program with these options on an image. It runs in the image's folder and is given its
/// bare name, so that no path stands in what it says. `input` becomes its standard input.
pub(crate) fn run_on_image(
    image: &Path,
    program: Program,
    options: &[&str],
    input: Option<File>,
) -> Result<Answer, CommandError> {
    let bare = bare_name(image);
    let mut args: Vec<OsString> = options.iter().map(OsString::from).collect();
    args.push(bare.clone());
    let output = output_of(program, &args, image.parent(), input)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = stderr.lines().filter(|line| !is_banner(program, line)).collect();
    let image = bare.to_string_lossy().into_owned();
    Ok(Answer {
        code: output.status.code(),
        status: output.status.to_string(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        complaints: complaints.join("\n").replace(&image, "the image"),
        image,
    })
}

/// The name of a file in its folder, so that no program takes it for an option.
pub(crate) fn bare_name(file: &Path) -> OsString {
    let mut name = OsString::from("./");
    name.push(file.file_name().unwrap_or_default());
    name
}

/// `debugfs 1.47.0 (5-Feb-2023)`, which each of e2fsprogs says first.
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
    // SAFETY: two system calls, which allocate nothing.
    unsafe {
        command.pre_exec(move || {
            // Told of the end of the thread that starts it, which waits for it.
            set_parent_process_death_signal(Some(Signal::KILL))?;
            match getppid() == Some(parent) {
                true => Ok(()),
                // It came too late to be told.
                false => Err(io::ErrorKind::BrokenPipe.into()),
            }
        });
    }
    let child = command.spawn().map_err(not_started)?;
    match attend(child, program.deadline()).map_err(not_started)? {
        Ok(output) => Ok(output),
        Err(why) => Err(CommandError::Endless {
            command: spelled(program, args),
            why,
        }),
    }
}

/// Takes down what a program says until it ends. One that has to be ended is; `Err` then says why.
fn attend(mut child: Child, deadline: Option<Duration>) -> io::Result<Result<Output, String>> {
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
        let joined = |said: thread::ScopedJoinHandle<'_, io::Result<Option<Vec<u8>>>>| {
            said.join().map_err(|_| io::Error::other("its output was not read"))?
        };
        // A program that is not listened to any more ends, by SIGPIPE.
        let (stdout, stderr) = (joined(stdout)?, joined(stderr)?);
        Ok(ended.and_then(|status| match (stdout, stderr) {
            (Some(stdout), Some(stderr)) => Ok(Output { status, stdout, stderr }),
            _ => Err(format!("said more than {} MiB", MOST_SAID >> 20)),
        }))
    })
}

/// All that comes; `None` if it is more than [`MOST_SAID`].
fn read_up_to_limit(stream: Option<impl Read>) -> io::Result<Option<Vec<u8>>> {
    let mut said = Vec::new();
    if let Some(stream) = stream {
        stream.take(MOST_SAID + 1).read_to_end(&mut said)?;
    }
    Ok((said.len() as u64 <= MOST_SAID).then_some(said))
}

/// Waits for a program's end; `None` when it lives on past the deadline.
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

fn spelled(program: Program, args: &[OsString]) -> String {
    let mut command = program.name().to_owned();
    for arg in args {
        command.push(' ');
        command.push_str(&arg.to_string_lossy());
    }
    command
}

fn failed(program: Program, args: &[OsString], output: &Output) -> CommandError {
    let mut said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !said.is_empty() && !stderr.trim().is_empty() {
        said.push('\n');
    }
    said.push_str(stderr.trim());
    CommandError::Failed {
        command: spelled(program, args),
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

    fn answer(code: i32, complaints: &str) -> Answer {
        Answer {
            code: Some(code),
            status: format!("exit status: {code}"),
            stdout: String::new(),
            complaints: complaints.to_owned(),
            image: "./x".to_owned(),
        }
    }

    #[test]
    fn any_word_on_standard_error_is_a_complaint_but_the_banner() {
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
    fn a_failed_system_call_is_a_fault_of_the_host_and_a_short_read_is_not() {
        assert!(answer(4, "Error writing block 7 (Input/output error).").is_fault_of_host());
        assert!(
            !answer(
                4,
                "Error reading block 7 (Attempt to read block from filesystem resulted in short read)"
            )
            .is_fault_of_host()
        );
        assert!(
            Answer {
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
    fn what_a_program_says_on_both_streams_is_taken_down() {
        let child = shell("seq 100000; seq 100000 >&2; exit 3");
        let output = attend(child, Some(IMAGE_DEADLINE)).unwrap().unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert!(output.stdout == output.stderr && output.stdout.ends_with(b"100000\n"));
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        // One that is asked to end and does not, and keeps its output open.
        let child = shell("trap '' TERM; exec sleep 1000");
        let pid = child.id();
        let why = attend(child, Some(Duration::from_millis(50))).unwrap().unwrap_err();
        assert!(why.starts_with("did not end within"), "{why}");
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_program_that_says_too_much_is_ended() {
        let why = attend(shell("exec yes"), Some(IMAGE_DEADLINE)).unwrap().unwrap_err();
        assert_eq!(why, "said more than 16 MiB");
    }
}
