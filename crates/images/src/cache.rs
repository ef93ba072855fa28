//! Keeps finished templates, to reuse them when the same recipe is built again.
//!
//! An entry is a directory named after the recipe's fingerprint. It is filled under another name
//! and renamed once everything in it is flushed: an entry with the final name is complete and never
//! changes. A lock per fingerprint makes the second of two equal builds wait and use the first
//! one's result.

use crate::error::Error;
use crate::scratch::remove_tree;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The locked entry of one recipe in a cache.
#[derive(Debug)]
pub(crate) struct CacheEntry {
    finished: PathBuf,
    partial: PathBuf,
    _lock: File,
}

impl CacheEntry {
    /// Locks the entry; waits for other builds of the same recipe.
    pub(crate) fn lock(cache: &Path, fingerprint: &str) -> Result<Self, Error> {
        fs::create_dir_all(cache).map_err(Error::io("create", cache))?;
        let path = cache.join(format!("{fingerprint}.lock"));
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|errno| Error::io("lock", &path)(errno.into()))?;
        // The modification time of the lock is the entry's last use, so that a cleanup can find
        // unused entries.
        lock.set_modified(SystemTime::now())
            .map_err(Error::io("set the time of", &path))?;
        Ok(CacheEntry {
            finished: cache.join(fingerprint),
            partial: cache.join(format!("{fingerprint}.partial")),
            _lock: lock,
        })
    }

    /// Returns the directory of a finished build, if there is one.
    pub(crate) fn finished(&self) -> Option<&Path> {
        self.finished.is_dir().then_some(&*self.finished)
    }

    /// Returns an empty directory to build in; removes leftovers of an interrupted build.
    pub(crate) fn start(&self) -> Result<&Path, Error> {
        self.discard()?;
        fs::create_dir(&self.partial).map_err(Error::io("create", &self.partial))?;
        Ok(&self.partial)
    }

    /// Undoes [`start`](Self::start).
    pub(crate) fn discard(&self) -> Result<(), Error> {
        if self.partial.exists() {
            remove_tree(&self.partial)
        } else {
            Ok(())
        }
    }

    /// Gives the built directory its final name. Its files must be flushed already.
    pub(crate) fn finish(&self) -> Result<&Path, Error> {
        flush_dir(&self.partial)?;
        fs::rename(&self.partial, &self.finished).map_err(Error::io("rename to", &self.finished))?;
        if let Some(cache) = self.finished.parent() {
            flush_dir(cache)?;
        }
        Ok(&self.finished)
    }
}

fn flush_dir(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io("flush", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_builds_never_count_as_finished() {
        let cache = tempfile::tempdir().unwrap();
        let entry = CacheEntry::lock(cache.path(), "0123").unwrap();
        fs::write(entry.start().unwrap().join("rootfs.ext4"), "half").unwrap();
        drop(entry);

        let entry = CacheEntry::lock(cache.path(), "0123").unwrap();
        assert_eq!(entry.finished(), None);
        let dir = entry.start().unwrap();
        assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
        fs::write(dir.join("rootfs.ext4"), "whole").unwrap();
        let finished = entry.finish().unwrap().to_owned();
        assert_eq!(entry.finished(), Some(&*finished));
        assert_eq!(fs::read_to_string(finished.join("rootfs.ext4")).unwrap(), "whole");
    }

    #[test]
    fn the_second_of_two_equal_builds_reuses_the_first() {
        let cache = tempfile::tempdir().unwrap();
        let first = CacheEntry::lock(cache.path(), "0123").unwrap();
        first.start().unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| CacheEntry::lock(cache.path(), "0123").unwrap().finished().is_some());
            first.finish().unwrap();
            drop(first);
            assert!(second.join().unwrap());
        });
    }
}
