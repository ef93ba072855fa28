//! Compares Scalebox with the commands of the original system, in one run on one pool.
//! `bench/run.sh` prepares the scratch folder and cleans up.
//!
//! # Layout
//!
//! | file | job |
//! |---|---|
//! | `groups` | the groups of rows, and the choice of them |
//! | `stages` | runs the measurements in order |
//! | `disks` | four methods to create a disk |
//! | `daemon` | the daemon under test |
//! | `setup` | reads the environment that `bench/run.sh` has prepared |
//! | `outcome` | the result of a step |
//! | `guest` | measures boots, and a running guest |
//! | `boot` | measures a guest's way to SSH, and to its first command |
//! | `execs` | measures commands in a guest |
//! | `transfers` | measures files to and from a guest |
//! | `images` | makes container images and pushes them |
//! | `pull` | measures a pull from a registry |
//! | `command` | runs the programs to compare with |
//! | `measure` | measures operations, sequential or concurrent |
//! | `wait` | waits for something to happen |
//! | `random_writes` | random writes with fio |
//! | `report` | the table, the JSON and the chart |

mod boot;
mod command;
mod daemon;
mod disks;
mod execs;
mod groups;
mod guest;
mod images;
mod measure;
mod outcome;
mod pull;
mod random_writes;
mod report;
mod setup;
mod stages;
mod transfers;
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
