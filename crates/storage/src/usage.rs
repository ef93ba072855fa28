//! Disk usage: the owner of each extent in the pool, at one moment.
//!
//! Every extent is counted once and in full, whatever part of it a file still maps: that is its
//! size on disk. An extent that only one disk or one template refers to is *exclusive* to it:
//! deleting the owner frees the extent. An extent with several owners is *shared*. Extents that no
//! disk or template refers to (kernel, unfinished files, files deleted but still open) are *other*.
//! The four sums add up to the used space that btrfs reports.
//!
//! On XFS each block is counted separately, because there a block that no file maps is free.
//! *Other* is then the used space that no disk or template maps. The same holds for a btrfs that
//! contains more than the pool.
//!
//! A template and its resized base images are one owner, because they are deleted together.
//!
//! The walk costs about a microsecond per reference, and about 50 bytes of memory per distinct
//! extent. No operation waits for it.

use crate::error::StorageError;
use crate::local::backing::ActualBacking;
use crate::local::extents::{self, Reference};
use crate::local::fiemap;
use crate::local::files;
use crate::local::pool_fs::PoolFs;
#[cfg(feature = "simulated")]
use crate::local::simulated;
use crate::measurement::{FolderTimes, Measurement, Measurements};
use crate::pool::Pool;
use crate::record::{image_owner, record_owner};
use scalebox_units::{Bytes, TemplateName, VmId};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// The space of one disk or template.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// The size committed to a guest; for a template, the size of its image.
    pub provisioned: Bytes,
    /// The blocks that the disk or template maps, shared or exclusive.
    pub used: Bytes,
    /// The space that a deletion frees: extents that nothing else refers to. With copy-on-write
    /// this can exceed the blocks it maps.
    pub exclusive: Bytes,
}

/// The pool's extents by owner, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolUsage {
    /// The time when the walk started.
    pub measured_at: SystemTime,
    /// Duration of the walk.
    pub took: Duration,
    /// Usage of each disk.
    pub disks: HashMap<VmId, Usage>,
    /// Usage of each template; its exclusive space includes its resized base images.
    pub templates: HashMap<TemplateName, Usage>,
    /// Sum of the space exclusive to disks.
    pub disks_exclusive: Bytes,
    /// Sum of the space exclusive to templates.
    pub templates_exclusive: Bytes,
    /// Extents with several owners, each counted once.
    pub shared: Bytes,
    /// Extents without an owner.
    pub other: Bytes,
    /// See [`PoolUsage::unreclaimable`].
    unreclaimable: Bytes,
}

impl PoolUsage {
    /// Returns the size of all extents, each counted once.
    pub fn total(&self) -> Bytes {
        self.disks_exclusive + self.templates_exclusive + self.shared + self.other
    }

    /// Returns the unreclaimable usage: everything in use except the blocks that disks map in
    /// extents of their own. No commitment covers it, so admission subtracts it where every
    /// committed byte must be backed.
    pub fn unreclaimable(&self) -> Bytes {
        self.unreclaimable
    }
}

/// The owner of an extent: an index into [`Tally::owners`], or one of the constants.
type Owner = u32;
const OTHER: Owner = u32::MAX;
const SHARED: Owner = u32::MAX - 1;

/// An extent, as far as its references were read.
struct ExtentUsage {
    size: u64,
    owner: Owner,
    /// Number of its bytes that files map; only used while the extent has one owner.
    mapped: u64,
}

/// The disk or template that files belong to.
enum OwnerName {
    Disk(VmId),
    Template(TemplateName),
}

/// An owner and its usage so far.
struct OwnerUsage {
    name: OwnerName,
    /// The inode of the disk or template itself; resized base images have others.
    inode: u64,
    usage: Usage,
}

/// Adds the ranges that a file maps to a list, with its inode.
type ReadMap = fn(&File, u64, &mut Vec<fiemap::Mapped>) -> rustix::io::Result<()>;

/// Returns the owner of a file, by the file's name.
type ParseOwner = dyn Fn(&str) -> Option<OwnerName>;

/// Collects references to extents.
struct Tally {
    owners: Vec<OwnerUsage>,
    by_inode: HashMap<u64, Owner>,
    extents: HashMap<u64, ExtentUsage>,
}

impl Tally {
    /// Returns the owner that is the template `name`.
    fn template(&self, name: &str) -> Option<Owner> {
        let is_it = |owner: &OwnerUsage| matches!(&owner.name, OwnerName::Template(found) if found.as_str() == name);
        let position = self.owners.iter().position(is_it);
        position.map(|position| position as Owner)
    }

    fn take(&mut self, reference: Reference) {
        let owner = self.by_inode.get(&reference.inode).copied().unwrap_or(OTHER);
        if let Some(owner) = self.owners.get_mut(owner as usize)
            && owner.inode == reference.inode
        {
            owner.usage.used += Bytes::new(reference.mapped);
        }
        let extent = self.extents.entry(reference.start).or_insert(ExtentUsage {
            size: reference.size,
            owner,
            mapped: 0,
        });
        extent.mapped = extent.mapped.saturating_add(reference.mapped);
        if extent.owner != owner {
            extent.owner = SHARED;
        }
    }

    /// Sums up the extents. `used` is the used space that the file system reports after the walk.
    /// With `other_is_rest`, the walk does not cover the whole file system, and *other* is the
    /// difference.
    fn close(mut self, used: Bytes, other_is_rest: bool, measured_at: SystemTime, took: Duration) -> PoolUsage {
        let (mut disks_exclusive, mut templates_exclusive) = (Bytes::ZERO, Bytes::ZERO);
        let (mut shared, mut other, mut covered) = (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO);
        for extent in self.extents.values() {
            let size = Bytes::new(extent.size);
            match self.owners.get_mut(extent.owner as usize) {
                Some(owner) if matches!(owner.name, OwnerName::Disk(_)) => {
                    owner.usage.exclusive += size;
                    disks_exclusive += size;
                    covered += size.min(Bytes::new(extent.mapped));
                }
                Some(owner) => {
                    owner.usage.exclusive += size;
                    templates_exclusive += size;
                }
                None if extent.owner == SHARED => shared += size,
                None => other += size,
            }
        }
        if other_is_rest {
            other = used - (disks_exclusive + templates_exclusive + shared);
        }
        let (mut disks, mut templates) = (HashMap::new(), HashMap::new());
        for owner in self.owners {
            match owner.name {
                OwnerName::Disk(id) => drop(disks.insert(id, owner.usage)),
                OwnerName::Template(name) => drop(templates.insert(name, owner.usage)),
            }
        }
        let total = disks_exclusive + templates_exclusive + shared + other;
        PoolUsage {
            measured_at,
            took,
            disks,
            templates,
            disks_exclusive,
            templates_exclusive,
            shared,
            other,
            // The file system may hold data outside this subvolume's tree.
            unreclaimable: total.max(used) - covered,
        }
    }
}

impl Pool {
    /// Measures the usage of all disks and templates. Takes from milliseconds to seconds, depending
    /// on the number of extents, and blocks no other operation. Admission uses the result until a
    /// template is added or removed.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the kernel does not report the extents.
    pub fn measure(&self) -> Result<PoolUsage, StorageError> {
        self.require_mounted()?;
        let (measured_at, begun) = (SystemTime::now(), Instant::now());
        let failed =
            |errno: rustix::io::Errno| StorageError::io("read the extents of", self.root.display(), errno.into());
        // The times are read first: any later change makes the result stale.
        let folders = self.folder_times();
        let forgotten = self.measured().forgotten;
        let mut tally = self.owners()?;
        match &self.file_system {
            PoolFs::Btrfs(..) => extents::walk(&self.dir, |reference| tally.take(reference)).map_err(failed)?,
            PoolFs::Xfs => fiemap::cut(&self.map_files(fiemap::read)?, |piece| tally.take(piece)),
            #[cfg(feature = "simulated")]
            PoolFs::Simulated(_) => fiemap::cut(&self.map_files(simulated::map)?, |piece| tally.take(piece)),
        }
        let used = self.space()?.used;
        let accounts = tally.close(
            used,
            self.backing == ActualBacking::Existing,
            measured_at,
            begun.elapsed(),
        );
        let unreclaimable = folders.map(|folders| Measurement {
            size: accounts.unreclaimable,
            folders,
        });
        let mut measured = self.measured();
        if measured.forgotten == forgotten {
            measured.last = unreclaimable;
        }
        Ok(accounts)
    }

    /// Returns whether admission has to count all used space as unreclaimable. That is the case
    /// before the first measurement, and after a template was added or removed.
    pub fn needs_measuring(&self) -> bool {
        self.measured_unreclaimable().is_none()
    }

    /// Returns the last measurement unless it is stale. Costs two system calls.
    pub(crate) fn measured_unreclaimable(&self) -> Option<Bytes> {
        let unreclaimable = self.measured().last?;
        (self.folder_times() == Some(unreclaimable.folders)).then_some(unreclaimable.size)
    }

    /// Invalidates the measurement. Call it after a disk was replaced by a clone of itself: blocks
    /// that it no longer maps may stay in use.
    pub(crate) fn forget_measurement(&self) {
        let mut measured = self.measured();
        measured.last = None;
        measured.forgotten += 1;
    }

    fn measured(&self) -> MutexGuard<'_, Measurements> {
        self.measurements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder_times(&self) -> Option<FolderTimes> {
        let changed = |folder: &Path| match fs::metadata(folder) {
            Ok(meta) => Some(i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(0),
            Err(_) => None,
        };
        Some(FolderTimes([
            changed(&self.templates_dir())?,
            changed(&self.grown_dir())?,
        ]))
    }

    /// Reads the extent maps of all files in the pool.
    fn map_files(&self, read: ReadMap) -> Result<Vec<fiemap::Mapped>, StorageError> {
        let mut mapped = Vec::new();
        for folder in [self.disks_dir(), self.templates_dir(), self.grown_dir()] {
            for (_, inode, path) in files_of(&folder)? {
                let failed = |error| StorageError::io("read the extents of", path.display(), error);
                match files::open_read(&path) {
                    Ok(file) if file.metadata().map_err(failed)?.is_file() => {
                        read(&file, inode, &mut mapped).map_err(|errno| failed(errno.into()))?;
                    }
                    Ok(_) => {}
                    // The file was deleted between the listing and now.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        Ok(mapped)
    }

    /// Lists every disk and template with the inodes of its files.
    fn owners(&self) -> Result<Tally, StorageError> {
        let mut tally = Tally {
            owners: Vec::new(),
            by_inode: HashMap::new(),
            extents: HashMap::new(),
        };
        let disk = |file: &str| Some(OwnerName::Disk(file.strip_suffix(".ext4")?.parse().ok()?));
        let template = |file: &str| image_owner(file).map(OwnerName::Template);
        let folders: [(_, &ParseOwner); 2] = [(self.disks_dir(), &disk), (self.templates_dir(), &template)];
        for (folder, parse) in folders {
            for (file, inode, path) in files_of(&folder)? {
                let Some(name) = parse(&file) else { continue };
                let provisioned = match fs::symlink_metadata(&path) {
                    Ok(meta) => Bytes::new(meta.len()),
                    // The file was deleted between the listing and now.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(StorageError::io("read", path.display(), error)),
                };
                tally.by_inode.insert(inode, tally.owners.len() as Owner);
                tally.owners.push(OwnerUsage {
                    name,
                    inode,
                    usage: Usage {
                        provisioned,
                        ..Usage::default()
                    },
                });
            }
        }
        // A template's record and its base images are freed with it.
        for (file, inode, _) in files_of(&self.templates_dir())? {
            if let Some(owner) = record_owner(&file).and_then(|name| tally.template(name.as_str())) {
                tally.by_inode.insert(inode, owner);
            }
        }
        for (file, inode, _) in files_of(&self.grown_dir())? {
            let name = file.split_once('@').map(|(name, _)| name);
            if let Some(owner) = name.and_then(|name| tally.template(name)) {
                tally.by_inode.insert(inode, owner);
            }
        }
        Ok(tally)
    }
}

/// Returns name, inode and path of the regular files in a folder.
fn files_of(folder: &Path) -> Result<Vec<(String, u64, std::path::PathBuf)>, StorageError> {
    let failed = |error| StorageError::io("list", folder.display(), error);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        // The entry is checked by type alone: opening a pipe would wait for its other end.
        if !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        // Names that are not UTF-8 cannot be ours.
        if let Some(name) = path.file_name().and_then(OsStr::to_str) {
            files.push((name.to_owned(), entry.ino(), path));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: u64 = 300;
    const TEMPLATE: u64 = 301;
    const GROWN: u64 = 302;
    const KERNEL: u64 = 303;

    fn tally() -> Tally {
        let owner = |name, inode| OwnerUsage {
            name,
            inode,
            usage: Usage::default(),
        };
        let disk = OwnerName::Disk("vm-000000000001".parse().unwrap());
        let template = OwnerName::Template("tiny".parse().unwrap());
        Tally {
            owners: vec![owner(disk, DISK), owner(template, TEMPLATE)],
            by_inode: HashMap::from([(DISK, 0), (TEMPLATE, 1), (GROWN, 1)]),
            extents: HashMap::new(),
        }
    }

    fn close(references: &[(u64, u64, u64, u64)], used: u64, other_is_rest: bool) -> PoolUsage {
        let mut tally = tally();
        for &(inode, start, size, mapped) in references {
            tally.take(Reference {
                inode,
                start,
                size,
                mapped,
            });
        }
        tally.close(Bytes::new(used), other_is_rest, SystemTime::UNIX_EPOCH, Duration::ZERO)
    }

    #[test]
    fn each_extent_is_counted_once_and_for_its_owner() {
        let accounts = close(
            &[
                (TEMPLATE, 1000, 100, 100),
                (GROWN, 1000, 100, 90),
                (GROWN, 2000, 10, 10),
                (TEMPLATE, 3000, 50, 50),
                (DISK, 3000, 50, 20),
                (DISK, 4000, 70, 30),
                (DISK, 4000, 70, 10),
                (KERNEL, 5000, 7, 7),
            ],
            237,
            false,
        );
        let usage = |used, exclusive| Usage {
            used: Bytes::new(used),
            exclusive: Bytes::new(exclusive),
            ..Usage::default()
        };
        assert_eq!(accounts.disks["vm-000000000001"], usage(60, 70));
        assert_eq!(accounts.templates["tiny"], usage(150, 110));
        let sums = [
            accounts.disks_exclusive,
            accounts.templates_exclusive,
            accounts.shared,
            accounts.other,
        ];
        assert_eq!(sums, [70, 110, 50, 7].map(Bytes::new));
        assert_eq!(accounts.total(), Bytes::new(237));
        // The disk maps 40 bytes of its own extent; no commitment covers the other 30.
        assert_eq!(accounts.unreclaimable(), Bytes::new(237 - 40));
    }

    #[test]
    fn space_outside_the_walk_is_unreclaimable() {
        assert_eq!(
            close(&[(DISK, 1000, 100, 100)], 500, false).unreclaimable(),
            Bytes::new(400)
        );
    }

    #[test]
    fn on_a_shared_file_system_the_remaining_space_is_other() {
        let accounts = close(&[(DISK, 1000, 100, 100), (KERNEL, 5000, 7, 7)], 500, true);
        assert_eq!((accounts.other, accounts.total()), (Bytes::new(400), Bytes::new(500)));
        assert_eq!(accounts.unreclaimable(), Bytes::new(400));
    }
}
