//! Copies the output of a command to its buffer.

use crate::exec::ring::{PIECE, Stream};
use crate::exec::table::{Exec, Fd};
use std::io;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// Time to read the output of a main process that has ended, while other processes hold the pipe
/// open.
const GRACE: Duration = Duration::from_millis(200);

/// Copies until the stream ends, or until the main process has ended and its output was read.
/// Returns `true` if the stream is still open, held by other processes.
pub(crate) async fn copy(exec: &Exec, source: &Fd, stream: Stream) -> bool {
    let mut grace: Option<Grace> = None;
    loop {
        tokio::task::consume_budget().await;
        if grace.is_none() && !exec.is_running() {
            grace = Some(Grace::new(source));
        }
        let deadline = grace.as_ref().map(|grace| grace.deadline);
        let ready = tokio::select! {
            biased;
            ready = source.readable() => ready,
            () = exec.exited(), if deadline.is_none() => continue,
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => return true,
        };
        let Ok(mut ready) = ready else {
            return false;
        };
        let waits_since = Instant::now();
        exec.output.room().await;
        let mut piece = [0; PIECE];
        let read = ready.try_io(|fd| Ok(rustix::io::read(fd, &mut piece)?));
        match read {
            // A terminal that no process has open fails with EIO.
            Ok(Ok(0) | Err(_)) => return false,
            Ok(Ok(length)) => {
                exec.output.push(stream, &piece[..length]);
                if grace.as_mut().is_some_and(|grace| grace.is_over(length, waits_since)) {
                    return true;
                }
            }
            Err(_would_block) => {}
        }
    }
}

/// Decides when the output of a main process that has ended is complete.
///
/// By then, the pipe holds all of it. The output is complete at the end of the pipe, when no more
/// bytes arrive, or, if other processes continue to write, when as many bytes were read as the pipe
/// can hold.
struct Grace {
    deadline: Instant,
    /// Number of bytes that the main process may have left.
    left: usize,
}

impl Grace {
    fn new(source: &Fd) -> Grace {
        // A terminal holds less.
        let left = rustix::pipe::fcntl_getpipe_size(source.get_ref()).unwrap_or(64 << 10);
        Grace {
            deadline: Instant::now() + GRACE,
            left,
        }
    }

    /// Counts bytes that were read, and returns whether the output is complete. The time since
    /// `waits_since`, spent waiting for the reader, does not count.
    fn is_over(&mut self, length: usize, waits_since: Instant) -> bool {
        self.deadline += waits_since.elapsed();
        self.left = self.left.saturating_sub(length);
        self.left == 0 && Instant::now() >= self.deadline
    }
}

/// Reads and drops the output of processes that outlive their exec. If the agent closed the pipe,
/// `SIGPIPE` would kill them.
pub(crate) async fn drain(source: &Fd) {
    while let Ok(mut ready) = source.readable().await {
        tokio::task::consume_budget().await;
        let mut piece = [0; PIECE];
        let read: Result<io::Result<usize>, _> = ready.try_io(|fd| Ok(rustix::io::read(fd, &mut piece)?));
        if let Ok(Ok(0) | Err(_)) = read {
            return;
        }
    }
}
