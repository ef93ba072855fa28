//! Compares Scalebox with the original's sequence of commands, in one run on one pool.
//! `bench/run.sh` sets up what it needs and cleans up.
//!
//! # Layout
//!
//! | file | job |
//! |---|---|
//! | `stages` | runs the measurements in order |
//! | `disks` | four methods to create a disk |
//! | `daemon` | the daemon under test |
//! | `measure` | measures operations, sequential or concurrent |
//! | `random_writes` | random writes with fio |
//! | `report` | the table, the JSON and the chart |

mod daemon;
mod disks;
mod measure;
mod random_writes;
mod report;
mod stages;

use std::path::PathBuf;
use std::process::ExitCode;

/// The result of a step. An error ends the run and is reported at its end.
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

/// The environment that `bench/run.sh` has prepared.
pub struct Setup {
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
    /// Whether to do a small run: fewer samples, fewer disks, one guest.
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
