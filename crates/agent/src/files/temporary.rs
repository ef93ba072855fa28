//! Files that become visible when they are complete.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, fsync, openat, renameat, unlinkat};
use rustix::io::{self, Errno};
use rustix::rand::{GetRandomFlags, getrandom};
use std::ffi::OsStr;
use std::fmt::Write;
use std::sync::Arc;

/// Number of random names that are tried.
const MAX_TRIES: usize = 16;

/// A new file under a temporary name. It is removed unless it is published.
pub(crate) struct Temporary {
    folder: Arc<OwnedFd>,
    name: String,
    file: OwnedFd,
    is_published: bool,
}

impl Temporary {
    /// Makes an empty file in a folder; only root may open it.
    pub(crate) fn create(folder: Arc<OwnedFd>) -> io::Result<Temporary> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for _ in 0..MAX_TRIES {
            let name = random_name()?;
            match openat(&folder, &name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => {
                    return Ok(Temporary {
                        folder,
                        name,
                        file,
                        is_published: false,
                    });
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::EXIST)
    }

    /// Appends bytes.
    pub(crate) fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = io::retry_on_intr(|| rustix::io::write(&self.file, bytes))?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Flushes the content.
    pub(crate) fn flush(&self) -> io::Result<()> {
        fsync(&self.file)
    }

    /// Gives the file its name, and replaces the file that had it.
    pub(crate) fn publish(mut self, name: &OsStr) -> io::Result<()> {
        renameat(&self.folder, &self.name, &self.folder, name)?;
        self.is_published = true;
        Ok(())
    }

    /// Returns the folder of the file.
    pub(crate) fn folder(&self) -> &Arc<OwnedFd> {
        &self.folder
    }
}

impl AsFd for Temporary {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.is_published {
            // The file may have been removed by others.
            let _ = unlinkat(&self.folder, &self.name, AtFlags::empty());
        }
    }
}

fn random_name() -> io::Result<String> {
    let mut random = [0; 8];
    getrandom(&mut random, GetRandomFlags::empty())?;
    let mut name = ".scalebox-".to_owned();
    for byte in random {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    Ok(name)
}
