//! Scratch directories of builds: locked while in use, and removed afterwards, or by a later build
//! after a crash.

use crate::error::Error;
use crate::programs::{RM, run};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const PREFIX: &str = "guest-build-";

/// A directory for one build; removed on drop.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    /// The lock that marks the build as running.
    _lock: File,
}

impl Scratch {
    /// Creates a directory in `work_dir`, after removing those of interrupted builds.
    pub(crate) fn new(work_dir: &Path) -> Result<Self, Error> {
        // Locked until the new directory is locked: another build would take an unlocked one for
        // abandoned.
        let _sweeping = lock_dir(work_dir)?;
        sweep(work_dir)?;
        let path = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(work_dir)
            .map_err(Error::io("create a scratch directory in", work_dir))?
            .keep();
        let _lock = lock_dir(&path)?;
        Ok(Scratch { path, _lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a scratch directory; the next build removes it");
        }
    }
}

/// Locks the directory exclusively; waits for other holders.
fn lock_dir(path: &Path) -> Result<File, Error> {
    let dir = File::open(path).map_err(Error::io("open", path))?;
    flock(&dir, FlockOperation::LockExclusive).map_err(|errno| Error::io("lock", path)(errno.into()))?;
    Ok(dir)
}

/// Removes what interrupted builds, pulls and conversions left in `work_dir`.
///
/// # Errors
/// If a folder cannot be read or removed.
pub fn remove_abandoned(work_dir: &Path) -> Result<(), Error> {
    let _sweeping = lock_dir(work_dir)?;
    sweep(work_dir)
}

fn sweep(work_dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(work_dir).map_err(Error::io("read", work_dir))? {
        let entry = entry.map_err(Error::io("read", work_dir))?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        let dir = File::open(&path).map_err(Error::io("open", &path))?;
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                tracing::info!(path = %path.display(), "removing the scratch directory of an interrupted build");
                remove_tree(&path)?;
            }
            Err(Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(Error::io("lock", &path)(errno.into())),
        }
    }
    Ok(())
}

/// Removes a tree. Fails if a file system, such as `/dev`, is mounted in it. Never removes files
/// across a mount point.
pub(crate) fn remove_tree(path: &Path) -> Result<(), Error> {
    if let Some(mount) = scalebox_mounts::within(path).map_err(Error::io("look for mounts in", path))? {
        return Err(Error::StillMounted(mount.target));
    }
    let options = ["--recursive", "--force", "--one-file-system", "--"];
    run(RM).args(options).args([path]).stdout()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_builds_are_removed_and_running_ones_kept() {
        let work = tempfile::tempdir().unwrap();
        let abandoned = work.path().join(format!("{PREFIX}abandoned"));
        fs::create_dir_all(abandoned.join("root/etc")).unwrap();
        let other = work.path().join("other");
        fs::create_dir(&other).unwrap();

        let running = Scratch::new(work.path()).unwrap();
        assert!(!abandoned.exists());
        fs::create_dir_all(abandoned.join("root/etc")).unwrap();
        remove_abandoned(work.path()).unwrap();
        assert!(!abandoned.exists());
        let second = Scratch::new(work.path()).unwrap();
        assert!(running.path().exists() && second.path().exists() && other.exists());

        let path = running.path().to_owned();
        drop(running);
        assert!(!path.exists() && second.path().exists());
    }
}
