//! What a hypervisor says on stderr, bounded, also when nobody listens.
//!
//! A file would grow as a guest pleases (some of QEMU's warnings can be provoked from inside), and
//! a pipe to this process would break with it. So it is a named pipe that the hypervisor itself
//! holds open at both ends, without blocking: it never breaks, holds 64 KiB at most (pipe(7)),
//! drops what does not fit, and whoever adopts the machine can open it again.

use crate::{Error, Result};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat, open};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use tokio::net::unix::pipe;

/// As much of the last that was said is kept.
const KEPT: usize = 64 << 10;

/// One read. As many as fill [`KEPT`] empty a full pipe.
const CHUNK: usize = 4 << 10;

/// The reading end, and what was read.
#[derive(Debug)]
pub(crate) struct Messages {
    pipe: pipe::Receiver,
    kept: Mutex<VecDeque<u8>>,
}

impl Messages {
    /// Makes the pipe and opens the end that the hypervisor gets.
    pub(crate) fn create(path: &Path) -> Result<File> {
        made(path)
    }

    /// Opens this process' end.
    pub(crate) fn open(path: &Path) -> Result<Messages> {
        // For writing too, or the first launch would see the end of file before the hypervisor's
        // first word.
        let pipe = pipe::Receiver::from_file(made(path)?).map_err(Error::io("open", path))?;
        Ok(Messages {
            pipe,
            kept: Mutex::default(),
        })
    }

    /// Takes in what is said, for ever. Dropping the future loses nothing.
    pub(crate) async fn listen(&self) {
        loop {
            if let Err(error) = self.pipe.readable().await {
                tracing::warn!(%error, "the hypervisor's messages can no longer be read");
                std::future::pending::<()>().await;
            }
            self.take_in();
            tokio::task::yield_now().await;
        }
    }

    /// All that was said and kept.
    pub(crate) fn text(&self) -> String {
        self.take_in();
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn take_in(&self) {
        let mut buffer = [0; CHUNK];
        // Bounded, for who writes may be as fast as who reads.
        for _ in 0..KEPT / CHUNK {
            match self.pipe.try_read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => self.keep(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return tracing::warn!(%error, "the hypervisor's messages can no longer be read"),
            }
        }
    }

    fn keep(&self, said: &[u8]) {
        tracing::debug!(said = %String::from_utf8_lossy(said), "the hypervisor");
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(said);
        let surplus = kept.len().saturating_sub(KEPT);
        kept.drain(..surplus);
    }
}

/// The pipe, made where it is missing, open at both ends. A link in its place is not followed.
fn made(path: &Path) -> Result<File> {
    match mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(Error::io("create", path)(error.into())),
    }
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(|error| Error::io("open", path)(error.into()))
}
