//! Kills a run from another thread, such as an async task that no longer waits for it.

use std::io::{self, PipeReader, PipeWriter};

/// Kills a run when it is dropped. See [`Run::stoppable`](crate::Run::stoppable).
#[derive(Debug)]
#[must_use = "a dropped Stop kills the run at once"]
pub struct Stop {
    /// The write end of a pipe. The thread that waits for the program detects that it is closed.
    _open: PipeWriter,
}

impl Stop {
    /// Returns the handle, and the read end of a pipe that is closed when the handle is dropped.
    pub(crate) fn new() -> io::Result<(Stop, PipeReader)> {
        let (reader, writer) = io::pipe()?;
        Ok((Stop { _open: writer }, reader))
    }
}
