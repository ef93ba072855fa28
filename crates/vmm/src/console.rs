//! Records a machine's console in a log of bounded size.
//!
//! QEMU offers the console on a socket and drops output while no client reads it, so the guest
//! never blocks on it. The process that holds the machine copies the socket to two files: the
//! current one, and the previous one (`….1`). A full current file replaces the previous one. While
//! no daemon runs, nothing is recorded.

use scalebox_units::Bytes;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Maximum disk space of one machine's console log: two files of half this size.
pub const CONSOLE_LIMIT: Bytes = Bytes::from_mib(1);

const MAX_FILE_BYTES: u64 = CONSOLE_LIMIT.as_u64() / 2;

/// Size of the read buffer.
const READ_BYTES: usize = 16 << 10;

/// Returns the last `max` bytes of a console log as text. Invalid UTF-8 is replaced, and control
/// characters except line feed and tab are removed, so that a guest cannot send sequences to the
/// reader's terminal. Returns an empty string if there is no log.
///
/// # Errors
/// I/O errors, except for missing files.
pub fn console_tail(log: &Path, max: Bytes) -> io::Result<String> {
    let mut tail = Vec::new();
    for file in [previous(log), log.to_owned()] {
        match fs::read(file) {
            Ok(text) => tail.extend(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let max = usize::try_from(max.as_u64()).unwrap_or(usize::MAX);
    let tail = &tail[tail.len().saturating_sub(max)..];
    let printable = |char: &char| !char.is_control() || matches!(char, '\n' | '\t');
    Ok(String::from_utf8_lossy(tail).chars().filter(printable).collect())
}

/// Copies a console to its log until the machine has ended.
pub(crate) async fn drain(mut console: impl AsyncRead + Unpin, log: PathBuf) {
    let mut log = ConsoleLog {
        path: log,
        failed: false,
    };
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = match console.read(&mut buffer).await {
            Ok(0) => return,
            Ok(read) => read,
            Err(error) => {
                // The end of the machine may appear as a reset connection.
                tracing::debug!(%error, log = %log.path.display(), "console closed");
                return;
            }
        };
        // Writing is a blocking task: a slow disk must not delay the consoles of other machines.
        let written = tokio::task::spawn_blocking(move || {
            log.append(&buffer[..read]);
            (log, buffer)
        });
        match written.await {
            Ok(back) => (log, buffer) = back,
            Err(error) => return tracing::warn!(%error, "the console is no longer recorded"),
        }
    }
}

struct ConsoleLog {
    path: PathBuf,
    /// `true` if the last write failed: a full disk is logged once, not for every line.
    failed: bool,
}

impl ConsoleLog {
    /// Appends output to the log. Output that cannot be written is lost; reading continues.
    fn append(&mut self, text: &[u8]) {
        let result = self.try_append(text);
        if let (Err(error), false) = (&result, self.failed) {
            tracing::warn!(log = %self.path.display(), %error, "console output lost");
        }
        self.failed = result.is_err();
    }

    /// Reopens the file each time, because an operator may have removed or moved it. A chunk is far
    /// smaller than a file.
    fn try_append(&self, text: &[u8]) -> io::Result<()> {
        let mut file = self.open()?;
        let length = file.seek(SeekFrom::End(0))?;
        if length + text.len() as u64 > MAX_FILE_BYTES {
            fs::rename(&self.path, previous(&self.path))?;
            file = self.open()?;
        }
        file.write_all(text)
    }

    fn open(&self) -> io::Result<File> {
        File::options().append(true).create(true).mode(0o600).open(&self.path)
    }
}

fn previous(log: &Path) -> PathBuf {
    let mut name = OsString::from(log);
    name.push(".1");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(file: &Path) -> u64 {
        file.metadata().map_or(0, |meta| meta.len())
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest_output() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut log = ConsoleLog {
            path: path.clone(),
            failed: false,
        };
        for number in 0..200_000 {
            log.append(format!("line {number}\n").as_bytes());
        }
        let total = size(&path) + size(&previous(&path));
        assert!(
            total <= CONSOLE_LIMIT.as_u64() && total > CONSOLE_LIMIT.as_u64() / 2 - 100,
            "{total}"
        );
        let tail = console_tail(&path, Bytes::new(24)).unwrap();
        assert_eq!(tail, "line 199998\nline 199999\n");
    }

    #[test]
    fn the_tail_spans_both_files_and_has_no_control_characters() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        assert_eq!(console_tail(&path, Bytes::from_kib(1)).unwrap(), "");
        fs::write(previous(&path), "old\r\n").unwrap();
        fs::write(&path, b"\x1b[31mred\xff\tnew\n").unwrap();
        assert_eq!(
            console_tail(&path, Bytes::from_kib(1)).unwrap(),
            "old\n[31mred\u{fffd}\tnew\n"
        );
    }
}
