//! From the layers of an image to its file system.

use crate::oci::digest::Digest;
use crate::oci::error::OciError;
use crate::oci::ext4;
use crate::oci::manifest::Configuration;
use crate::oci::task::Task;
use crate::oci::unpack::{StoredLayer, Unpacker};
use crate::scratch::Scratch;
use scalebox_units::ImageConfig;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A layer as it is stored, compressed or not.
pub(crate) type Stored = Box<dyn Read>;

/// A file system that was made of an image, in a folder that is removed with this value.
#[derive(Debug)]
pub struct Made {
    /// A bare, sparse ext4 image, cleanly unmounted and checked.
    pub image: PathBuf,
    /// The settings of the image; `None` if it was a disk image, which has none.
    pub config: Option<ImageConfig>,
    /// The complete reference that was pulled.
    pub reference: Option<String>,
    /// The digest of the manifest, or list of manifests, that the reference stood for.
    pub digest: Option<Digest>,
    /// Keeps the file.
    pub(crate) _scratch: Scratch,
}

/// Makes the file system of an image, from its lowest layer on. `stored` is the size of all layers.
pub(crate) fn build(
    layers: impl Iterator<Item = Result<Stored, OciError>>,
    configuration: Configuration,
    stored: u64,
    work: &Path,
    task: &Task,
) -> Result<Made, OciError> {
    let scratch = Scratch::new(work)?;
    let image = scratch.path().join("image.ext4");
    let mut unpacker = Unpacker::new(task, scratch.path(), stored)?;
    for (index, (layer, diff_id)) in layers.zip(configuration.diff_ids).enumerate() {
        let data = layer?;
        unpacker.layer(index + 1, StoredLayer { data, diff_id })?;
    }
    ext4::write(unpacker.finish(), &image, task)?;
    Ok(Made {
        image,
        config: Some(configuration.config),
        reference: None,
        digest: None,
        _scratch: scratch,
    })
}
