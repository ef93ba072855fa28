//! The console's log: bounded whatever the guest prints.
//!
//! QEMU offers the console on a socket and drops what nobody reads, so the guest never waits for
//! it. Whoever holds the machine reads the socket into two files: the current one, and the one
//! before it (`….1`). When the current one is full it takes the place of the older. Between two
//! daemons nothing is recorded.

use scalebox_units::Bytes;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The most that one machine's console takes on the host: two files of half of it.
pub const CONSOLE_LIMIT: Bytes = Bytes::from_mib(1);

const FILE_LIMIT: u64 = CONSOLE_LIMIT.as_u64() / 2;

/// One read of the socket.
const CHUNK: usize = 16 << 10;

/// The last `most` bytes of a console, as text for people: what is not UTF-8 is replaced, and
/// control characters other than line feed and tab are left out, so that a guest cannot drive the
/// terminal of who reads it. Empty when there is no log.
///
/// # Errors
/// What the file system says, other than that the files are missing.
pub fn console_tail(log: &Path, most: Bytes) -> io::Result<String> {
    let mut tail = Vec::new();
    for file in [older(log), log.to_owned()] {
        match fs::read(file) {
            Ok(text) => tail.extend(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let most = usize::try_from(most.as_u64()).unwrap_or(usize::MAX);
    let tail = &tail[tail.len().saturating_sub(most)..];
    let shown = |char: &char| !char.is_control() || matches!(char, '\n' | '\t');
    Ok(String::from_utf8_lossy(tail).chars().filter(shown).collect())
}

/// Reads a console into its log until the machine has ended.
pub(crate) async fn drain(mut console: impl AsyncRead + Unpin, log: PathBuf) {
    let mut log = ConsoleLog {
        path: log,
        failed: false,
    };
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = match console.read(&mut buffer).await {
            Ok(0) => return,
            Ok(read) => read,
            Err(error) => {
                // The machine's end may come as a reset connection.
                tracing::debug!(%error, log = %log.path.display(), "console closed");
                return;
            }
        };
        // A disk may keep a write waiting; the other machines' sockets must not wait with it.
        let written = tokio::task::spawn_blocking(move || {
            log.append(&buffer[..read]);
            (log, buffer)
        });
        match written.await {
            Ok(back) => (log, buffer) = back,
            Err(error) => return tracing::warn!(%error, "console no longer recorded"),
        }
    }
}

struct ConsoleLog {
    path: PathBuf,
    /// Whether the last write failed, so that a full disk is reported once and not for every line.
    failed: bool,
}

impl ConsoleLog {
    /// Never stops the draining: what cannot be written is lost.
    fn append(&mut self, text: &[u8]) {
        let result = self.try_append(text);
        if let (Err(error), false) = (&result, self.failed) {
            tracing::warn!(log = %self.path.display(), %error, "console output lost");
        }
        self.failed = result.is_err();
    }

    /// Opened anew each time: the log may have been removed or moved by an operator. A chunk is far
    /// smaller than a file.
    fn try_append(&self, text: &[u8]) -> io::Result<()> {
        let mut file = self.open()?;
        let length = file.seek(SeekFrom::End(0))?;
        if length + text.len() as u64 > FILE_LIMIT {
            fs::rename(&self.path, older(&self.path))?;
            file = self.open()?;
        }
        file.write_all(text)
    }

    fn open(&self) -> io::Result<File> {
        File::options().append(true).create(true).mode(0o600).open(&self.path)
    }
}

fn older(log: &Path) -> PathBuf {
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
    fn the_log_is_bounded_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut log = ConsoleLog {
            path: path.clone(),
            failed: false,
        };
        for number in 0..200_000 {
            log.append(format!("line {number}\n").as_bytes());
        }
        let total = size(&path) + size(&older(&path));
        assert!(
            total <= CONSOLE_LIMIT.as_u64() && total > CONSOLE_LIMIT.as_u64() / 2 - 100,
            "{total}"
        );
        let tail = console_tail(&path, Bytes::new(24)).unwrap();
        assert_eq!(tail, "line 199998\nline 199999\n");
    }

    #[test]
    fn a_tail_reaches_into_the_older_part_and_holds_no_control_sequences() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        assert_eq!(console_tail(&path, Bytes::from_kib(1)).unwrap(), "");
        fs::write(older(&path), "old\r\n").unwrap();
        fs::write(&path, b"\x1b[31mred\xff\tnew\n").unwrap();
        assert_eq!(
            console_tail(&path, Bytes::from_kib(1)).unwrap(),
            "old\n[31mred\u{fffd}\tnew\n"
        );
    }
}
