//! Grows a machine's root disk.

use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::supervise::supervised::Supervised;
use scalebox_units::Bytes;

/// Unit of disk sizes, in bytes: virtio counts in sectors (virtio 1.2, section 5.2.4).
const SECTOR_BYTES: u64 = 512;

impl Supervised {
    /// Implements [`Machine::resize_root`](crate::Machine::resize_root). `grow` resizes the disk's
    /// file and the hypervisor's device to the given size in bytes.
    pub(crate) async fn grow_root<F>(&self, size: Bytes, grow: impl FnOnce(i64) -> F) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        let mut max_requested = self.max_requested.lock().await;
        let bytes = self.check_growth(*max_requested, size).await?;
        // The maximum is updated before the request is sent: if this future is dropped, the request
        // may still have arrived.
        *max_requested = size;
        grow(bytes).await
    }

    /// Returns the size in bytes. Rejects a size below the disk's or below the largest size
    /// requested so far, and a size that is not a multiple of the sector size.
    async fn check_growth(&self, max_requested: Bytes, size: Bytes) -> Result<i64> {
        let invalid = |why| Error::Spec {
            id: self.id.clone(),
            what: "size",
            why,
        };
        let root = self.root.clone();
        let metadata = blocking(move || root.metadata()).await;
        let length = metadata.map_err(Error::io("read the metadata of", &self.root))?.len();
        let min = Bytes::new(length).max(max_requested);
        if size < min {
            return Err(invalid(format!(
                "{size} is less than the disk's {min}; disks cannot shrink"
            )));
        }
        match i64::try_from(size.as_u64()) {
            Ok(bytes) if size.as_u64().is_multiple_of(SECTOR_BYTES) => Ok(bytes),
            _ => Err(invalid(format!(
                "{} bytes is not a multiple of {SECTOR_BYTES}",
                size.as_u64()
            ))),
        }
    }
}
