//! Turns disk images and archives into bare ext4 images.
//!
//! The kind of a file is recognised by its content, never by its name. Disk images are read by
//! `qemu-img` and `sfdisk`, with deadlines; their file systems are only copied here, and are
//! checked when the result is imported.
//!
//! | file | contents |
//! |---|---|
//! | `recognise` | [`recognise`]: the kind of a file |
//! | `receive` | [`receive`]: stores an image that arrives as a stream |
//! | `qcow2` | qcow2 to raw, without backing files |
//! | `partitions` | the root partition of a raw disk |
//! | `fstab` | [`without_partitions`]: the mounts of a disk without its other partitions |
//! | `unreadable` | the error of a program that cannot read an image |

mod fstab;
mod partitions;
mod qcow2;
mod receive;
mod recognise;
#[cfg(test)]
mod tests;
mod unreadable;

pub use fstab::{FSTAB, without_partitions};
pub use receive::{Received, receive};
pub use recognise::{HEAD_BYTES, Kind, needs_conversion, recognise};

use crate::oci::{Made, OciError, Task, archive::Archive};
use crate::scratch::Scratch;
use std::fs::File;
use std::path::Path;

/// Turns the image `source` into a bare ext4 image below `work`. Bare and compressed ext4 images
/// need no conversion, and are rejected here.
///
/// # Errors
/// All of [`OciError`]; [`OciError::Disk`] also for kinds that cannot be converted.
pub fn convert(source: &Path, work: &Path, task: &Task) -> Result<Made, OciError> {
    // qemu-img mistakes a relative name with a colon for a protocol.
    let source = &std::path::absolute(source).map_err(OciError::io("find", source))?;
    match recognise(source)? {
        Kind::OciArchive | Kind::DockerArchive => {
            let file = File::open(source).map_err(OciError::io("open", source))?;
            Archive::open(file, task)?.build(work, task)
        }
        Kind::Qcow2 => {
            let scratch = Scratch::new(work)?;
            let raw = scratch.path().join("disk.raw");
            qcow2::convert(source, &raw, task)?;
            partitions::root_of(&raw, scratch, task)
        }
        Kind::PartitionedDisk => partitions::root_of(source, Scratch::new(work)?, task),
        Kind::Ext4 | Kind::Compressed => Err(OciError::Disk("it needs no conversion: import it as it is".to_owned())),
        Kind::Tar => Err(OciError::Disk(
            "it is a tar archive, but neither an OCI archive nor one of docker save: extract it, and make an ext4 \
             image of the files with mke2fs -d"
                .to_owned(),
        )),
        Kind::Unknown => Err(OciError::Disk(
            "its format is unknown; known are ext4, disks with GPT or MBR, qcow2, OCI archives and docker save"
                .to_owned(),
        )),
    }
}
