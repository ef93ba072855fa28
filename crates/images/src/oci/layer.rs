//! Reads a layer: decompresses it within limits, and parses the tar inside.
//!
//! Like container engines, it recognises the compression by the first bytes, not by the manifest.
//! It keeps only the header of one entry in memory, at most 1 MiB.

use crate::oci::digest::{Digest, Hasher};
use crate::oci::error::{OciError, quoted};
use crate::oci::task::Task;
use flate2::bufread::MultiGzDecoder;
use std::io::{self, BufRead, BufReader, Read};
use tar_core::EntryType;
use tar_core::parse::{Limits as TarLimits, ParseEvent, ParsedEntry, Parser};

/// Size of the buffers, in bytes.
const CHUNK: usize = 128 << 10;
/// Maximum size of the headers of one entry, in bytes: names, and extended attributes.
const MAX_HEADERS: u32 = 1 << 20;
/// Maximum length of a path or a link target, in bytes (PATH_MAX).
pub(crate) const MAX_PATH: usize = 4096;
/// The ratio of a layer is checked from this uncompressed size on, in bytes.
const RATIO_FROM: u64 = 64 << 20;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The first bytes of a skippable frame of zstd, except the lower half of the first byte.
const ZSTD_SKIPPABLE: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];

/// Counts the bytes that pass.
struct Counted<R> {
    inner: R,
    bytes: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes += count as u64;
        Ok(count)
    }
}

type Source<'a> = BufReader<Counted<Box<dyn Read + 'a>>>;

enum Decoder<'a> {
    Plain(Source<'a>),
    Gzip(Box<MultiGzDecoder<Source<'a>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, Source<'a>>>),
}

impl<'a> Decoder<'a> {
    fn of(mut source: Source<'a>) -> io::Result<Decoder<'a>> {
        let head = source.fill_buf()?;
        if head.starts_with(&GZIP) {
            return Ok(Decoder::Gzip(Box::new(MultiGzDecoder::new(source))));
        }
        let skippable = |head: &[u8; 4]| [head[0] & 0xf0, head[1], head[2], head[3]] == ZSTD_SKIPPABLE;
        if head.starts_with(&ZSTD) || head.first_chunk().is_some_and(skippable) {
            return zstd::stream::read::Decoder::with_buffer(source).map(|decoder| Decoder::Zstd(Box::new(decoder)));
        }
        Ok(Decoder::Plain(source))
    }

    fn stored(&self) -> u64 {
        match self {
            Decoder::Plain(source) => source.get_ref().bytes,
            Decoder::Gzip(decoder) => decoder.get_ref().get_ref().bytes,
            Decoder::Zstd(decoder) => decoder.get_ref().get_ref().bytes,
        }
    }
}

impl Read for Decoder<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Decoder::Plain(source) => source.read(buffer),
            Decoder::Gzip(decoder) => decoder.read(buffer),
            Decoder::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// A layer that is being read.
pub(crate) struct Layer<'a> {
    /// Its number, for messages; the first is 1.
    pub(crate) number: usize,
    task: &'a Task,
    decoder: Decoder<'a>,
    parser: Parser,
    /// Uncompressed bytes that are read and not yet used: `buffer[used..]`.
    buffer: Vec<u8>,
    used: usize,
    /// Bytes of the present entry that are not yet read: content, and padding after it.
    content: u64,
    padding: u64,
    hasher: Hasher,
    /// The uncompressed bytes of this layer, and the number that the image may still have.
    unpacked: u64,
    max_unpacked: u64,
}

impl<'a> Layer<'a> {
    /// Begins with layer `number`, which may have at most `max_unpacked` bytes uncompressed.
    pub(crate) fn new(
        number: usize,
        stored: Box<dyn Read + 'a>,
        task: &'a Task,
        max_unpacked: u64,
    ) -> Result<Layer<'a>, OciError> {
        let counted = Counted {
            inner: stored,
            bytes: 0,
        };
        let decoder = Decoder::of(BufReader::with_capacity(CHUNK, counted));
        let mut limits = TarLimits::new();
        limits.max_metadata_size = MAX_HEADERS;
        let mut parser = Parser::new(limits);
        parser.set_allow_empty_path(true);
        Ok(Layer {
            number,
            task,
            decoder: decoder.map_err(|error| OciError::layer(number, error))?,
            parser,
            buffer: Vec::with_capacity(CHUNK),
            used: 0,
            content: 0,
            padding: 0,
            hasher: Hasher::new(),
            unpacked: 0,
            max_unpacked,
        })
    }

    /// Returns the number of bytes of the compressed layer that were read.
    pub(crate) fn stored(&self) -> u64 {
        self.decoder.stored()
    }

    /// Returns the number of uncompressed bytes so far.
    pub(crate) fn unpacked(&self) -> u64 {
        self.unpacked
    }

    /// Returns the offset of the next byte of content in the uncompressed layer.
    pub(crate) fn position(&self) -> u64 {
        self.unpacked - (self.buffer.len() - self.used) as u64
    }

    /// Returns the next entry; `None` at the end. Skips the rest of the present one.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, OciError> {
        while self.content > 0 {
            let there = self.available()?;
            self.advance(there);
        }
        while self.padding > 0 {
            if self.used == self.buffer.len() {
                self.fill()?;
            }
            let skipped = self.padding.min((self.buffer.len() - self.used) as u64);
            self.used += skipped as usize;
            self.padding -= skipped;
        }
        loop {
            let input = self.buffer.get(self.used..).unwrap_or_default();
            let parsed = self.parser.parse(input);
            let event = parsed.map_err(|error| OciError::layer(self.number, quoted(error.to_string().as_bytes())))?;
            match event {
                ParseEvent::NeedData { min_bytes } => {
                    // Some programs omit the blocks of zeros that end an archive.
                    if !self.fill_to(min_bytes)? {
                        return Ok(None);
                    }
                }
                ParseEvent::GlobalExtensions { consumed, .. } => self.used += consumed,
                ParseEvent::SparseEntry { entry, .. } => {
                    return Err(OciError::Kind {
                        layer: self.number,
                        path: quoted(&entry.path),
                        kind: "a file in the sparse format of GNU tar",
                    });
                }
                ParseEvent::Entry { consumed, entry } => {
                    let (entry, size) = (Entry::of(&entry), entry.size);
                    self.used += consumed;
                    self.content = size;
                    self.padding = size.next_multiple_of(512) - size;
                    return Ok(Some(entry));
                }
                ParseEvent::End { .. } => return Ok(None),
            }
        }
    }

    /// Returns the next part of the content of the present entry; empty at its end.
    pub(crate) fn chunk(&mut self) -> Result<&[u8], OciError> {
        if self.content == 0 {
            return Ok(&[]);
        }
        let there = self.available()?;
        let start = self.used;
        self.advance(there);
        Ok(self.buffer.get(start..start + there).unwrap_or_default())
    }

    /// Reads to the end, and returns the digest of the uncompressed layer.
    pub(crate) fn finish(mut self) -> Result<Digest, OciError> {
        self.used = self.buffer.len();
        while self.read_more()? > 0 {
            self.used = self.buffer.len();
        }
        Ok(self.hasher.finish())
    }

    /// Returns how many bytes of the content are in the buffer; at least one.
    fn available(&mut self) -> Result<usize, OciError> {
        if self.used == self.buffer.len() {
            self.fill()?;
        }
        Ok(self.content.min((self.buffer.len() - self.used) as u64) as usize)
    }

    fn advance(&mut self, bytes: usize) {
        self.used += bytes;
        self.content -= bytes as u64;
    }

    fn fill(&mut self) -> Result<(), OciError> {
        match self.read_more()? {
            0 => Err(OciError::layer(self.number, "it ends in the middle of an entry")),
            _ => Ok(()),
        }
    }

    /// Reads until the buffer has `bytes` unused bytes. Returns `false` at a clean end.
    fn fill_to(&mut self, bytes: usize) -> Result<bool, OciError> {
        while self.buffer.len() - self.used < bytes {
            if self.read_more()? == 0 {
                // Some programs end an archive with a single block of zeros.
                if self.buffer.iter().all(|byte| *byte == 0) {
                    return Ok(false);
                }
                return Err(OciError::layer(self.number, "it ends in the middle of a header"));
            }
        }
        Ok(true)
    }

    /// Appends uncompressed bytes to the buffer, after removing the used ones.
    fn read_more(&mut self) -> Result<usize, OciError> {
        self.task.check()?;
        self.buffer.drain(..self.used);
        self.used = 0;
        let old = self.buffer.len();
        self.buffer.resize(old + CHUNK, 0);
        let count = loop {
            match self.decoder.read(&mut self.buffer[old..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(OciError::layer(self.number, error)),
                Ok(count) => break count,
            }
        };
        self.buffer.truncate(old + count);
        self.hasher.update(&self.buffer[old..]);
        self.unpacked += count as u64;
        self.check_size()?;
        Ok(count)
    }

    fn check_size(&self) -> Result<(), OciError> {
        let limits = &self.task.limits;
        if self.unpacked > self.max_unpacked {
            return Err(OciError::TooLarge {
                what: "the unpacked image".to_owned(),
                limit: limits.max_unpacked,
            });
        }
        if self.unpacked > RATIO_FROM && self.unpacked / limits.max_ratio > self.stored() {
            return Err(OciError::Ratio {
                layer: self.number,
                limit: limits.max_ratio,
            });
        }
        Ok(())
    }
}

/// The header of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) path: Vec<u8>,
    /// The target of a link; empty for all others.
    pub(crate) target: Vec<u8>,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    /// Seconds since 1970.
    pub(crate) mtime: u64,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The kind of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Folder,
    Symlink,
    HardLink,
    /// With the words for it in a message.
    Node(&'static str),
    Unknown,
}

impl Entry {
    fn of(entry: &ParsedEntry<'_>) -> Entry {
        let own = |bytes: &[u8]| bytes.to_owned();
        Entry {
            kind: Kind::of(entry),
            path: own(&entry.path),
            target: entry.link_target.as_deref().map(own).unwrap_or_default(),
            size: entry.size,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: entry
                .xattrs
                .iter()
                .map(|(name, value)| (own(name), own(value)))
                .collect(),
        }
    }
}

impl Kind {
    fn of(entry: &ParsedEntry<'_>) -> Kind {
        match entry.entry_type {
            EntryType::Regular | EntryType::Continuous if is_sparse(entry.pax) => {
                Kind::Node("a file in the sparse format of GNU tar")
            }
            // Before POSIX, a folder was a file whose name ends with a slash.
            EntryType::Regular if entry.path.ends_with(b"/") => Kind::Folder,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Folder,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Link => Kind::HardLink,
            EntryType::Char => Kind::Node("a character device"),
            EntryType::Block => Kind::Node("a block device"),
            EntryType::Fifo => Kind::Node("a FIFO"),
            _ => Kind::Unknown,
        }
    }
}

/// Returns whether PAX headers describe a sparse file, whose content is not that of the file.
fn is_sparse(pax: Option<&[u8]>) -> bool {
    let mark = b"GNU.sparse.";
    pax.is_some_and(|pax| pax.windows(mark.len()).any(|window| window == mark))
}
