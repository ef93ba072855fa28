//! The cache of layers: each is stored under its digest, as the registry sends it.
//!
//! A layer is written under another name, and renamed once it is complete, verified and flushed.
//! Therefore a file whose name is a digest is a complete layer. The unfinished file is locked while
//! it is written: if two pulls need the same layer, the second waits for the first. Unfinished
//! files of interrupted pulls are not locked, and are removed when the cache is opened, which
//! happens at each start of the daemon.

use crate::oci::digest::Digest;
use crate::oci::error::OciError;
use crate::oci::manifest::Blob;
use rustix::fs::{FlockOperation, flock};
use scalebox_fault_points::fault_point;
use scalebox_units::Bytes;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const PARTIAL: &str = ".partial";

/// A folder of layers. Several processes can use it at the same time.
#[derive(Debug, Clone)]
pub struct LayerCache {
    /// `CACHE/sha256`.
    dir: PathBuf,
}

impl LayerCache {
    /// Opens the cache in the folder `dir`, creating it if necessary, and removes the leftovers of
    /// interrupted pulls.
    ///
    /// # Errors
    /// [`OciError::Io`].
    pub fn open(dir: &Path) -> Result<LayerCache, OciError> {
        let cache = LayerCache {
            dir: dir.join("sha256"),
        };
        let mut builder = DirBuilder::new();
        // Layers can hold secrets of the image, and files with a setuid bit.
        let created = builder.recursive(true).mode(0o700).create(&cache.dir);
        created.map_err(OciError::io("create", &cache.dir))?;
        for path in cache.files()? {
            if path.extension().is_some_and(|extension| extension == "partial") {
                cache.sweep(&path)?;
            }
        }
        Ok(cache)
    }

    /// Removes an unfinished file, unless it is being written.
    fn sweep(&self, path: &Path) -> Result<(), OciError> {
        let Ok(file) = File::open(path) else { return Ok(()) };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => remove(path),
            Err(_) => Ok(()),
        }
    }

    fn files(&self) -> Result<Vec<PathBuf>, OciError> {
        let entries = fs::read_dir(&self.dir).map_err(OciError::io("read", &self.dir))?;
        let paths = entries.map(|entry| entry.map(|entry| entry.path()));
        paths.collect::<Result<_, _>>().map_err(OciError::io("read", &self.dir))
    }

    /// Returns a layer, if it is there. The file stays readable after it is pruned.
    pub(crate) fn get(&self, blob: &Blob) -> Result<Option<File>, OciError> {
        let path = self.dir.join(blob.digest.hex());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(OciError::io("open", &path)(error)),
        };
        let size = file.metadata().map_err(OciError::io("read", &path))?.len();
        if size != blob.size {
            return Err(OciError::WrongSize {
                what: format!("the layer {}", blob.digest),
                expected: blob.size,
                actual: size,
            });
        }
        // The time of its last use.
        let touched = File::options().write(true).open(&path);
        let touched = touched.and_then(|file| file.set_modified(SystemTime::now()));
        touched.map_err(OciError::io("set the time of", &path))?;
        Ok(Some(file))
    }

    /// Begins a layer; `None` while another pull writes it.
    pub(crate) fn begin(&self, digest: &Digest) -> Result<Option<PartialLayer>, OciError> {
        let path = self.dir.join(format!("{}{PARTIAL}", digest.hex()));
        let opened = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path);
        let file = opened.map_err(OciError::io("create", &path))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        // The file may have been renamed or removed before it was locked.
        let is_same =
            fs::metadata(&path).is_ok_and(|there| file.metadata().is_ok_and(|ours| there.ino() == ours.ino()));
        if !is_same {
            return Ok(None);
        }
        let partial = PartialLayer {
            file,
            path,
            target: self.dir.join(digest.hex()),
            finished: false,
        };
        partial
            .file
            .set_len(0)
            .map_err(OciError::io("truncate", &partial.path))?;
        Ok(Some(partial))
    }

    /// Removes the layers that were not used for the longest time, until all together have at most
    /// `max` bytes.
    ///
    /// # Errors
    /// [`OciError::Io`].
    pub fn prune(&self, max: Bytes) -> Result<(), OciError> {
        let mut layers = Vec::new();
        for path in self.files()?.into_iter().filter(|path| path.extension().is_none()) {
            if let Ok(meta) = path.metadata() {
                layers.push((meta.modified().map_err(OciError::io("read", &path))?, meta.len(), path));
            }
        }
        layers.sort();
        let mut total: u64 = layers.iter().map(|(_, size, _)| size).sum();
        for (_, size, path) in layers {
            if total <= max.as_u64() {
                break;
            }
            remove(&path)?;
            total -= size;
        }
        Ok(())
    }
}

fn remove(path: &Path) -> Result<(), OciError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(OciError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// A layer that is being written. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct PartialLayer {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    target: PathBuf,
    finished: bool,
}

impl PartialLayer {
    /// Gives the complete and verified layer its name, durably.
    pub(crate) fn finish(mut self) -> Result<(), OciError> {
        self.file.sync_all().map_err(OciError::io("flush", &self.path))?;
        fault_point("layer: flushed").map_err(OciError::io("flush", &self.path))?;
        fs::rename(&self.path, &self.target).map_err(OciError::io("rename to", &self.target))?;
        self.finished = true;
        fault_point("layer: in place").map_err(OciError::io("rename to", &self.target))?;
        let dir = self.target.parent().unwrap_or(Path::new("."));
        let flushed = File::open(dir).and_then(|dir| dir.sync_all());
        flushed.map_err(OciError::io("flush", dir))
    }
}

impl Drop for PartialLayer {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = remove(&self.path)
        {
            tracing::warn!(%error, "cannot remove an unfinished layer; the next pull removes it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn blob(content: &[u8]) -> Blob {
        Blob {
            digest: Digest::of(content),
            size: content.len() as u64,
        }
    }

    fn put(cache: &LayerCache, content: &[u8]) -> Blob {
        let blob = blob(content);
        let mut partial = cache.begin(&blob.digest).unwrap().unwrap();
        partial.file.write_all(content).unwrap();
        partial.finish().unwrap();
        blob
    }

    #[test]
    fn a_layer_exists_once_it_is_complete_and_is_written_by_one_pull_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let cache = LayerCache::open(dir.path()).unwrap();
        let blob = blob(b"layer");
        let mut first = cache.begin(&blob.digest).unwrap().unwrap();
        first.file.write_all(b"lay").unwrap();
        assert!(cache.begin(&blob.digest).unwrap().is_none());
        assert!(LayerCache::open(dir.path()).unwrap().get(&blob).unwrap().is_none());
        first.file.write_all(b"er").unwrap();
        first.finish().unwrap();
        assert!(cache.get(&blob).unwrap().is_some());
        let dropped = cache.begin(&Digest::of(b"other")).unwrap().unwrap();
        assert!(dropped.path.exists());
        let path = dropped.path.clone();
        drop(dropped);
        assert!(!path.exists());
    }

    #[test]
    fn leftovers_of_interrupted_pulls_are_swept_and_old_layers_pruned() {
        let dir = tempfile::tempdir().unwrap();
        let cache = LayerCache::open(dir.path()).unwrap();
        let leftover = dir.path().join("sha256/0123.partial");
        fs::write(&leftover, "half").unwrap();
        let cache = LayerCache::open(cache.dir.parent().unwrap()).unwrap();
        assert!(!leftover.exists());
        let (old, new) = (put(&cache, b"old layer"), put(&cache, b"new layer"));
        let path = cache.dir.join(old.digest.hex());
        let past = SystemTime::now() - std::time::Duration::from_secs(100);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(past)
            .unwrap();
        cache.prune(Bytes::new(10)).unwrap();
        assert!(cache.get(&old).unwrap().is_none() && cache.get(&new).unwrap().is_some());
        assert_eq!(dir.path().join("sha256").metadata().unwrap().mode() & 0o777, 0o700);
    }
}
