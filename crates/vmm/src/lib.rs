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
//! | [`accel`] | whether KVM can run guests on this host, and why not |
//! | [`console`] | the console log, of bounded size |
//! | [`error`] | the errors of this crate |
//! | `qemu` | the QEMU `microvm` driver: launch and adopt, each step with its undo |
//! | `qemu_machine` | a running QEMU machine: its commands, and the monitor task that cleans up after it |
//! | `arguments` | QEMU's argument vector for a [`MachineSpec`] (pure) |
//! | `command` | runs the QEMU binary |
//! | `qmp` | QEMU's control socket; every command has a timeout |
//! | `agent` | shutdown through the guest agent |
//! | `firecracker` | the Firecracker driver: launch and adopt |
//! | `firecracker_machine` | a running Firecracker machine, and its monitor task |
//! | `firecracker_api` | Firecracker's API socket: every request, in order |
//! | `firecracker_command` | runs the Firecracker binary and its jailer |
//! | `jail` | the folder to which the jailer confines a process |
//! | `vsock` | connections to a guest's vsock under Firecracker |
//! | `confinement`, `cgroup`, `landlock` | limits on memory, CPU and file access of a machine's process |
//! | `process` | a process identified by pidfd and start time, never by pid alone |
//! | `stderr` | the hypervisor's stderr, of bounded size, also while no process reads it |
//! | `run_dir` | the files of a running machine: ownership and removal |

pub mod accel;
mod agent;
mod arguments;
mod cgroup;
mod command;
mod confinement;
pub mod console;
pub mod error;
mod firecracker;
mod firecracker_api;
mod firecracker_command;
mod firecracker_machine;
mod jail;
mod landlock;
pub mod machine;
mod process;
mod qemu;
mod qemu_machine;
mod qmp;
mod run_dir;
mod stderr;
mod vsock;

pub use accel::{Accel, AccelChoice, AccelSetting, accelerator, kvm_is_missing};
pub use confinement::missing_confinement;
pub use console::{CONSOLE_LIMIT, console_tail};
pub use error::Error;
pub use firecracker::FirecrackerDriver;
pub use jail::sweep_jails;
pub use machine::{DiskLimits, ExitReason, Machine, MachineEvent, MachineSpec, MachineState, Nic, RunAs, Vmm};
pub use qemu::QemuDriver;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;
