//! Scratch directories of builds: locked while in use, removed with what holds them, swept when
//! nobody does.

use crate::command::{Program, run};
use crate::error::Error;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const PREFIX: &str = "guest-build-";

/// A directory for one build; removed when dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    /// Locked: says that the build lives.
    _lock: File,
}

impl Scratch {
    /// Makes one in `work_dir`, after removing those of builds that were interrupted.
    pub(crate) fn new(work_dir: &Path) -> Result<Self, Error> {
        // Held over both: a directory that another build has made but not locked yet would look
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
            tracing::warn!(path = %self.path.display(), %error, "a scratch directory stays behind until the next build");
        }
    }
}

/// Waits until this process alone holds the directory.
fn lock_dir(path: &Path) -> Result<File, Error> {
    let dir = File::open(path).map_err(Error::io("open", path))?;
    flock(&dir, FlockOperation::LockExclusive).map_err(|errno| Error::io("lock", path)(errno.into()))?;
    Ok(dir)
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
                tracing::info!(path = %path.display(), "removing what an interrupted build left");
                remove_tree(&path)?;
            }
            Err(Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(Error::io("lock", &path)(errno.into())),
        }
    }
    Ok(())
}

/// Removes a tree. Should anything be mounted in it, such as `/dev`, it says so, and nothing on the
/// far side of a mount is touched.
pub(crate) fn remove_tree(path: &Path) -> Result<(), Error> {
    let table = Path::new("/proc/self/mountinfo");
    let table = fs::read_to_string(table).map_err(Error::io("read", table))?;
    let real = path.canonicalize().map_err(Error::io("look at", path))?;
    // The fifth field is the mount point (proc_pid_mountinfo(5)).
    let mounted = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .find(|point| Path::new(point).starts_with(&real));
    if let Some(point) = mounted {
        return Err(Error::StillMounted(PathBuf::from(point)));
    }
    let path = path.as_os_str();
    run(
        Program::Rm,
        [
            "--recursive".as_ref(),
            "--force".as_ref(),
            "--one-file-system".as_ref(),
            "--".as_ref(),
            path,
        ],
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_removes_what_an_interrupted_one_left_and_leaves_a_living_one_alone() {
        let work = tempfile::tempdir().unwrap();
        let abandoned = work.path().join(format!("{PREFIX}abandoned"));
        fs::create_dir_all(abandoned.join("root/etc")).unwrap();
        let other = work.path().join("other");
        fs::create_dir(&other).unwrap();

        let living = Scratch::new(work.path()).unwrap();
        assert!(!abandoned.exists());
        let second = Scratch::new(work.path()).unwrap();
        assert!(living.path().exists() && second.path().exists() && other.exists());

        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists() && second.path().exists());
    }
}
