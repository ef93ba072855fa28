//! What QEMU says on stderr, bounded, also when nobody listens.
//!
//! A file would grow as a guest pleases (some of QEMU's warnings can be provoked from inside), and a pipe to this process
//! would break with it. So it is a named pipe that QEMU itself holds open at both ends, without blocking: it never breaks,
//! holds 64 KiB at most (pipe(7)), drops what does not fit, and whoever adopts the machine can open it again.

use crate::{Error, Result};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use tokio::net::unix::pipe;

/// As much of the last that was said is kept.
const KEPT: usize = 64 << 10;

/// One read. As many as fill [`KEPT`] empty a full pipe.
const CHUNK: usize = 4 << 10;

/// `O_NONBLOCK`, in the type that the standard library takes.
const NONBLOCK: i32 = OFlags::NONBLOCK.bits() as i32;

/// The reading end, and what was read.
#[derive(Debug)]
pub(crate) struct Messages {
    pipe: pipe::Receiver,
    kept: Mutex<VecDeque<u8>>,
}

impl Messages {
    /// Makes the pipe and opens the end that QEMU gets.
    pub(crate) fn create(path: &Path) -> Result<File> {
        make(path)?;
        File::options()
            .read(true)
            .write(true)
            .custom_flags(NONBLOCK)
            .open(path)
            .map_err(Error::io("open", path))
    }

    /// Opens this process' end.
    pub(crate) fn open(path: &Path) -> Result<Messages> {
        make(path)?;
        // For writing too, or the first launch would see the end of file before QEMU's first word.
        let pipe = pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(path)
            .map_err(Error::io("open", path))?;
        Ok(Messages {
            pipe,
            kept: Mutex::default(),
        })
    }

    /// Takes in what is said, for ever. Dropping the future loses nothing.
    pub(crate) async fn listen(&self) {
        loop {
            if let Err(error) = self.pipe.readable().await {
                tracing::warn!(%error, "QEMU's messages can no longer be read");
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
                Err(error) => return tracing::warn!(%error, "QEMU's messages can no longer be read"),
            }
        }
    }

    fn keep(&self, said: &[u8]) {
        tracing::debug!(said = %String::from_utf8_lossy(said), "QEMU");
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(said);
        let surplus = kept.len().saturating_sub(KEPT);
        kept.drain(..surplus);
    }
}

fn make(path: &Path) -> Result<()> {
    match mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(Error::io("create", path)(error.into())),
    }
}
