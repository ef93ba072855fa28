//! Reads a hypervisor's stderr, in bounded memory.
//!
//! A file could grow without limit (a guest can provoke some of QEMU's warnings), and a pipe to
//! this process would break when the process ends. So stderr is a named pipe that the hypervisor
//! itself holds open at both ends, in non-blocking mode. It never breaks, holds at most 64 KiB
//! (pipe(7)), drops data that does not fit, and can be reopened by a process that adopts the
//! machine.

use crate::error::{Error, Result};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat, open};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use tokio::net::unix::pipe;

/// Maximum size of the output that is kept: the newest bytes.
const MAX_KEPT_BYTES: usize = 64 << 10;

/// Size of one read. This many reads fit into [`MAX_KEPT_BYTES`] and empty a full pipe.
const READ_BYTES: usize = 4 << 10;

/// This process' end of the pipe, and the output read so far.
#[derive(Debug)]
pub(crate) struct StderrPipe {
    pipe: pipe::Receiver,
    kept: Mutex<VecDeque<u8>>,
}

impl StderrPipe {
    /// Creates the pipe and returns the hypervisor's end.
    pub(crate) fn create(path: &Path) -> Result<File> {
        open_or_create(path)
    }

    /// Opens this process' end.
    pub(crate) fn open(path: &Path) -> Result<StderrPipe> {
        // The pipe is opened for writing too: otherwise the first launch would read end-of-file
        // before the hypervisor's first output.
        let pipe = pipe::Receiver::from_file(open_or_create(path)?).map_err(Error::io("open", path))?;
        Ok(StderrPipe {
            pipe,
            kept: Mutex::default(),
        })
    }

    /// Reads output as it arrives. Never returns; dropping the future loses nothing.
    pub(crate) async fn read_forever(&self) {
        loop {
            if let Err(error) = self.pipe.readable().await {
                tracing::warn!(%error, "cannot read the hypervisor's stderr any more");
                std::future::pending::<()>().await;
            }
            self.read_available();
            tokio::task::yield_now().await;
        }
    }

    /// Returns all output that was kept.
    pub(crate) fn text(&self) -> String {
        self.read_available();
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn read_available(&self) {
        let mut buffer = [0; READ_BYTES];
        // The loop is bounded, because the writer may be as fast as the reader.
        for _ in 0..MAX_KEPT_BYTES / READ_BYTES {
            match self.pipe.try_read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => self.append(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return tracing::warn!(%error, "cannot read the hypervisor's stderr any more"),
            }
        }
    }

    fn append(&self, output: &[u8]) {
        tracing::debug!(output = %String::from_utf8_lossy(output), "hypervisor output");
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(output);
        let surplus = kept.len().saturating_sub(MAX_KEPT_BYTES);
        kept.drain(..surplus);
    }
}

/// Opens the pipe at both ends, and creates it if it is missing. Does not follow a symbolic link.
fn open_or_create(path: &Path) -> Result<File> {
    match mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(Error::io("create", path)(error.into())),
    }
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(|error| Error::io("open", path)(error.into()))
}
