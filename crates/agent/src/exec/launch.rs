//! Launches the process of an exec.

use crate::accounts::Account;
use crate::exec::image::Image;
use crate::exec::streams::{self, Streams};
use crate::server::Failure;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Gid, Pid, Resource, Rlimit, Uid, geteuid, getrlimit, setrlimit, setsid, umask};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use scalebox_agent_api::{FailureCode, StartExec};
use std::fs::metadata;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use tokio::process::{Child, Command};

/// Number of files that the agent may open: 1024 execs with five each, and their starts.
const OPEN_FILES: u64 = 16 << 10;

/// A running command.
pub(crate) struct Launched {
    pub(crate) child: Child,
    pub(crate) pid: Pid,
    pub(crate) streams: Streams,
}

/// Starts the program of a checked request. Blocks until the kernel has loaded it.
///
/// # Errors
/// Those of finding the user, the working directory and the program. Nothing is left of the
/// command.
pub(crate) fn launch(request: &StartExec) -> Result<Launched, Failure> {
    let account = Account::find(request.user.as_deref().unwrap_or("0"))?;
    let cwd = request.cwd.as_deref().unwrap_or("/");
    let folder = metadata(cwd).map_err(Failure::io(format!("use the working directory {cwd}")))?;
    if !folder.is_dir() {
        let error = format!("the working directory {cwd} is not a directory");
        return Err(Failure::new(FailureCode::WrongKind, error));
    }
    let image = Image::new(request, &account)
        .map_err(|error| Failure::new(FailureCode::Invalid, format!("the command is invalid: {error}")))?;
    let files = open_files();
    let other = (account.uid != geteuid().as_raw()).then_some(account.uid);
    let open = streams::open(request, other);
    let (streams, [stdin, stdout, stderr]) = open.map_err(Failure::io("open the streams of the command"))?;
    let setup = Setup::new(image, &account, request.tty.is_some(), files);
    // Its name is not used: the setup executes the program.
    let mut command = Command::new("exec");
    command.current_dir(cwd).stdin(stdin).stdout(stdout).stderr(stderr);
    // SAFETY: between fork and exec the closure makes system calls only: it allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(move || Err(setup.enter())) };
    let child = command.spawn().map_err(|error| explain(error, request, cwd))?;
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    let pid = pid.ok_or_else(|| Failure::new(FailureCode::Other, "the command has no process id"))?;
    Ok(Launched { child, pid, streams })
}

/// Returns the error of a failed start, with its cause where the kernel's code is ambiguous.
fn explain(error: io::Error, request: &StartExec, cwd: &str) -> Failure {
    let program = request.argv.first().map_or("", String::as_str);
    let file = program.contains('/').then(|| metadata(Path::new(cwd).join(program)));
    let exists = matches!(file, Some(Ok(_)));
    match error.raw_os_error() {
        Some(libc::EACCES) if matches!(&file, Some(Ok(file)) if file.is_dir()) => Failure::new(
            FailureCode::WrongKind,
            format!("cannot run {program}: it is a directory"),
        ),
        Some(libc::ENOENT) if exists => Failure::new(
            FailureCode::NotFound,
            format!("cannot run {program}: its interpreter or loader does not exist"),
        ),
        Some(libc::ENOENT) if file.is_none() => Failure::new(
            FailureCode::NotFound,
            format!("cannot run {program}: it is in no folder of PATH"),
        ),
        Some(libc::ENOEXEC) => Failure::new(
            FailureCode::Invalid,
            format!(
                "cannot run {program}: not an executable for this architecture, and not a script that starts with #!"
            ),
        ),
        _ => Failure::io(format!("run {program}"))(error),
    }
}

/// The steps of a new process before it becomes the program.
struct Setup {
    image: Image,
    terminal: bool,
    uid: Uid,
    gid: Gid,
    /// The supplementary groups; none if the agent may not set them, because it is not root.
    groups: Option<Vec<Gid>>,
    files: Rlimit,
}

impl Setup {
    fn new(image: Image, account: &Account, terminal: bool, files: Rlimit) -> Setup {
        let gid = Gid::from_raw(account.gid);
        let groups = account.groups.iter().copied().map(Gid::from_raw).chain([gid]);
        Setup {
            image,
            terminal,
            uid: Uid::from_raw(account.uid),
            gid,
            groups: geteuid().is_root().then(|| groups.collect()),
            files,
        }
    }

    /// Becomes the program; returns only if that fails. Runs after fork(2): allocates nothing.
    fn enter(&self) -> io::Error {
        match self.prepare() {
            Ok(()) => self.image.execute(),
            Err(error) => error,
        }
    }

    fn prepare(&self) -> io::Result<()> {
        setsid()?;
        if self.terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        reset_signals();
        reset_oom_score();
        setrlimit(Resource::Nofile, self.files)?;
        umask(Mode::WGRP | Mode::WOTH);
        if let Some(groups) = &self.groups {
            set_thread_groups(groups)?;
        }
        set_thread_res_gid(self.gid, self.gid, self.gid)?;
        set_thread_res_uid(self.uid, self.uid, self.uid)?;
        Ok(())
    }
}

/// Sets the default action of all signals: those that the agent's parent ignores are inherited.
fn reset_signals() {
    // The kernel's `struct sigaction` with `SIG_DFL`, no flags and no signals; and the size of a
    // set of signals. The function of libc refuses signals 32 and 33.
    let (default, set) = ([0_u64; 4], size_of::<u64>());
    for signal in 1..=64 {
        // SAFETY: the kernel reads the structure and sets no handler. Fails for the signals that
        // cannot be changed.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null::<u64>(),
                set,
            )
        };
    }
}

/// Gives the command the default OOM score. The agent itself is never killed for lack of memory.
fn reset_oom_score() {
    // Fails only without /proc.
    if let Ok(file) = rustix::fs::open(
        c"/proc/self/oom_score_adj",
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        let _ = rustix::io::write(&file, b"0");
    }
}

/// Raises the agent's limit of open files, once. Returns the previous limit, which commands get:
/// some programs take time or memory for each file that they might open.
fn open_files() -> Rlimit {
    static BEFORE: OnceLock<Rlimit> = OnceLock::new();
    *BEFORE.get_or_init(|| {
        let before = getrlimit(Resource::Nofile);
        let maximum = before.maximum;
        if before.current.is_some_and(|current| current < OPEN_FILES) {
            let raised = |current: Option<u64>, maximum| setrlimit(Resource::Nofile, Rlimit { current, maximum });
            let enough = maximum.is_none_or(|maximum| maximum >= OPEN_FILES);
            let wanted = Some(OPEN_FILES);
            // Without the right to raise the maximum, uses all of it.
            let _ = match enough {
                true => raised(wanted, maximum),
                false => raised(wanted, wanted).or_else(|_| raised(maximum, maximum)),
            };
        }
        before
    })
}
