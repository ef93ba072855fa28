//! Feeds a running program, reads its output, and kills it and its children over its limits.
//!
//! One loop on one thread waits for input, output and exit, so that a program that writes much
//! before it reads its input cannot block. A child of the program that keeps its output open counts
//! as not ended.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ChildStdin, ExitStatus};
use std::time::{Duration, Instant};

/// Size of one read, in bytes: the default capacity of a pipe.
const CHUNK: usize = 64 << 10;

pub(crate) struct Limits {
    pub(crate) time: Option<Duration>,
    /// `true` if the program leads a process group of its own, which is then killed with it.
    pub(crate) whole_group: bool,
    /// The pipe that is closed when the caller no longer waits.
    pub(crate) stop: Option<PipeReader>,
}

pub(crate) enum Ended<'a, const N: usize> {
    ByItself(ExitStatus, [Collected<'a>; N]),
    /// The reason, such as "did not end within 300 s".
    Killed(String),
}

/// Runs until the program has ended and closed its streams, or a limit has passed.
pub(crate) fn supervise<const N: usize>(
    child: Child,
    input: Vec<u8>,
    mut streams: [Collected<'_>; N],
    limits: Limits,
) -> io::Result<Ended<'_, N>> {
    let mut running = Running {
        child,
        whole_group: limits.whole_group,
        is_reaped: false,
    };
    let mut input = Feed::new(running.child.stdin.take(), input)?;
    streams.iter().try_for_each(Collected::make_nonblocking)?;
    let process = pidfd_open(Pid::from_child(&running.child), PidfdFlags::empty())?;
    let (begun, mut has_ended) = (Instant::now(), false);
    while !has_ended || streams.iter().any(Collected::is_open) {
        let left = limits.time.map(|limit| limit.saturating_sub(begun.elapsed()));
        let mut waiting = Vec::with_capacity(N + 3);
        if !has_ended {
            waiting.push(PollFd::new(&process, PollFlags::IN));
        }
        let open = streams.iter().filter_map(|stream| stream.file.as_ref());
        waiting.extend(open.map(|file| PollFd::new(file, PollFlags::IN)));
        waiting.extend(input.pipe.iter().map(|pipe| PollFd::new(pipe, PollFlags::OUT)));
        waiting.extend(limits.stop.iter().map(|stop| PollFd::new(stop, PollFlags::IN)));
        if !wait(&mut waiting, left)? {
            let limit = limits.time.unwrap_or_default();
            return running.kill(format!("did not end within {} s", limit.as_secs_f64()));
        }
        has_ended = has_ended || is_ready(&process)?;
        if let Some(stop) = &limits.stop
            && is_ready(stop)?
        {
            return running.kill("is no longer waited for".to_owned());
        }
        input.write()?;
        for stream in &mut streams {
            stream.read()?;
            if stream.bytes.len() > stream.limit {
                return running.kill(format!("wrote more than {} MiB", stream.limit >> 20));
            }
        }
    }
    let status = running.reap()?;
    streams.iter_mut().for_each(Collected::finish_line);
    Ok(Ended::ByItself(status, streams))
}

/// Waits for the first event; `false` when there is none within `left`.
fn wait(events: &mut [PollFd<'_>], left: Option<Duration>) -> io::Result<bool> {
    let timeout = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    match poll(events, timeout.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        // The caller computes the remaining time.
        Err(Errno::INTR) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

fn is_ready(file: impl AsFd) -> io::Result<bool> {
    wait(&mut [PollFd::new(&file, PollFlags::IN)], Some(Duration::ZERO))
}

/// A running program. On drop it is killed with its group, unless it was reaped before.
struct Running {
    child: Child,
    whole_group: bool,
    is_reaped: bool,
}

impl Running {
    fn reap(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait()?;
        self.is_reaped = true;
        Ok(status)
    }

    fn kill<'a, const N: usize>(self, why: String) -> io::Result<Ended<'a, N>> {
        drop(self);
        Ok(Ended::Killed(why))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_reaped {
            return;
        }
        // Until it is reaped, no other process can have its id, nor another group its number. An
        // error means that it has ended already.
        let _ended = match self.whole_group {
            true => kill_process_group(Pid::from_child(&self.child), Signal::KILL).map_err(io::Error::from),
            false => self.child.kill(),
        };
        let _reaped = self.child.wait();
    }
}

/// The rest of a program's standard input, and the pipe to it until all is written.
struct Feed {
    pipe: Option<ChildStdin>,
    bytes: Vec<u8>,
    written: usize,
}

impl Feed {
    fn new(pipe: Option<ChildStdin>, bytes: Vec<u8>) -> io::Result<Feed> {
        pipe.iter().try_for_each(make_nonblocking)?;
        Ok(Feed {
            pipe,
            bytes,
            written: 0,
        })
    }

    /// Writes as much as the program takes, and closes the pipe after the last byte.
    fn write(&mut self) -> io::Result<()> {
        while let Some(pipe) = &mut self.pipe {
            let rest = self.bytes.get(self.written..).unwrap_or_default();
            if rest.is_empty() {
                self.pipe = None;
                break;
            }
            match pipe.write(rest) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The program does not read the rest; its status and output show whether that is a
                // failure.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.pipe = None,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The output of a program on one stream.
pub(crate) struct Collected<'a> {
    /// The stream; `None` after its end.
    file: Option<File>,
    bytes: Vec<u8>,
    limit: usize,
    by_line: Option<&'a mut dyn FnMut(&str)>,
    /// The start of the line that is not complete yet.
    line: usize,
}

impl<'a> Collected<'a> {
    /// Collects at most `limit` bytes.
    pub(crate) fn new(stream: Option<OwnedFd>, limit: usize) -> Collected<'a> {
        Collected {
            file: stream.map(File::from),
            bytes: Vec::new(),
            limit,
            by_line: None,
            line: 0,
        }
    }

    /// Passes each line to `line` when it is complete, without white space at its end.
    pub(crate) fn by_line(mut self, line: &'a mut dyn FnMut(&str)) -> Collected<'a> {
        self.by_line = Some(line);
        self
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn make_nonblocking(&self) -> io::Result<()> {
        self.file.iter().try_for_each(make_nonblocking)
    }

    fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Reads the available output, up to one chunk after the limit.
    fn read(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        while let Some(file) = &mut self.file
            && self.bytes.len() <= self.limit
        {
            match file.read(&mut chunk) {
                Ok(0) => self.file = None,
                Ok(count) => self.append(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn append(&mut self, chunk: &[u8]) {
        self.bytes.extend_from_slice(chunk);
        let Some(by_line) = &mut self.by_line else { return };
        while let Some(length) = self.bytes[self.line..].iter().position(|byte| *byte == b'\n') {
            let end = self.line + length;
            by_line(String::from_utf8_lossy(&self.bytes[self.line..end]).trim_end());
            self.line = end + 1;
        }
    }

    /// Passes the last line to `line`, if it has no line break.
    fn finish_line(&mut self) {
        if let Some(by_line) = &mut self.by_line
            && self.line < self.bytes.len()
        {
            by_line(String::from_utf8_lossy(&self.bytes[self.line..]).trim_end());
        }
    }
}

fn make_nonblocking(file: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&file)?;
    Ok(fcntl_setfl(&file, flags | OFlags::NONBLOCK)?)
}
