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
//! | `machine` | the traits [`Vmm`] and [`Machine`], as a state diagram, and rules about blocking |
//! | `spec` | the specification of a machine |
//! | `state` | the states, events and ends of a machine |
//! | `supervise/` | the supervision of a machine's process, which the drivers share |
//! | `confine/` | limits on memory, CPU and file access of a machine's process: control groups, Landlock |
//! | `qemu/` | the QEMU `microvm` driver: launch and adopt, commands and events, arguments, control socket |
//! | `firecracker/` | the Firecracker driver: launch and adopt, commands, API socket, jail, vsock |
//! | `process` | a process identified by pidfd and start time, never by pid alone |
//! | `program` | finds the programs of the hypervisors, and their versions |
//! | `console` | the console log, of bounded size |
//! | `stderr` | the hypervisor's stderr, of bounded size, also while no process reads it |
//! | `run_dir` | the files of a running machine: ownership and removal |
//! | `accel` | detects whether KVM can run guests on this host |
//! | `blocking` | runs file work off the runtime's threads |
//! | `error` | the errors of this crate |

mod accel;
mod blocking;
mod confine;
mod console;
mod error;
mod firecracker;
mod machine;
mod process;
mod program;
mod qemu;
mod run_dir;
mod spec;
mod state;
mod stderr;
mod supervise;

pub use accel::{Accel, AccelChoice, AccelSetting, accelerator, kvm_is_missing};
pub use confine::missing_confinement;
pub use console::{CONSOLE_LIMIT, ConsoleReader, console_tail};
pub use error::{Error, Result};
pub use firecracker::{FirecrackerDriver, sweep_jails};
pub use machine::{Channel, Machine, Vmm};
pub use qemu::QemuDriver;
pub use spec::{DiskLimits, MAX_CMDLINE, MAX_SOCKET_NAME, MIN_MEMORY_MIB, MachineSpec, Nic, RunAs};
pub use state::{ExitReason, MachineEvent, MachineState};
