//! Ends a run from outside: a waiter on another thread, such as an async task, may give up.

use std::io::{self, PipeReader, PipeWriter};

/// Kills a run when it is dropped. See [`Run::stoppable`](crate::Run::stoppable).
#[derive(Debug)]
#[must_use = "a dropped Stop kills the run at once"]
pub struct Stop {
    /// Closed on drop, which the thread that waits for the program notices.
    _open: PipeWriter,
}

impl Stop {
    /// Returns the handle, and the end of a pipe that hangs up when the handle is dropped.
    pub(crate) fn new() -> io::Result<(Stop, PipeReader)> {
        let (reader, writer) = io::pipe()?;
        Ok((Stop { _open: writer }, reader))
    }
}
