//! Compares Scalebox with the commands of the original system, in one run on one pool.
//! `bench/run.sh` prepares the scratch folder and cleans up.
//!
//! # Layout
//!
//! | file | job |
//! |---|---|
//! | `stages` | runs the measurements in order |
//! | `disks` | four methods to create a disk |
//! | `daemon` | the daemon under test |
//! | `setup` | reads the environment that `bench/run.sh` has prepared |
//! | `outcome` | the result of a step |
//! | `boot` | measures the time of a guest to SSH |
//! | `measure` | measures operations, sequential or concurrent |
//! | `wait` | waits for something to happen |
//! | `random_writes` | random writes with fio |
//! | `report` | the table, the JSON and the chart |

mod boot;
mod daemon;
mod disks;
mod measure;
mod outcome;
mod random_writes;
mod report;
mod setup;
mod stages;
mod wait;

use setup::Setup;
use std::process::ExitCode;

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
