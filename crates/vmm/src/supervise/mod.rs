//! The supervision of a machine's process, which all drivers share.
//!
//! | file | content |
//! |---|---|
//! | `driver` | the differences between drivers |
//! | `claim` | claims a machine: by its lock, its record and its process |
//! | `launch` | launches a machine's process, each step with its undo |
//! | `supervised` | the state of a held machine, which its handle and its monitor share |
//! | `monitor` | the tasks behind a held machine, and the handle that ends them |
//! | `growth` | grows the root disk |
//! | `stop` | requests a shutdown of the guest, and kills the machine after a grace period |
//! | `qga` | requests a shutdown from `qemu-guest-agent` |
//! | `force_stop`, `kill` | kill a process and wait until it is gone |

mod claim;
mod driver;
mod force_stop;
mod growth;
mod kill;
mod launch;
mod monitor;
pub(crate) mod qga;
mod stop;
mod supervised;

pub(crate) use claim::{ClaimedProcess, claim};
pub(crate) use driver::Driver;
pub(crate) use force_stop::force_stop;
pub(crate) use kill::{kill_and_wait, within_exit_timeout};
pub(crate) use launch::{CONNECT_INTERVAL, LaunchGuard, launch, require_tap, spawn, start_claimed, undo_launch};
pub(crate) use monitor::{Handle, Observer};
pub(crate) use supervised::Supervised;
