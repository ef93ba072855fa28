//! Operations on one VM: creation, start and stop, change, snapshot, deletion, and recovery at start.

pub mod change;
pub mod cleanup;
pub mod create;
pub mod guest_fs;
pub mod idempotency;
pub mod lifecycle;
pub mod reboot_loop;
pub mod recovery;
pub mod restart;
pub mod snapshot;
