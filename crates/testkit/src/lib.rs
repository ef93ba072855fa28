//! Tools that the tests of several crates share. None of them is in a release.
//!
//! * [`SimVmm`]: a simulated hypervisor, for tests without root and real machines
//! * `tests/floor_plan` checks the structure of the whole workspace: which crate, folder and file
//!   may use which other one, and how long a function may be

mod sim_vmm;

pub use sim_vmm::{Gate, NextCall, Operation, SimAgent, SimGuest, SimMachine, SimQga, SimVmm};
