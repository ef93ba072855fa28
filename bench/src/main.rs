//! Measures Scalebox against the sequence it began with, in one run on one pool; `bench/run.sh`
//! sets up and takes down what it needs.
//!
//! # Layout
//!
//! | file | job |
//! |---|---|
//! | `stages` | what is measured, in order |
//! | `disks` | the four ways to make a disk |
//! | `daemon` | the daemon under test |
//! | `measure` | timing one at a time and side by side, and what the samples say |
//! | `random_writes` | fio |
//! | `report` | the table, the JSON and the chart |

mod daemon;
mod disks;
mod measure;
mod random_writes;
mod report;
mod stages;

use std::path::PathBuf;
use std::process::ExitCode;

/// Whatever goes wrong ends the run: it is told once, at the end.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let outcome = Setup::from_environment()
        .and_then(|setup| stages::run(&setup))
        .and_then(|results| report::write(&results));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What `bench/run.sh` has prepared.
pub struct Setup {
    /// The daemon's program.
    pub scaleboxd: PathBuf,
    /// A folder on the host disk, removed afterwards.
    pub scratch: PathBuf,
    /// The mounted pool.
    pub pool: PathBuf,
    /// The device it lies on.
    pub device: PathBuf,
    /// A folder on ext4 over a loop device like the pool's.
    pub ext4: PathBuf,
    /// The daemon's token.
    pub token: String,
    /// A small run: fewer samples, fewer disks, one guest.
    pub quick: bool,
}

impl Setup {
    fn from_environment() -> Outcome<Setup> {
        let read = |key: &str| std::env::var(key).map_err(|_| format!("{key} is not set: run `make bench`"));
        Ok(Setup {
            scaleboxd: read("SCALEBOXD")?.into(),
            scratch: read("SCRATCH")?.into(),
            pool: read("DATA_DIR")?.into(),
            device: read("POOL_DEVICE")?.into(),
            ext4: read("BENCH_EXT4")?.into(),
            token: read("API_TOKEN")?,
            quick: std::env::var("QUICK").is_ok_and(|quick| quick == "1"),
        })
    }
}
