//! The file systems on disks: flush, freeze, thaw, trim.

use crate::server::Failure;
use crate::system::ioctl;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, fstat, major, minor, openat};
use rustix::io::Errno;
use scalebox_agent_api::FailureCode;
use scalebox_mounts::Mount;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The state of freezing the guest's file systems.
#[derive(Default)]
pub(crate) struct Frozen(Mutex<bool>);

impl Frozen {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Freezes the file systems, those mounted last first. All are frozen, or none.
    ///
    /// # Errors
    /// [`FailureCode::Busy`] if one is frozen already. Those of the kernel.
    pub(crate) fn freeze(&self, volumes: &[Volume]) -> Result<(), Failure> {
        let mut is_frozen = self.lock();
        if *is_frozen {
            return Err(Failure::new(FailureCode::Busy, "the file systems are frozen already"));
        }
        for (index, volume) in volumes.iter().enumerate() {
            match ioctl::freeze(&volume.folder) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOTTY) => {}
                Err(error) => {
                    let thawed = thaw(&volumes[..index]);
                    *is_frozen = thawed.is_err();
                    return Err(Failure::io(format!("freeze {}", volume.name))(error));
                }
            }
        }
        *is_frozen = true;
        Ok(())
    }

    /// Thaws the file systems, also those that another program froze. File systems that are not
    /// frozen stay unchanged.
    ///
    /// # Errors
    /// Those of the kernel; the other file systems are thawed.
    pub(crate) fn thaw(&self, volumes: &[Volume]) -> Result<(), Failure> {
        let mut is_frozen = self.lock();
        thaw(volumes)?;
        *is_frozen = false;
        Ok(())
    }

    /// Discards the unused blocks of the file systems, and returns their size in bytes.
    ///
    /// # Errors
    /// [`FailureCode::Busy`] while they are frozen: the trim would wait.
    /// [`FailureCode::Unsupported`] if no file system can do it. Those of the kernel.
    pub(crate) fn trim(&self, volumes: &[Volume]) -> Result<u64, Failure> {
        if *self.lock() {
            return Err(Failure::new(FailureCode::Busy, "the file systems are frozen"));
        }
        let mut discarded: Option<u64> = None;
        for volume in volumes {
            match ioctl::trim(&volume.folder) {
                Ok(bytes) => discarded = Some(discarded.unwrap_or(0).saturating_add(bytes)),
                Err(Errno::OPNOTSUPP | Errno::NOTTY) => {}
                Err(error) => return Err(Failure::io(format!("trim {}", volume.name))(error)),
            }
        }
        let unsupported = || Failure::new(FailureCode::Unsupported, "no file system of the guest can be trimmed");
        discarded.ok_or_else(unsupported)
    }
}

fn thaw(volumes: &[Volume]) -> Result<(), Failure> {
    let mut failed = None;
    for volume in volumes.iter().rev() {
        match ioctl::thaw(&volume.folder) {
            // EINVAL: it is not frozen.
            Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => {}
            Err(error) => failed = Some(Failure::io(format!("thaw {}", volume.name))(error)),
        }
    }
    failed.map_or(Ok(()), Err)
}

/// A file system on a disk that is mounted for writing.
pub(crate) struct Volume {
    /// The mount point, for error messages.
    name: String,
    folder: OwnedFd,
}

/// Returns the guest's file systems on disks that are mounted for writing, each once, those mounted
/// last first.
///
/// # Errors
/// If the kernel's tables cannot be read, or a mount point cannot be opened.
pub(crate) fn volumes() -> Result<Vec<Volume>, Failure> {
    let failed = || Failure::io("read the mounted file systems");
    let known = std::fs::read_to_string("/proc/filesystems").map_err(failed())?;
    let on_disks: Vec<&str> = known.lines().filter_map(|line| line.strip_prefix('\t')).collect();
    let mounts = scalebox_mounts::all().map_err(failed())?;
    let mut writable: Vec<&Mount> = mounts
        .iter()
        .filter(|mount| on_disks.contains(&mount.fs_type.as_str()) && !mount.has_option("ro"))
        .collect();
    writable.reverse();
    open(&writable)
}

/// Opens each file system of `mounts` once, through the first mount that is not hidden.
fn open(mounts: &[&Mount]) -> Result<Vec<Volume>, Failure> {
    let mut opened: Vec<Volume> = Vec::new();
    let mut missing: BTreeMap<(u32, u32), io::Error> = BTreeMap::new();
    let mut found: Vec<(u32, u32)> = Vec::new();
    for mount in mounts {
        if found.contains(&mount.device) {
            continue;
        }
        match open_mount(mount) {
            Ok(Some(folder)) => {
                found.push(mount.device);
                missing.remove(&mount.device);
                opened.push(Volume {
                    name: mount.target.display().to_string(),
                    folder,
                });
            }
            Ok(None) => {}
            Err(error) => {
                missing.insert(mount.device, error.into());
            }
        }
    }
    match missing.into_values().next() {
        Some(error) => Err(Failure::io("open a mount point")(error)),
        None => Ok(opened),
    }
}

/// Opens a mount point; returns `None` if another mount hides it.
fn open_mount(mount: &Mount) -> rustix::io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let folder = match openat(CWD, &mount.target, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        folder => folder?,
    };
    let device = fstat(&folder)?.st_dev;
    // The files of btrfs have other device numbers than the file system.
    let is_visible = mount.fs_type == "btrfs" || (major(device), minor(device)) == mount.device;
    Ok(is_visible.then_some(folder))
}

#[cfg(test)]
mod tests;
