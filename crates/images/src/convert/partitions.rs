//! The root partition of a raw disk.
//!
//! `sfdisk` reads the table, in a process of its own with a deadline: the Rust libraries for GPT
//! and MBR allocate as much memory as the table specifies (gptman 3.1), or follow a ring of
//! extended partitions for ever (mbrman 0.6).

use crate::convert::unreadable::unreadable;
use crate::oci::{Made, OciError, Phase, Task};
use crate::programs::SFDISK;
use crate::scratch::Scratch;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use scalebox_programs::Run;
use scalebox_units::Init;
use serde::Deserialize;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// The type of the root partition for x86-64 (Discoverable Partitions Specification).
const ROOT_X86_64: &str = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709";
const LIMIT: Duration = Duration::from_secs(30);
/// Bytes copied at a time.
const CHUNK: u64 = 1 << 20;
/// Smallest ext4 file system.
const MIN_SIZE: u64 = 64 << 10;

#[derive(Debug, Deserialize)]
struct Output {
    partitiontable: Table,
}

#[derive(Debug, Deserialize)]
struct Table {
    #[serde(default = "default_sector")]
    sectorsize: u64,
    #[serde(default)]
    partitions: Vec<Partition>,
}

fn default_sector() -> u64 {
    512
}

#[derive(Debug, Clone, Deserialize)]
struct Partition {
    /// In sectors.
    start: u64,
    /// In sectors.
    size: u64,
    #[serde(rename = "type")]
    kind: String,
}

/// A range of a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    at: u64,
    size: u64,
}

/// Copies the root partition of the disk `raw` to a bare ext4 image in `scratch`.
pub(super) fn root_of(raw: &Path, scratch: Scratch, task: &Task) -> Result<Made, OciError> {
    let disk = File::open(raw).map_err(OciError::io("open", raw))?;
    let table = read_table(raw)?;
    let failed = OciError::io("read", raw);
    let root = choose(&disk, &table)
        .map_err(failed)?
        .ok_or_else(|| OciError::Disk("no partition has an ext4 file system; templates need one".to_owned()))?;
    if root.size > task.limits.max_disk.as_u64() {
        return Err(OciError::TooLarge {
            what: "the root partition".to_owned(),
            limit: task.limits.max_disk,
        });
    }
    let image = scratch.path().join("image.ext4");
    copy(&disk, root, &image, task)?;
    Ok(Made {
        image,
        config: None,
        init: Init::System,
        reference: None,
        digest: None,
        _scratch: scratch,
    })
}

fn read_table(raw: &Path) -> Result<Table, OciError> {
    let text = Run::of(SFDISK.within(LIMIT))
        .args(["--json", "--"])
        .args([raw])
        .stdout()
        .map_err(|error| unreadable(error, raw))?;
    let output: Output = serde_json::from_str(&text)
        .map_err(|error| OciError::Disk(format!("sfdisk cannot read its partition table: {error}")))?;
    Ok(output.partitiontable)
}

/// Returns the partition with the root: by its type, or else the largest with ext4.
fn choose(disk: &File, table: &Table) -> io::Result<Option<Range>> {
    let length = disk.metadata()?.len();
    let mut best: Option<(bool, Range)> = None;
    for partition in &table.partitions {
        let bytes = |sectors: u64| sectors.checked_mul(table.sectorsize);
        let (Some(at), Some(size)) = (bytes(partition.start), bytes(partition.size)) else {
            continue;
        };
        let inside = at.checked_add(size).is_some_and(|end| end <= length);
        if !inside || size < MIN_SIZE || !is_ext4(disk, at)? {
            continue;
        }
        let candidate = (partition.kind.eq_ignore_ascii_case(ROOT_X86_64), Range { at, size });
        let is_better = |(typed, range): (bool, Range)| (candidate.0, size) > (typed, range.size);
        if best.is_none_or(is_better) {
            best = Some(candidate);
        }
    }
    Ok(best.map(|(_, range)| range))
}

fn is_ext4(disk: &File, at: u64) -> io::Result<bool> {
    let mut magic = [0; 2];
    disk.read_exact_at(&mut magic, at + 1080)?;
    Ok(magic == [0x53, 0xef])
}

/// Copies the data of a range; holes stay holes.
fn copy(disk: &File, range: Range, image: &Path, task: &Task) -> Result<(), OciError> {
    let target = File::create_new(image).map_err(OciError::io("create", image))?;
    let write = |error| OciError::io("write", image)(error);
    target.set_len(range.size).map_err(write)?;
    let _room = task.reserve(data_in(disk, range).map_err(write)?)?;
    let (end, mut done) = (range.at + range.size, range.at);
    let mut buffer = vec![0; CHUNK as usize];
    while let Some(start) = next_data(disk, done, end).map_err(write)? {
        task.check()?;
        let length = CHUNK.min(end - start) as usize;
        disk.read_exact_at(&mut buffer[..length], start).map_err(write)?;
        for (index, block) in buffer[..length].chunks(4096).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                let at = start - range.at + index as u64 * 4096;
                target.write_all_at(block, at).map_err(write)?;
            }
        }
        done = start + length as u64;
        task.progress(Phase::Write, done - range.at, range.size);
    }
    target.sync_all().map_err(write)
}

/// Returns the start of the next data in a range.
fn next_data(disk: &File, from: u64, end: u64) -> io::Result<Option<u64>> {
    match seek(disk, SeekFrom::Data(from)) {
        Ok(at) if at < end => Ok(Some(at)),
        Ok(_) | Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Returns the number of bytes of data in a range.
fn data_in(disk: &File, range: Range) -> io::Result<u64> {
    let (end, mut at, mut total) = (range.at + range.size, range.at, 0);
    while at < end
        && let Some(start) = next_data(disk, at, end)?
    {
        at = seek(disk, SeekFrom::Hole(start)).map_err(io::Error::from)?;
        total += at.min(end) - start;
    }
    Ok(total)
}
