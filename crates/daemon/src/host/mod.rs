//! The parts of a running daemon, and the state that its operations share.
//!
//! [`Host`] is the handle that operations get. The operations themselves are functions in
//! [`vm`](crate::vm), [`pool`](crate::pool) and [`templates`](crate::templates).

pub mod agent;
pub mod cleanups;
pub mod drivers;
pub mod error;
pub mod events;
pub mod files;
pub mod handle;
pub mod kernels_in_use;
pub mod keys_in_use;
pub mod names;
pub mod paused_vms;
pub mod pool_growth;
pub mod random;
pub mod reclaim;
pub mod system;
pub mod tasks;
pub mod templates_in_use;
pub mod undo;
pub mod usage_tracker;
pub mod vms;

pub use handle::{BASE_TEMPLATE, Host, Parts};
pub use names::{rfc3339, template_name};
pub use tasks::{blocking, fault_point};
