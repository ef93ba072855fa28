//! The kind of an image, by its content.

use crate::oci::OciError;
use crate::oci::archive::{DOCKER_MANIFEST, OCI_LAYOUT};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The kind of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A bare ext4 file system.
    Ext4,
    /// A file compressed with zstd, such as an exported template.
    Compressed,
    /// A raw disk with a partition table, GPT or MBR.
    PartitionedDisk,
    /// A qcow2 image.
    Qcow2,
    /// A tar archive with an OCI layout (`skopeo copy … oci-archive:FILE`).
    OciArchive,
    /// A tar archive of `docker save`.
    DockerArchive,
    /// Another tar archive.
    Tar,
    /// Anything else.
    Unknown,
}

impl Kind {
    /// Returns whether [`convert`](super::convert) turns it into an ext4 image.
    pub fn is_convertible(self) -> bool {
        match self {
            Kind::PartitionedDisk | Kind::Qcow2 | Kind::OciArchive | Kind::DockerArchive => true,
            Kind::Ext4 | Kind::Compressed | Kind::Tar | Kind::Unknown => false,
        }
    }
}

/// The number of bytes at the start of an image that [`needs_conversion`] looks at.
pub const HEAD_BYTES: usize = 2048;
/// Bytes of a header of tar, and the unit of its content.
const BLOCK: u64 = 512;
/// Maximum number of entries that are inspected in a tar archive.
const MAX_ENTRIES: usize = 10_000;

/// Recognises the kind of a file. Reads only a few bytes, except of tar archives, whose headers are
/// read.
///
/// # Errors
/// [`OciError::Io`].
pub fn recognise(path: &Path) -> Result<Kind, OciError> {
    let file = File::open(path).map_err(OciError::io("open", path))?;
    kind(&file).map_err(OciError::io("read", path))
}

/// Returns whether an image that begins with `head`, its first [`HEAD_BYTES`] bytes, has to be
/// stored as a file and converted. If not, it is an ext4 file system, possibly compressed, or
/// nothing that [`convert`](super::convert) understands.
pub fn needs_conversion(head: &[u8]) -> bool {
    match of_head(head) {
        Head::Tar => true,
        Head::Kind(kind) => kind.is_convertible(),
    }
}

/// The kind of an image, by its first bytes.
pub(super) enum Head {
    /// A tar archive, whose entries tell the kind.
    Tar,
    Kind(Kind),
}

fn kind(file: &File) -> io::Result<Kind> {
    let mut head = [0; HEAD_BYTES];
    let length = read_up_to(file, &mut head, 0)?;
    match of_head(&head[..length]) {
        Head::Tar => tar_kind(file),
        Head::Kind(kind) => Ok(kind),
    }
}

pub(super) fn of_head(head: &[u8]) -> Head {
    let has = |at: usize, mark: &[u8]| head.get(at..at + mark.len()) == Some(mark);
    let skippable = matches!(head, [first, 0x2a, 0x4d, 0x18, ..] if first & 0xf0 == 0x50);
    if has(0, b"QFI\xfb") {
        return Head::Kind(Kind::Qcow2);
    }
    if has(0, &[0x28, 0xb5, 0x2f, 0xfd]) || skippable {
        return Head::Kind(Kind::Compressed);
    }
    // ext4 is checked before the partition tables: the first 1024 bytes of a file system are free,
    // and can look like a partition table.
    if has(1080, &[0x53, 0xef]) {
        return Head::Kind(Kind::Ext4);
    }
    if has(512, b"EFI PART") || has(510, &[0x55, 0xaa]) {
        return Head::Kind(Kind::PartitionedDisk);
    }
    match has(257, b"ustar") {
        true => Head::Tar,
        false => Head::Kind(Kind::Unknown),
    }
}

/// Looks for the files that mark an archive of an image.
fn tar_kind(file: &File) -> io::Result<Kind> {
    let (mut at, mut found) = (0_u64, Kind::Tar);
    for _ in 0..MAX_ENTRIES {
        let mut header = [0; BLOCK as usize];
        if read_up_to(file, &mut header, at)? < header.len() || header[0] == 0 {
            break;
        }
        let name = header[..100].split(|byte| *byte == 0).next().unwrap_or_default();
        match name.strip_prefix(b"./").unwrap_or(name) {
            name if name == OCI_LAYOUT.as_bytes() => return Ok(Kind::OciArchive),
            name if name == DOCKER_MANIFEST.as_bytes() => found = Kind::DockerArchive,
            _ => {}
        }
        let Some(size) = size(&header[124..136]) else { break };
        let Some(next) = size
            .checked_next_multiple_of(BLOCK)
            .and_then(|size| at.checked_add(BLOCK + size))
        else {
            break;
        };
        at = next;
    }
    Ok(found)
}

/// Parses the size in a header: octal digits, or binary with the highest bit set.
fn size(field: &[u8]) -> Option<u64> {
    if field.first()? & 0x80 != 0 {
        return Some(u64::from_be_bytes(*field.last_chunk()?) & (u64::MAX >> 1));
    }
    let text = std::str::from_utf8(field).ok()?;
    u64::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok()
}

fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}
