//! qcow2 to raw, with `qemu-img`.
//!
//! A qcow2 image can name other files as its backing file or data file, which `qemu-img` would then
//! read with the rights of this process. Therefore its description is checked first, and the
//! conversion names the format, so that nothing is probed.

use crate::convert::unreadable::unreadable;
use crate::oci::{OciError, Phase, Task};
use crate::programs::QEMU_IMG;
use scalebox_programs::Run;
use scalebox_units::Bytes;
use serde::Deserialize;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// The slowest conversion, in bytes a second.
const MIN_SPEED: u64 = 8 << 20;
const INFO_LIMIT: Duration = Duration::from_secs(30);

/// The parts of the output of `qemu-img info` that matter.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    format: String,
    virtual_size: u64,
    backing_filename: Option<String>,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    format_specific: Specific,
}

#[derive(Debug, Default, Deserialize)]
struct Specific {
    #[serde(default)]
    data: Data,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Data {
    data_file: Option<String>,
    #[serde(default)]
    corrupt: bool,
}

/// Converts the image `source` to the new file `raw`.
pub(super) fn convert(source: &Path, raw: &Path, task: &Task) -> Result<(), OciError> {
    let info = info(source)?;
    check(&info).map_err(|reason| OciError::Disk(format!("its qcow2 image {reason}")))?;
    if info.virtual_size > task.limits.max_disk.as_u64() {
        return Err(OciError::TooLarge {
            what: "the disk in the qcow2 image".to_owned(),
            limit: task.limits.max_disk,
        });
    }
    let stored = fs::metadata(source).map_err(OciError::io("read", source))?.size();
    task.check()?;
    // Compressed clusters can become larger than the image; zeros are not written.
    let _room = task.reserve(info.virtual_size.min(stored.saturating_mul(task.limits.max_ratio)))?;
    task.progress(Phase::Unpack, 0, info.virtual_size);
    let limit = Duration::from_secs(300 + info.virtual_size / MIN_SPEED);
    Run::of(QEMU_IMG.within(limit))
        .args(["convert", "-f", "qcow2", "-O", "raw", "-S", "4k", "--"])
        .args([source, raw])
        .stdout()
        .map_err(|error| unreadable(error, source))?;
    task.progress(Phase::Unpack, info.virtual_size, info.virtual_size);
    let written = fs::metadata(raw).map_err(OciError::io("read", raw))?.len();
    match Bytes::new(written) == Bytes::new(info.virtual_size) {
        true => Ok(()),
        false => Err(OciError::Disk("qemu-img did not write all of it".to_owned())),
    }
}

fn info(source: &Path) -> Result<Info, OciError> {
    // No lock: the file is not written, and a lock of another reader does not matter.
    let text = Run::of(QEMU_IMG.within(INFO_LIMIT))
        .args(["info", "--output=json", "-U", "-f", "qcow2", "--"])
        .args([source])
        .stdout()
        .map_err(|error| unreadable(error, source))?;
    serde_json::from_str(&text).map_err(|error| OciError::Disk(format!("qemu-img cannot read it: {error}")))
}

/// Rejects images that refer to other files, or cannot be read. The text continues "its qcow2 image
/// …".
fn check(info: &Info) -> Result<(), &'static str> {
    if info.format != "qcow2" {
        return Err("has another format inside");
    }
    if info.backing_filename.is_some() {
        return Err("has a backing file; flatten it with qemu-img convert -O qcow2");
    }
    if info.format_specific.data.data_file.is_some() {
        return Err("has an external data file; convert it with qemu-img convert -O qcow2");
    }
    if info.encrypted {
        return Err("is encrypted");
    }
    match info.format_specific.data.corrupt {
        true => Err("is marked as corrupt; repair it with qemu-img check -r all"),
        false => Ok(()),
    }
}
