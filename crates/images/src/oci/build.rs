//! From the layers of an image to its file system.

use crate::oci::digest::Digest;
use crate::oci::error::OciError;
use crate::oci::ext4;
use crate::oci::manifest::Configuration;
use crate::oci::task::Task;
use crate::oci::tree::Tree;
use crate::oci::unpack::{StoredLayer, Unpacker};
use crate::scratch::Scratch;
use scalebox_units::{ImageConfig, Init};
use std::io::Read;
use std::path::{Path, PathBuf};

/// A layer as it is stored, compressed or not.
pub(crate) type Stored = Box<dyn Read>;

/// A file system that was made from an image, in a folder that is removed with this value.
#[derive(Debug)]
pub struct Made {
    /// A bare, sparse ext4 image, cleanly unmounted and checked.
    pub image: PathBuf,
    /// The settings of the image; `None` if it was a disk image, which has none.
    pub config: Option<ImageConfig>,
    /// The first process of its VMs.
    pub init: Init,
    /// The complete reference that was pulled.
    pub reference: Option<String>,
    /// The digest of the manifest, or list of manifests, that the reference resolved to.
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
    let mut unpacked = unpacker.finish();
    let init = init_of(&mut unpacked.tree);
    ext4::write(unpacked, &image, task)?;
    Ok(Made {
        image,
        config: Some(configuration.config),
        init,
        reference: None,
        digest: None,
        _scratch: scratch,
    })
}

/// Returns whether an image has an init system. The init of busybox counts only with OpenRC: the
/// images of Alpine have the program, but no services for it to start.
fn init_of(tree: &mut Tree) -> Init {
    match tree.file_at(b"/sbin/init") {
        None => Init::Agent,
        Some(name) if name == b"busybox" && tree.file_at(b"/sbin/openrc").is_none() => Init::Agent,
        Some(_) => Init::System,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::tree::{Body, Meta, ROOT};

    #[test]
    fn an_init_system_is_recognized_through_links() {
        let mut tree = Tree::new();
        let file = |tree: &mut Tree, path: &str| {
            let parts: Vec<&[u8]> = path.split('/').map(str::as_bytes).collect();
            let (name, parents) = parts.split_last().unwrap();
            let folder = tree.walk(parents, Some(1)).unwrap().unwrap();
            tree.add(folder, name.to_vec(), 1, Meta::folder(0o755), Body::File(None, 0));
        };
        let link = |tree: &mut Tree, path: &str, target: &str| {
            let (folder, name) = path.split_once('/').unwrap();
            let folder = tree.walk(&[folder.as_bytes()], Some(1)).unwrap().unwrap();
            let body = Body::Symlink(target.as_bytes().to_vec());
            tree.add(folder, name.as_bytes().to_vec(), 1, Meta::folder(0o777), body);
        };
        assert_eq!(init_of(&mut tree), Init::Agent);
        link(&mut tree, "usr/sbin", "../sbin");
        file(&mut tree, "bin/busybox");
        link(&mut tree, "sbin/init", "/bin/busybox");
        assert_eq!(init_of(&mut tree), Init::Agent);
        file(&mut tree, "sbin/openrc");
        assert_eq!(init_of(&mut tree), Init::System);
        link(&mut tree, "sbin/init", "../lib/systemd/systemd");
        assert_eq!(init_of(&mut tree), Init::Agent, "it leads nowhere");
        file(&mut tree, "lib/systemd/systemd");
        assert_eq!(init_of(&mut tree), Init::System);
        assert!(tree.folder(ROOT).unwrap().contains_key(b"usr".as_slice()));
    }
}
