//! Pools for tests of other crates: in any folder, without root and without outside programs.

use crate::admission::Bounds;
use crate::error::StorageError;
use crate::image::images::Images;
use crate::local::backing::ActualBacking;
use crate::local::pool_fs::PoolFs;
use crate::local::simulated::SimulatedSpace;
use crate::pool::Pool;
use std::fs::{self, File};
use std::path::Path;

impl Pool {
    /// Opens the simulated pool in the folder `dir`, and creates its folders if necessary.
    ///
    /// It behaves like a pool on an existing file system, with these differences: Its space is that
    /// of the handle `space`, which the test keeps. A clone is a copy. An image can have any
    /// contents: growing one only makes it longer, and a snapshot keeps all of them.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn simulated(dir: &Path, bounds: Bounds, space: SimulatedSpace) -> Result<Pool, StorageError> {
        let folder = File::open(dir).map_err(|error| StorageError::io("open", dir.display(), error))?;
        let place = (ActualBacking::Existing, "/dev/null".into());
        let mut pool = Pool::new(dir, folder, PoolFs::Simulated(space), place, bounds);
        pool.images = Images::Opaque;
        for folder in [pool.templates_dir(), pool.disks_dir(), pool.kernels_dir()] {
            fs::create_dir_all(&folder).map_err(|error| StorageError::io("create", folder.display(), error))?;
        }
        Ok(pool)
    }
}
