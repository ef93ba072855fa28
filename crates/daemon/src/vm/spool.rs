//! Keeps the output of a command, in memory if it is short and otherwise in an unnamed file.

use bytes::{Bytes, BytesMut};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Maximum number of bytes that are kept of one stream.
pub(crate) const MAX_KEPT: usize = 1 << 20;
/// Maximum number of bytes of one stream that are kept in memory.
const MAX_IN_MEMORY: usize = 64 << 10;
/// Size of the pieces in which a file is read. A multiple of 3, for base64.
const PIECE: usize = 12 << 10;

/// The beginning of one stream of output.
pub(crate) struct Spool {
    /// The folder of the file.
    folder: PathBuf,
    memory: Vec<u8>,
    file: Option<File>,
    kept: usize,
    /// Limit on `kept`.
    limit: usize,
    truncated: bool,
    text: TextCheck,
}

impl Spool {
    /// Creates an empty spool. A long stream is kept in a file in `folder`.
    pub(crate) fn new(folder: &Path) -> Spool {
        Spool {
            folder: folder.to_owned(),
            memory: Vec::new(),
            file: None,
            kept: 0,
            limit: MAX_KEPT,
            truncated: false,
            text: TextCheck::default(),
        }
    }

    /// Adds bytes, and drops bytes over [`MAX_KEPT`]. Returns the bytes that must be
    /// [written](Spool::write) to the file next.
    #[must_use = "the bytes are not kept before they are written"]
    pub(crate) fn push(&mut self, mut bytes: Vec<u8>) -> Option<Vec<u8>> {
        let space = self.limit - self.kept;
        if bytes.len() > space {
            bytes.truncate(space);
            self.truncated = true;
        }
        self.kept += bytes.len();
        self.text.push(&bytes);
        if self.file.is_none() && self.kept <= MAX_IN_MEMORY {
            self.memory.extend_from_slice(&bytes);
            return None;
        }
        (!bytes.is_empty()).then_some(bytes)
    }

    /// Returns whether output was dropped.
    pub(crate) fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Returns whether the content is UTF-8. The last character may be cut off if output was
    /// dropped.
    pub(crate) fn is_text(&self) -> bool {
        self.text.is_valid && (self.truncated || self.text.partial.is_empty())
    }

    /// Returns a reader of the content. It does not block for content in memory.
    pub(crate) fn into_pieces(self) -> Pieces {
        // A character that is cut off is left out of a text.
        let cut = if self.is_text() { self.text.partial.len() } else { 0 };
        Pieces {
            memory: self.memory.into(),
            file: self.file,
            left: self.kept - cut,
            started: false,
        }
    }
}

impl Spool {
    /// Writes pushed bytes to the file. Blocks. If the file cannot be written, the rest of the
    /// stream is dropped, as if it were too long.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        if let Err(error) = self.try_write(bytes) {
            tracing::warn!(%error, folder = %self.folder.display(), "cannot keep the output of a command; the response is truncated");
            self.kept = self.kept.saturating_sub(bytes.len());
            self.limit = self.kept;
            self.truncated = true;
            // The last of the checked bytes are not kept.
            self.text = TextCheck {
                is_valid: false,
                partial: Vec::new(),
            };
        }
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            let mut file = tempfile::tempfile_in(&self.folder)?;
            file.write_all(&self.memory)?;
            self.memory = Vec::new();
            self.file = Some(file);
        }
        match &mut self.file {
            Some(file) => file.write_all(bytes),
            None => Ok(()),
        }
    }
}

/// The content of a spool, piece by piece.
pub(crate) struct Pieces {
    memory: Bytes,
    file: Option<File>,
    left: usize,
    started: bool,
}

impl Pieces {
    /// Returns whether reading blocks.
    pub(crate) fn blocks(&self) -> bool {
        self.file.is_some()
    }

    /// Returns the next piece; empty at the end. All but the last have a multiple of 3 bytes.
    pub(crate) fn next(&mut self) -> io::Result<Bytes> {
        let length = PIECE.min(self.left);
        let Some(file) = &mut self.file else {
            self.left -= length;
            return Ok(self.memory.split_to(length.min(self.memory.len())));
        };
        if !self.started {
            file.seek(SeekFrom::Start(0))?;
            self.started = true;
        }
        let mut piece = BytesMut::zeroed(length);
        file.read_exact(&mut piece)?;
        self.left -= length;
        Ok(piece.freeze())
    }
}

/// Checks whether a stream is UTF-8, without keeping it.
struct TextCheck {
    is_valid: bool,
    /// The first bytes of a character whose rest has not arrived.
    partial: Vec<u8>,
}

impl Default for TextCheck {
    fn default() -> TextCheck {
        TextCheck {
            is_valid: true,
            partial: Vec::new(),
        }
    }
}

impl TextCheck {
    fn push(&mut self, mut bytes: &[u8]) {
        // Completes the character that was cut off.
        while self.is_valid && !self.partial.is_empty() && !bytes.is_empty() {
            self.partial.push(bytes[0]);
            bytes = &bytes[1..];
            match std::str::from_utf8(&self.partial) {
                Ok(_) => self.partial.clear(),
                Err(error) => self.is_valid = error.error_len().is_none(),
            }
        }
        if !self.is_valid || bytes.is_empty() {
            return;
        }
        if let Err(error) = std::str::from_utf8(bytes) {
            self.is_valid = error.error_len().is_none();
            self.partial = bytes[error.valid_up_to()..].to_vec();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spooled(pieces: impl IntoIterator<Item = Vec<u8>>) -> Spool {
        let mut spool = Spool::new(Path::new("/tmp"));
        for piece in pieces {
            if let Some(bytes) = spool.push(piece) {
                spool.write(&bytes);
            }
        }
        spool
    }

    fn content(spool: Spool) -> Vec<u8> {
        let (mut pieces, mut content) = (spool.into_pieces(), Vec::new());
        loop {
            let piece = pieces.next().unwrap();
            if piece.is_empty() {
                return content;
            }
            content.extend_from_slice(&piece);
        }
    }

    #[test]
    fn short_output_stays_in_memory_and_long_output_does_not() {
        let short = spooled([b"a".to_vec(), b"b".to_vec()]);
        assert!(short.file.is_none() && !short.is_truncated());
        assert_eq!(content(short), b"ab");
        let long: Vec<Vec<u8>> = (0..100_u8).map(|byte| vec![byte; 5000]).collect();
        let spool = spooled(long.clone());
        assert!(spool.file.is_some() && spool.memory.capacity() == 0 && !spool.is_truncated());
        assert_eq!(content(spool), long.concat());
        assert_eq!(content(spooled([])), b"");
    }

    #[test]
    fn output_over_the_limit_is_dropped() {
        let spool = spooled((0..40).map(|_| vec![b'x'; 50_000]));
        assert!(spool.is_truncated() && spool.is_text());
        assert_eq!(content(spool).len(), MAX_KEPT);
        let exact = spooled([vec![b'x'; MAX_KEPT]]);
        assert!(!exact.is_truncated());
    }

    #[test]
    fn text_is_recognized_across_pieces() {
        let word = "aö€😀".repeat(20_000);
        for piece in [1, 2, 3, 5, 7, 1000] {
            let spool = spooled(word.as_bytes().chunks(piece).map(<[u8]>::to_vec));
            assert!(spool.is_text(), "{piece}");
            assert_eq!(content(spool), word.as_bytes());
        }
        for bytes in [&b"\xff"[..], b"a\xc3", b"\xe2\x28\xa1", b"\xc3\xc3"] {
            assert!(!spooled([bytes.to_vec()]).is_text(), "{bytes:?}");
            assert!(!spooled(bytes.chunks(1).map(<[u8]>::to_vec)).is_text(), "{bytes:?}");
        }
        // The limit cuts a character: the character is omitted, and the rest is still text.
        let spool = spooled([vec![b'x'; MAX_KEPT - 1], "€".as_bytes().to_vec()]);
        assert!(spool.is_text() && spool.is_truncated());
        assert_eq!(content(spool), vec![b'x'; MAX_KEPT - 1]);
    }
}
