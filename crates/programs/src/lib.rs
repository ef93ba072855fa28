//! Runs outside programs. Scalebox starts all programs that it waits for through this crate.
//!
//! A program is called with an argument vector, never through a shell, and with a fixed `PATH` and
//! locale. No program is trusted to end by itself, because some read file systems that guests have
//! written. Each has a limit on its output, most have a time limit, and each is killed when the
//! thread that waits for it ends. A program over its limits is killed together with its children.
//!
//! Exit status and standard error together decide whether a program succeeded: several exit with 0
//! after printing an error. [`Run::output`] returns both for the caller to judge.
//!
//! Machines are launched by `vmm`, because they outlive the thread that starts them.
//!
//! # Layout
//!
//! | file | contents |
//! |---|---|
//! | `program` | [`Program`]: name, package and time limit; [`require`] |
//! | `run` | [`Run`]: one run of a program, with its arguments and limits |
//! | `supervise` | feeds and reads a running program, and kills it over its limits |
//! | `stop` | [`Stop`]: ends a run from outside |
//! | `error` | [`ProgramError`] |
//!
//! # Example
//!
//! ```
//! use scalebox_programs::{Program, Run};
//! use std::time::Duration;
//!
//! const SORT: Program = Program::new("sort", "coreutils").within(Duration::from_secs(10));
//! let sorted = Run::of(SORT).args(["--reverse"]).input("1\n2\n").stdout()?;
//! assert_eq!(sorted, "2\n1\n");
//! # Ok::<(), scalebox_programs::ProgramError>(())
//! ```

mod error;
mod program;
mod run;
mod stop;
mod supervise;

pub use error::ProgramError;
pub use program::{Program, require};
pub use run::Run;
pub use stop::Stop;
