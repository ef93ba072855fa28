//! Starting, pausing, growing and stopping a machine.
//!
//! One trait pair, [`Vmm`] and [`Machine`], says what a hypervisor has to do for Scalebox and in
//! which order it is asked; drivers stand under it. The crate knows nothing of templates, addresses
//! or HTTP: a [`MachineSpec`] names a disk, a tap and a kernel that exist already, and what comes
//! back is a running machine that outlives the process that launched it.
//!
//! # Layout
//!
//! | file | idea |
//! |---|---|
//! | [`machine`] | the trait as a state machine; what a machine is made of, the states it is in, how it ends |
//! | [`accel`] | whether KVM can run guests here, and why not |
//! | [`console`] | the console's log: bounded whatever the guest prints |
//! | [`error`] | what can go wrong, and the way out |
//! | `qemu` | the QEMU `microvm` driver: launch and adopt, each step with its undo |
//! | `qemu_machine` | a running machine: its commands, and the attendant that watches it and cleans up |
//! | `arguments` | a [`MachineSpec`] as QEMU's argument vector (pure) |
//! | `command` | the only door to the QEMU binary |
//! | `qmp` | QEMU's control socket, every command with a deadline |
//! | `agent` | the guest agent's own shutdown |
//! | `firecracker` | the Firecracker driver: launch and adopt |
//! | `firecracker_machine` | a running Firecracker machine, and its attendant |
//! | `firecracker_api` | Firecracker's API socket: every request, in order |
//! | `firecracker_command` | the only door to the Firecracker binary and its jailer |
//! | `jail` | the folder that the jailer locks a process into |
//! | `vsock` | a guest's vsock, as Firecracker shows it on the host |
//! | `confinement`, `cgroup`, `landlock` | what keeps a process to itself: a control group, and a fence around its files |
//! | `process` | a process by pidfd and start time, never by pid alone |
//! | `stderr` | what a hypervisor says on stderr, bounded, also when nobody listens |
//! | `run_dir` | the files of a running machine, who owns them, how they go |

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
pub use confinement::unconfined;
pub use console::{CONSOLE_LIMIT, console_tail};
pub use error::Error;
pub use firecracker::FirecrackerDriver;
pub use jail::sweep_jails;
pub use machine::{
    DiskLimits, ExitReason, Machine, MachineEvent, MachineId, MachineSpec, MachineState, Nic, RunAs, Vmm,
};
pub use qemu::QemuDriver;

/// What this crate's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;
