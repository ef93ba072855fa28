//! The operations on the images of a pool.

use crate::error::StorageError;
use crate::image::defragment::defragment;
use crate::image::ext4;
use crate::image::scrub::{self, Scrub};
use crate::local::signature::probe;
use scalebox_units::Bytes;
use std::fs::File;
use std::io;
use std::path::Path;

/// The contents of a pool's images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Images {
    /// Bare ext4 file systems.
    Ext4,
    /// Any contents, in a simulated pool: images are copied and made longer, never inspected.
    #[cfg(feature = "simulated")]
    Opaque,
}

impl Images {
    /// Fails unless the image at `path` can become a template. `what` names it in the error.
    ///
    /// # Errors
    /// [`StorageError::NotATemplate`] with the reason.
    pub(crate) fn require_template(self, what: &str, path: &Path) -> Result<(), StorageError> {
        match self {
            Images::Ext4 => require_bare_ext4(what, path),
            #[cfg(feature = "simulated")]
            Images::Opaque => Ok(()),
        }
    }

    /// Calls [`ext4::repair`] if the images are ext4.
    pub(crate) fn repair(self, path: &Path) -> Result<(), StorageError> {
        match self {
            Images::Ext4 => ext4::repair(path),
            #[cfg(feature = "simulated")]
            Images::Opaque => Ok(()),
        }
    }

    /// Calls [`ext4::check`] if the images are ext4.
    pub(crate) fn check(self, path: &Path) -> Result<(), StorageError> {
        match self {
            Images::Ext4 => ext4::check(path),
            #[cfg(feature = "simulated")]
            Images::Opaque => Ok(()),
        }
    }

    /// Calls [`ext4::fills`] if the images are ext4.
    pub(crate) fn fills(self, image: &File) -> Result<bool, StorageError> {
        match self {
            Images::Ext4 => ext4::fills(image),
            #[cfg(feature = "simulated")]
            Images::Opaque => Ok(true),
        }
    }

    /// Calls [`ext4::cannot_grow`] if the images are ext4.
    pub(crate) fn cannot_grow(self, image: &File) -> Result<Option<&'static str>, StorageError> {
        match self {
            Images::Ext4 => ext4::cannot_grow(image),
            #[cfg(feature = "simulated")]
            Images::Opaque => Ok(None),
        }
    }

    /// Grows the image `path`, open as `image`, and its file system to `size`; see [`ext4::grow`].
    /// Returns a clone of the image before the growth, for [`Images::finish_growth`], if that
    /// compares them.
    pub(crate) fn grow(self, path: &Path, image: &File, size: Bytes) -> Result<Option<File>, StorageError> {
        match self {
            Images::Ext4 => ext4::grow(path, image, size).map(Some),
            #[cfg(feature = "simulated")]
            Images::Opaque => {
                let grown = image.set_len(size.as_u64());
                grown.map_err(|error| StorageError::io("resize", path.display(), error))?;
                Ok(None)
            }
        }
    }

    /// Calls [`ext4::finish_growth`] if the images are ext4.
    pub(crate) fn finish_growth(self, path: &Path, image: &File, before: Option<&File>) -> Result<(), StorageError> {
        before.map_or(Ok(()), |before| ext4::finish_growth(path, image, before))
    }

    /// Calls [`defragment`] if the images are ext4.
    pub(crate) fn defragment(self, image: &File) -> io::Result<()> {
        match self {
            Images::Ext4 => defragment(image),
            #[cfg(feature = "simulated")]
            Images::Opaque => Ok(()),
        }
    }

    /// Calls [`scrub::remove`] if the images are ext4.
    pub(crate) fn scrub(self, path: &Path, image: &File, scrub: &Scrub<'_>) -> Result<(), StorageError> {
        match self {
            Images::Ext4 => scrub::remove(path, image, scrub),
            #[cfg(feature = "simulated")]
            Images::Opaque => Ok(()),
        }
    }
}

fn require_bare_ext4(what: &str, path: &Path) -> Result<(), StorageError> {
    let reason = match probe(path)?.map(|found| found.kind).as_deref() {
        Some("ext4" | "ext3" | "ext2") => return Ok(()),
        Some(table) if table.contains("partition table") => format!(
            "it is a whole disk with {table}: extract its root partition, which must be ext4, to a separate file"
        ),
        Some(kind) => format!("it contains {kind}: a template is a bare ext4 file system"),
        None => "it contains no file system: a template is a bare ext4 file system".to_owned(),
    };
    Err(StorageError::not_a_template(what, reason))
}
