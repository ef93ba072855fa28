//! Records a machine's console in a log of bounded size.
//!
//! QEMU offers the console on a socket and drops output while no client reads it, so the guest
//! never blocks on it. The process that holds the machine copies the socket to two files: the
//! current one, and the previous one (`….1`). A full current file replaces the previous one. While
//! no daemon runs, nothing is recorded.

use scalebox_units::Bytes;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
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
    Ok(printable(&tail[tail.len().saturating_sub(max)..]))
}

fn printable(bytes: &[u8]) -> String {
    let is_printable = |char: &char| !char.is_control() || matches!(char, '\n' | '\t');
    String::from_utf8_lossy(bytes).chars().filter(is_printable).collect()
}

/// Reads a console log piece by piece, also while it is written. Its text has the form of
/// [`console_tail`].
///
/// Output is missing if the log grows by more than [`CONSOLE_LIMIT`] between two reads.
pub struct ConsoleReader {
    log: PathBuf,
    /// The files that are not read to their end; the last one may be the current file.
    files: VecDeque<File>,
    /// The first bytes of a character whose rest was not read.
    partial: Vec<u8>,
}

impl ConsoleReader {
    /// Returns a reader that begins `tail` bytes before the end of the log, which may be missing.
    /// Blocks.
    ///
    /// # Errors
    /// I/O errors, except for missing files.
    pub fn open(log: &Path, tail: u64) -> io::Result<ConsoleReader> {
        let mut reader = ConsoleReader {
            log: log.to_owned(),
            files: VecDeque::new(),
            partial: Vec::new(),
        };
        let mut left = tail;
        for name in [log.to_owned(), previous(log)] {
            let Some(mut file) = open_if_exists(&name)? else {
                continue;
            };
            let length = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(length.saturating_sub(left)))?;
            left = left.saturating_sub(length);
            reader.files.push_front(file);
        }
        Ok(reader)
    }

    /// Returns the next piece; empty if there is none yet. Blocks.
    ///
    /// # Errors
    /// I/O errors.
    pub fn read(&mut self) -> io::Result<String> {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            // Checked before the read, so that text that is written before a replacement is not
            // missed.
            let was_replaced = self.current_is_missing()?;
            let Some(file) = self.files.front_mut() else {
                return Ok(String::new());
            };
            let read = file.read(&mut buffer)?;
            if read > 0 {
                let text = self.text(&buffer[..read]);
                if !text.is_empty() {
                    return Ok(text);
                }
            } else if self.files.len() > 1 || was_replaced {
                self.files.pop_front();
            } else {
                return Ok(String::new());
            }
        }
    }

    /// Returns whether the current log file is not open. Opens it if no file is open.
    fn current_is_missing(&mut self) -> io::Result<bool> {
        let Some(last) = self.files.back() else {
            self.files.extend(open_if_exists(&self.log)?);
            return Ok(false);
        };
        let (last, current) = (last.metadata()?, fs::metadata(&self.log));
        match current {
            Ok(current) => Ok((current.ino(), current.dev()) != (last.ino(), last.dev())),
            // Between the two steps of a replacement, or removed with its VM.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn text(&mut self, bytes: &[u8]) -> String {
        self.partial.extend_from_slice(bytes);
        let incomplete = match std::str::from_utf8(&self.partial) {
            Err(error) if error.error_len().is_none() => self.partial.len() - error.valid_up_to(),
            _ => 0,
        };
        let rest = self.partial.split_off(self.partial.len() - incomplete);
        let whole = std::mem::replace(&mut self.partial, rest);
        printable(&whole)
    }
}

fn open_if_exists(file: &Path) -> io::Result<Option<File>> {
    match File::open(file) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
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
    fn read_all(reader: &mut ConsoleReader) -> String {
        let mut all = String::new();
        loop {
            match reader.read().unwrap() {
                text if text.is_empty() => return all,
                text => all.push_str(&text),
            }
        }
    }

    #[test]
    fn a_reader_follows_the_log_across_replacements() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut log = ConsoleLog {
            path: path.clone(),
            failed: false,
        };
        let mut reader = ConsoleReader::open(&path, 100).unwrap();
        assert_eq!(read_all(&mut reader), "");
        let (mut written, mut seen) = (String::new(), String::new());
        for number in 0..60_000 {
            let line = format!("line {number} ö\n");
            log.append(line.as_bytes());
            written.push_str(&line);
            if number % 500 == 0 {
                seen.push_str(&read_all(&mut reader));
            }
        }
        seen.push_str(&read_all(&mut reader));
        assert!(seen == written, "{} of {} bytes", seen.len(), written.len());
        let mut late = ConsoleReader::open(&path, 14).unwrap();
        assert_eq!(read_all(&mut late), "line 59999 ö\n");
        let mut whole = ConsoleReader::open(&path, CONSOLE_LIMIT.as_u64()).unwrap();
        let all = read_all(&mut whole);
        assert!(written.ends_with(&all) && all.len() as u64 > CONSOLE_LIMIT.as_u64() / 2);
    }

    #[test]
    fn characters_are_not_torn_between_two_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut reader = ConsoleReader::open(&path, 0).unwrap();
        fs::write(&path, b"a\xc3").unwrap();
        assert_eq!(read_all(&mut reader), "a");
        File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"\xb6\x1b\r\n")
            .unwrap();
        assert_eq!(read_all(&mut reader), "ö\n");
    }
}
