//! Detecting the contents of a file or device by signatures.
//!
//! `blkid` looks for magic numbers wherever a file system or a RAID may have them, including near
//! the end, where a pool keeps its guests' data. A guest must not be able to change the detected
//! type of the pool. So the btrfs superblock is read here first, and takes precedence over other
//! findings.

use crate::error::StorageError;
use crate::programs::BLKID;
use scalebox_programs::Run;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The detected contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Signature {
    /// The type of a file system, such as `btrfs`, or `a gpt partition table`.
    pub(crate) kind: String,
    pub(crate) label: Option<String>,
    pub(crate) uuid: Option<String>,
    /// `true` if several signatures were found. A person must then determine the contents.
    pub(crate) ambiguous: bool,
}

impl Signature {
    /// Returns whether the content is a file system created as a pool.
    pub(crate) fn is_pool(&self) -> bool {
        self.kind == "btrfs" && self.label.as_deref() == Some("scalebox")
    }

    fn unknown() -> Signature {
        Signature {
            kind: "several file systems at once".to_owned(),
            label: None,
            uuid: None,
            ambiguous: true,
        }
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind)?;
        if let Some(label) = &self.label {
            write!(f, " (label {label:?})")?;
        }
        if self.ambiguous && self.kind == "btrfs" {
            f.write_str(", and signatures of other contents")?;
        }
        Ok(())
    }
}

/// Detects the contents of `path`; `None` without a known signature.
///
/// # Errors
/// [`StorageError::Program`], [`StorageError::Io`].
pub(crate) fn probe(path: &Path) -> Result<Option<Signature>, StorageError> {
    let superblock = Superblock::read(path).map_err(|error| StorageError::io("read", path.display(), error))?;
    let btrfs = superblock.map(|found| Signature {
        kind: "btrfs".to_owned(),
        label: Some(found.label).filter(|label| !label.is_empty()),
        uuid: Some(found.uuid),
        ambiguous: false,
    });
    if btrfs.as_ref().is_some_and(Signature::is_pool) {
        return Ok(btrfs);
    }
    let (found, others) = match run_blkid(path)? {
        Found::Nothing => (btrfs, false),
        // For example, a RAID member shows the file system on the RAID.
        Found::One(other) => match btrfs {
            Some(btrfs) if other.kind != btrfs.kind => (Some(btrfs), true),
            _ => (Some(other), false),
        },
        Found::Several => (btrfs.or_else(|| Some(Signature::unknown())), true),
    };
    Ok(found.map(|found| Signature {
        ambiguous: others,
        ..found
    }))
}

enum Found {
    Nothing,
    One(Signature),
    Several,
}

fn run_blkid(path: &Path) -> Result<Found, StorageError> {
    // Exit code 2: no signature; 8: several contradictory signatures.
    let run = Run::of(BLKID).args(["-p", "-o", "export", "--"]).args([path]);
    let (code, output) = run.stdout_accepting(&[0, 2, 8])?;
    if code == 8 {
        return Ok(Found::Several);
    }
    let value = |key: &str| {
        output
            .lines()
            .find_map(|line| line.strip_prefix(key).map(str::to_owned))
    };
    let kind = value("TYPE=").or_else(|| value("PTTYPE=").map(|table| format!("a {table} partition table")));
    Ok(kind.map_or(Found::Nothing, |kind| {
        Found::One(Signature {
            kind,
            label: value("LABEL="),
            uuid: value("UUID="),
            ambiguous: false,
        })
    }))
}

/// The first superblock of a btrfs. Layout: `struct btrfs_super_block` in
/// `include/uapi/linux/btrfs_tree.h` of the kernel.
#[derive(Debug, PartialEq, Eq)]
struct Superblock {
    label: String,
    uuid: String,
}

impl Superblock {
    const OFFSET: u64 = 64 << 10;
    const SIZE: usize = 4096;

    /// Reads the superblock; `None` without a valid one.
    fn read(path: &Path) -> io::Result<Option<Superblock>> {
        let mut block = [0; Superblock::SIZE];
        match File::open(path)?.read_exact_at(&mut block, Superblock::OFFSET) {
            Ok(()) => Ok(Superblock::parse(&block)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn parse(block: &[u8; Superblock::SIZE]) -> Option<Superblock> {
        let number = |at: usize| Some(u64::from_le_bytes(block.get(at..at + 8)?.try_into().ok()?));
        let is_one = block.get(0x40..0x48)? == b"_BHRfS_M" && number(0x30)? == Superblock::OFFSET;
        // Type 0 is CRC-32C, the default of mkfs.btrfs. The kernel verifies the other types.
        let crc32c_fits = || Some(block.get(..4)? == crc32c(block.get(0x20..)?).to_le_bytes());
        let is_whole = block.get(0xc4..0xc6)? != [0, 0] || crc32c_fits()?;
        if !is_one || !is_whole {
            return None;
        }
        let label = block.get(0x12b..0x22b)?.split(|&byte| byte == 0).next()?;
        let hex: Vec<String> = block
            .get(0x20..0x30)?
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let group = |range: std::ops::Range<usize>| Some(hex.get(range)?.concat());
        let uuid = [group(0..4)?, group(4..6)?, group(6..8)?, group(8..10)?, group(10..16)?];
        Some(Superblock {
            label: String::from_utf8_lossy(label).into_owned(),
            uuid: uuid.join("-"),
        })
    }
}

/// Computes CRC-32C (Castagnoli; RFC 3720, appendix B.4), bit by bit: it is needed for 4 KiB only.
fn crc32c(bytes: &[u8]) -> u32 {
    const REVERSED_POLYNOMIAL: u32 = 0x82f6_3b78;
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (REVERSED_POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_match_the_standard() {
        // RFC 3720, appendix B.4: 32 bytes of zeros, of ones.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn only_valid_superblocks_are_recognized() {
        let mut block = [0; Superblock::SIZE];
        block[0x40..0x48].copy_from_slice(b"_BHRfS_M");
        block[0x30..0x38].copy_from_slice(&Superblock::OFFSET.to_le_bytes());
        block[0x12b..0x133].copy_from_slice(b"scalebox");
        assert_eq!(Superblock::parse(&block), None, "wrong checksum");
        let sum = crc32c(&block[0x20..]);
        block[..4].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Superblock::parse(&block).unwrap().label, "scalebox");
        block[0x12b] = b'S';
        assert_eq!(Superblock::parse(&block), None);
    }
}
