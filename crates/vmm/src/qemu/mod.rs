//! The QEMU `microvm` driver.
//!
//! | file | content |
//! |---|---|
//! | `driver` | launch and adopt, each step with its undo |
//! | `machine` | the commands of a running machine, and the events of its control socket |
//! | `arguments` | QEMU's argument vector for a [`MachineSpec`](crate::MachineSpec) (pure) |
//! | `qmp` | the control socket; every command has a timeout |
//! | `binary` | finds the QEMU binary |

mod arguments;
mod binary;
mod driver;
mod machine;
mod qmp;

pub use driver::QemuDriver;
