//! The parts of a running daemon, and the state that its operations share.
//!
//! [`Host`] is the handle that operations get. The operations themselves are functions in
//! [`vm`](crate::vm), [`pool`](crate::pool) and [`templates`](crate::templates).

pub(crate) mod advice;
pub(crate) mod agent_link;
pub(crate) mod cleanups;
pub(crate) mod drivers;
pub(crate) mod error;
pub(crate) mod events;
pub(crate) mod files;
pub(crate) mod guest_agent;
pub(crate) mod guest_requests;
pub(crate) mod handle;
pub(crate) mod jobs;
pub(crate) mod kernels_in_use;
pub(crate) mod keys_in_use;
pub(crate) mod names;
pub(crate) mod paused_vms;
pub(crate) mod pool_growth;
pub(crate) mod random;
pub(crate) mod reclaim;
pub(crate) mod started_execs;
pub(crate) mod system;
pub(crate) mod tasks;
pub(crate) mod templates_in_use;
pub(crate) mod undo;
pub(crate) mod usage_tracker;
pub(crate) mod vms;

pub(crate) use handle::{BASE_TEMPLATE, Host, Parts};
pub(crate) use names::{rfc3339, template_name};
pub(crate) use tasks::{blocking, fault_point};
