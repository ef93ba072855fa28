//! Rejects file systems that cannot be a disk. With the allowed features, e2fsprogs can check and
//! grow a file system, and the guests' kernel can mount and write it.

use super::features::{Compat, Incompat, RoCompat};
use super::superblock::Superblock;
use std::fmt::Write;

/// A feature's bit, and its name in mke2fs and tune2fs.
type Named = (u32, &'static str);

/// The allowed features.
const COMPAT: u32 = 0x1 | 0x4 | 0x8 | 0x10 | 0x20 | 0x200 | 0x400 | 0x800 | 0x1000;
const INCOMPAT: u32 = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000;
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x8000 | 0x10000;

/// Names of features that are not allowed. Others are named by their number, as in e2fsprogs.
const OTHER_COMPAT: [Named; 4] = [
    (0x2, "imagic_inodes"),
    (0x40, "lazy_bg"),
    (0x80, "snapshot_bitmap"),
    (0x100, "exclude_bitmap"),
];
const OTHER_INCOMPAT: [Named; 2] = [(0x1, "compression"), (0x1000, "dirdata")];
const OTHER_RO_COMPAT: [Named; 4] = [
    (0x80, "snapshot"),
    (0x800, "replica"),
    (0x1000, "read-only"),
    (0x4000, "shared_blocks"),
];

/// Returns why a file system with this superblock cannot be a disk. The reason continues the
/// sentence "its file system …".
pub(super) fn reason(superblock: &Superblock) -> Option<String> {
    let fields = superblock.fields();
    if superblock.has_incompat(Incompat::MMP) {
        // `e2fsck` waits, for a time set by the image, for another host that uses the file system.
        return Some("has multiple mount protection; remove it (tune2fs -O ^mmp)".to_owned());
    }
    if superblock.has_incompat(Incompat::JOURNAL_DEV) {
        return Some("is a journal".to_owned());
    }
    let mut names = String::new();
    let mut name = |bits: u32, allowed: u32, kind: char, known: &[Named]| {
        for nth in (0..32).filter(|nth| bits & !allowed & 1 << nth != 0) {
            let separator = if names.is_empty() { "" } else { ", " };
            let known = known.iter().find(|(bit, _)| *bit == 1 << nth);
            let written = match known {
                Some((_, known)) => write!(names, "{separator}{known}"),
                None => write!(names, "{separator}FEATURE_{kind}{nth}"),
            };
            written.unwrap_or_default();
        }
    };
    name(fields.u32(Compat::FIELD), COMPAT, 'C', &OTHER_COMPAT);
    name(fields.u32(Incompat::FIELD), INCOMPAT, 'I', &OTHER_INCOMPAT);
    name(fields.u32(RoCompat::FIELD), RO_COMPAT, 'R', &OTHER_RO_COMPAT);
    if !names.is_empty() {
        return Some(format!(
            "has features that guests cannot use or the host cannot check: {names}"
        ));
    }
    if superblock.has_compat(Compat::HAS_JOURNAL) && (superblock.journal().is_none() || fields.u32(0xe4) != 0) {
        // Programs would search the host's devices for it.
        let remedy = "give it an internal one (tune2fs -O ^has_journal, then tune2fs -j)";
        return Some(format!("has an external journal; {remedy}"));
    }
    let block_size = superblock.block_size();
    (block_size > 4096).then(|| {
        format!(
            "has blocks of {} KiB, but guests can mount at most 4 KiB (mke2fs -b 4096)",
            block_size >> 10
        )
    })
}
