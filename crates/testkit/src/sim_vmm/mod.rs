//! A simulated hypervisor: machines in memory, without root, processes or sockets of the host.
//!
//! [`SimVmm`] is a driver like those of `scalebox_vmm`, and keeps the guarantees of its traits.
//! Machines live in a world that outlives the driver: [`SimVmm::restart`] returns the driver of the
//! next daemon, which adopts the machines that ran. A test controls them: [`SimMachine`] crashes a
//! machine, powers off its guest or fills the host's disk, and [`NextCall`] makes a call fail, hang
//! or wait.
//!
//! ```
//! use scalebox_testkit::{Operation, SimVmm};
//! use scalebox_vmm::{ExitReason, Vmm};
//! # use scalebox_units::DiskLocation;
//! # use scalebox_vmm::{DiskLimits, MachineSpec, Nic};
//! # let spec = MachineSpec {
//! #     id: "vm-0123456789ab".parse().unwrap(), vcpus: 1, memory_mib: 64, kernel: "/kernel".into(),
//! #     initrd: None, modules: None, cmdline: String::new(), root: DiskLocation::File("/disk".into()),
//! #     root_limits: DiskLimits::default(), seed: "/seed".into(),
//! #     nic: Nic { tap: "tap0".into(), mac: "52:54:00:12:34:56".parse().unwrap() },
//! #     run_dir: "/run/vm".into(), console_log: "/log".into(), run_as: None,
//! # };
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
//! # runtime.block_on(async {
//! let sim = SimVmm::new();
//! let machine = sim.launch(&spec).await?;
//! sim.next(Operation::Pause).fails();
//! assert!(machine.pause().await.is_err());
//! sim.machine(&spec.id).power_off();
//! assert_eq!(machine.exited().await, ExitReason::GuestShutdown);
//! # Ok::<(), scalebox_vmm::Error>(()) }).unwrap();
//! ```
//!
//! All delays use Tokio's clock, so a test may pause it. Then a `qemu-guest-agent` that responds
//! holds the clock while a connection is in use; without responses, the clock runs. Our own agent
//! runs on the real clock and does not hold it.
//!
//! | file | content |
//! |---|---|
//! | `driver` | the driver: launch, adopt, force stop |
//! | `machine` | the handle, as the daemon sees it |
//! | `control` | the handle with which a test controls a machine |
//! | `guest` | the settings of a guest |
//! | `qga` | `qemu-guest-agent` |
//! | `agent` | our own agent: connections, and operations on the guest as a whole |
//! | `served` | the threads of our own agent, from one boot to the next |
//! | `body` | the state of one machine |
//! | `world` | all machines, and the calls that are to fail |
//! | `faults`, `next_call` | the faults of calls |

mod agent;
mod body;
mod control;
mod driver;
mod faults;
mod guest;
mod machine;
mod next_call;
mod qga;
mod served;
mod world;

pub use control::SimMachine;
pub use driver::SimVmm;
pub use faults::{Gate, Operation};
pub use guest::{SimAgent, SimGuest, SimQga};
pub use next_call::NextCall;
