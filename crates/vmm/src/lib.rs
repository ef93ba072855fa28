//! Launches, pauses, grows and stops machines.
//!
//! The traits [`Vmm`] and [`Machine`] define the operations of a hypervisor driver and their order.
//! The crate does not deal with templates, addresses or HTTP: a [`MachineSpec`] names an existing
//! disk, tap and kernel, and launching it gives a running machine that outlives the process.
//!
//! # Layout
//!
//! | file | content |
//! |---|---|
//! | [`machine`] | the traits, as a state diagram; the specification, states, events and exit reasons of a machine |
//! | `supervise/` | what the drivers share: the supervision of a machine's process |
//! | `confine/` | limits on memory, CPU and file access of a machine's process: control groups, Landlock |
//! | `qemu/` | the QEMU `microvm` driver: launch and adopt, the machine and its monitor, arguments, control socket |
//! | `firecracker/` | the Firecracker driver: launch and adopt, the machine and its monitor, API, jail, vsock |
//! | `process` | a process identified by pidfd and start time, never by pid alone |
//! | [`console`] | the console log, of bounded size |
//! | `stderr` | the hypervisor's stderr, of bounded size, also while no process reads it |
//! | `run_dir` | the files of a running machine: ownership and removal |
//! | [`accel`] | whether KVM can run guests on this host, and why not |
//! | [`error`] | the errors of this crate |

pub mod accel;
mod confine;
pub mod console;
pub mod error;
mod firecracker;
pub mod machine;
mod process;
mod qemu;
mod run_dir;
mod stderr;
mod supervise;

pub use accel::{Accel, AccelChoice, AccelSetting, accelerator, kvm_is_missing};
pub use confine::missing_confinement;
pub use console::{CONSOLE_LIMIT, console_tail};
pub use error::Error;
pub use firecracker::{FirecrackerDriver, sweep_jails};
pub use machine::{DiskLimits, ExitReason, Machine, MachineEvent, MachineSpec, MachineState, Nic, RunAs, Vmm};
pub use qemu::QemuDriver;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;
