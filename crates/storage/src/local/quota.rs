//! The space that a quota still allows a folder or a file to take. It can be less than the free
//! space.
//!
//! On btrfs these are quota groups, with full or simple accounting: a subvolume's own group, and
//! the groups above it. A group's limit covers its data and the space reserved for writes in
//! progress (`qgroup_check_limits` in `fs/btrfs/qgroup.c` of the kernel). The numbers are in
//! `/sys/fs/btrfs/UUID/qgroups/LEVEL_ID` since kernel 5.9. Project quotas of XFS and ext4 need no
//! code here: `statfs` of a folder that passes its project on reports how much the project may
//! still take.

use crate::local::btrfs::{self, sysfs_folder};
use crate::local::tree_search;
use rustix::fd::AsFd;
use scalebox_units::Bytes;
use std::fs;
use std::io;
use std::path::PathBuf;

/// The tree with the quota groups.
const QUOTA_TREE: u64 = 8;
/// The item type that makes one group a member of another.
const RELATION: u32 = 246;
/// Bytes read at once: the keys of a group's parents, which are few, fit in it.
const BATCH: usize = 4 << 10;

/// Bits of `limit_flags`.
const MAX_REFERENCED: u64 = 1 << 0;
const MAX_EXCLUSIVE: u64 = 1 << 1;

/// The allowance of the most restrictive quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allowance {
    /// Space that may still be written.
    pub(crate) left: Bytes,
    /// The total that may be used.
    pub(crate) limit: Bytes,
}

/// The quota groups that apply to a subvolume of a btrfs.
#[derive(Debug)]
pub(crate) struct Quota {
    subvolume: u64,
    /// Does not exist while quotas are off.
    groups: PathBuf,
}

impl Quota {
    /// Returns the groups of the subvolume that contains `file`; `None` on other file systems.
    pub(crate) fn of(file: impl AsFd) -> io::Result<Option<Quota>> {
        if !btrfs::is_btrfs(&file)? {
            return Ok(None);
        }
        Ok(Some(Quota {
            subvolume: btrfs::subvolume(&file)?,
            groups: sysfs_folder(&file)?.join("qgroups"),
        }))
    }

    /// Reads the current allowance; `None` without a limit, or when the kernel does not report it.
    /// `file` is any file on the file system.
    pub(crate) fn allowance(&self, file: impl AsFd) -> io::Result<Option<Allowance>> {
        if !self.groups.exists() {
            return Ok(None);
        }
        let mut tightest: Option<Allowance> = None;
        let (mut seen, mut next) = (vec![self.subvolume], 0);
        while let Some(&group) = seen.get(next) {
            next += 1;
            for parent in parents(&file, group)? {
                if !seen.contains(&parent) {
                    seen.push(parent);
                }
            }
            let allowance = self.of_group(group)?;
            tightest = match (tightest, allowance) {
                (Some(known), Some(found)) if known.left <= found.left => Some(known),
                (known, None) => known,
                (_, found) => found,
            };
        }
        Ok(tightest)
    }

    fn of_group(&self, group: u64) -> io::Result<Option<Allowance>> {
        // The upper 16 bits are the level.
        let folder = self.groups.join(format!("{}_{}", group >> 48, group & ((1 << 48) - 1)));
        let number = |name: &str| -> io::Result<u64> {
            let text = fs::read_to_string(folder.join(name))?;
            // A counter of reservations can be negative for a moment.
            let number = text
                .trim()
                .parse::<i64>()
                .map(|number| u64::try_from(number).unwrap_or(0));
            number.or_else(|_| text.trim().parse()).map_err(io::Error::other)
        };
        let flags = match number("limit_flags") {
            Ok(flags) => flags,
            // The group was deleted, or has no numbers of its own.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut allowance = None;
        for (flag, limit, held) in [
            (MAX_REFERENCED, "max_referenced", "referenced"),
            (MAX_EXCLUSIVE, "max_exclusive", "exclusive"),
        ] {
            if flags & flag == 0 {
                continue;
            }
            let mut taken = Bytes::new(number(held)?);
            for reserved in ["rsv_data", "rsv_meta_pertrans", "rsv_meta_prealloc"] {
                taken += Bytes::new(number(reserved)?);
            }
            let limit = Bytes::new(number(limit)?);
            let found = Allowance {
                left: limit - taken,
                limit,
            };
            if allowance.is_none_or(|known: Allowance| found.left < known.left) {
                allowance = Some(found);
            }
        }
        Ok(allowance)
    }
}

/// Returns the groups that `group` is a member of. The tree has each relation twice, once per side;
/// parents have a higher level.
fn parents(file: impl AsFd, group: u64) -> io::Result<Vec<u64>> {
    let mut parents = Vec::new();
    let keys = (group, RELATION, 0)..=(group, RELATION, u64::MAX);
    let searched = tree_search::search::<BATCH>(file, QUOTA_TREE, keys, |(member, kind, of), _| {
        if member == group && kind == RELATION && of >> 48 > group >> 48 {
            parents.push(of);
        }
    });
    match searched {
        // Quotas were turned off a moment ago.
        Err(rustix::io::Errno::NOENT) => Ok(Vec::new()),
        Err(errno) => Err(errno.into()),
        Ok(()) => Ok(parents),
    }
}
