//! The pipes or the terminal of a new exec.

use crate::exec::table::Fd;
use rustix::io::ioctl_fionbio;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{InputModes, OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};
use scalebox_agent_api::{StartExec, WindowSize};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::Arc;
use tokio::io::unix::AsyncFd;

/// The agent's ends.
pub(crate) enum Streams {
    Pipes { stdin: Option<Fd>, stdout: Fd, stderr: Fd },
    Terminal(Fd),
}

/// The command's ends: stdin, stdout, stderr.
pub(crate) type Ends = [Stdio; 3];

/// Opens the streams of a request. `owner` becomes the owner of the command's ends, so that a
/// command of another user can open `/dev/stdout` and its terminal.
pub(crate) fn open(request: &StartExec, owner: Option<u32>) -> io::Result<(Streams, Ends)> {
    let own = |fd: &OwnedFd| rustix::fs::fchown(fd, owner.map(rustix::fs::Uid::from_raw), None);
    if let Some(terminal) = &request.tty {
        let (master, slave) = open_terminal(terminal.size)?;
        own(&slave)?;
        let ends = [slave.try_clone()?.into(), slave.try_clone()?.into(), slave.into()];
        return Ok((Streams::Terminal(watched(master)?), ends));
    }
    let (stdout, stdout_end) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, stderr_end) = pipe_with(PipeFlags::CLOEXEC)?;
    own(&stdout_end)?;
    own(&stderr_end)?;
    let (stdin, stdin_end) = match request.stdin {
        true => {
            let (stdin_end, stdin) = pipe_with(PipeFlags::CLOEXEC)?;
            own(&stdin_end)?;
            (Some(watched(stdin)?), stdin_end.into())
        }
        false => (None, Stdio::null()),
    };
    let streams = Streams::Pipes {
        stdin,
        stdout: watched(stdout)?,
        stderr: watched(stderr)?,
    };
    Ok((streams, [stdin_end, stdout_end.into(), stderr_end.into()]))
}

fn watched(fd: OwnedFd) -> io::Result<Fd> {
    ioctl_fionbio(&fd, true)?;
    Ok(Arc::new(AsyncFd::new(fd)?))
}

fn open_terminal(size: WindowSize) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    resize(&master, size)?;
    // Erasing a character removes all of its bytes.
    let mut attributes = tcgetattr(&slave)?;
    attributes.input_modes |= InputModes::IUTF8;
    tcsetattr(&slave, OptionalActions::Now, &attributes)?;
    Ok((master, slave))
}

/// Sets the size of a terminal; the kernel sends `SIGWINCH`.
pub(crate) fn resize(terminal: impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, size)?)
}
