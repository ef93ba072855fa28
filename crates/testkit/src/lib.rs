//! Tools that the tests of several crates share. None of them is in a release.
//!
//! * [`SimVmm`]: a simulated hypervisor, for tests without root and real machines
//! * `tests/floor_plan` checks the structure of the whole workspace: the dependencies between
//!   crates, folders and files, and the length of functions

mod sim_vmm;

pub use sim_vmm::{Gate, NextCall, Operation, SimAgent, SimGuest, SimMachine, SimQga, SimVmm};
