//! Reads the environment that `bench/run.sh` has prepared.

use crate::groups::Group;
use crate::outcome::Outcome;
use std::path::PathBuf;

/// The environment that `bench/run.sh` has prepared.
pub(crate) struct Setup {
    /// Path of the daemon's program.
    pub scaleboxd: PathBuf,
    /// A folder on the host disk, removed afterwards.
    pub scratch: PathBuf,
    /// Mount point of the pool.
    pub pool: PathBuf,
    /// Device of the pool.
    pub device: PathBuf,
    /// A folder on ext4 over a loop device like the pool's.
    pub ext4: PathBuf,
    /// The daemon's token.
    pub token: String,
    /// Host and port of a container registry without a password.
    pub registry: String,
    /// `true` for a small run: fewer samples, fewer disks, one guest.
    pub quick: bool,
    /// The groups to measure.
    pub groups: Vec<Group>,
}

impl Setup {
    /// Reads the variables that `bench/run.sh` exports.
    ///
    /// # Errors
    /// A variable is not set, or `ROWS` has an unknown group.
    pub(crate) fn from_environment() -> Outcome<Setup> {
        let read = |key: &str| std::env::var(key).map_err(|_| format!("{key} is not set: run `make bench`"));
        Ok(Setup {
            scaleboxd: read("SCALEBOXD")?.into(),
            scratch: read("SCRATCH")?.into(),
            pool: read("DATA_DIR")?.into(),
            device: read("POOL_DEVICE")?.into(),
            ext4: read("BENCH_EXT4")?.into(),
            token: read("API_TOKEN")?,
            registry: read("REGISTRY")?,
            quick: std::env::var("QUICK").is_ok_and(|quick| quick == "1"),
            groups: Group::parse(&std::env::var("ROWS").unwrap_or_default())?,
        })
    }
}
