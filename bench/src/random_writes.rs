//! Measures 4 KiB random writes with fio: each block of a file once per pass, in three passes.

use crate::outcome::Outcome;
use crate::setup::Setup;
use rustix::fs::ioctl_ficlone;
use serde::Serialize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The random write rates of a file.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Passes {
    /// Description of the file in tables.
    pub on: &'static str,
    /// Writes per second of each pass.
    pub iops: Vec<f64>,
}

const FILE_SIZE_MIB: usize = 256;
const PASSES: usize = 3;
/// Time limit of a pass, after which it ends without writing every block, on a slow or busy disk.
const MAX_PASS_SECONDS: u32 = 12;

/// Measures four files. Each is written completely before the measurement; a clone shares all its
/// blocks at first.
pub(crate) fn run(setup: &Setup) -> Outcome<Vec<Passes>> {
    let cow_folder = setup.pool.join("bench-cow");
    fs::create_dir(&cow_folder)?;
    let (templates, vms) = (setup.pool.join("templates"), setup.pool.join("vms"));
    let files = [
        (
            "a clone in the pool",
            clone(&templates.join(".bench-fio.partial"), vms.join("bench-fio.ext4"))?,
        ),
        ("ext4 on a loop device", filled(setup.ext4.join("fio"))?),
        ("the host disk", filled(setup.scratch.join("fio"))?),
        (
            "a clone without NOCOW",
            clone(&cow_folder.join("source"), cow_folder.join("clone"))?,
        ),
    ];
    let mut measured = Vec::new();
    for (on, path) in &files {
        let iops: Outcome<Vec<f64>> = (0..PASSES).map(|_| pass(path)).collect();
        measured.push(Passes { on, iops: iops? });
    }
    for (_, path) in files {
        fs::remove_file(path)?;
    }
    fs::remove_file(templates.join(".bench-fio.partial"))?;
    fs::remove_dir_all(cow_folder)?;
    Ok(measured)
}

fn filled(path: PathBuf) -> Outcome<PathBuf> {
    let size = format!("--size={FILE_SIZE_MIB}M");
    fio(&path, &["--rw=write", "--bs=1M", "--iodepth=4", "--end_fsync=1", &size])?;
    Ok(path)
}

fn clone(source: &Path, target: PathBuf) -> Outcome<PathBuf> {
    let source = File::open(filled(source.to_owned())?)?;
    let clone = File::create_new(&target)?;
    ioctl_ficlone(&clone, &source)?;
    clone.sync_all()?;
    Ok(target)
}

fn pass(path: &Path) -> Outcome<f64> {
    let size = format!("--size={FILE_SIZE_MIB}M");
    let runtime = format!("--runtime={MAX_PASS_SECONDS}");
    let report = fio(path, &["--rw=randwrite", "--bs=4k", "--iodepth=16", &size, &runtime])?;
    report["jobs"][0]["write"]["iops"]
        .as_f64()
        .ok_or_else(|| "fio's report has no IOPS".into())
}

fn fio(path: &Path, args: &[&str]) -> Outcome<serde_json::Value> {
    let output = Command::new("fio")
        .arg(format!("--filename={}", path.display()))
        .args([
            "--name=bench",
            "--ioengine=libaio",
            "--direct=1",
            "--output-format=json",
        ])
        .args(args)
        .output()
        .map_err(|error| format!("cannot run fio: {error}; install it with scripts/deps.sh"))?;
    if !output.status.success() {
        return Err(format!("fio failed: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
