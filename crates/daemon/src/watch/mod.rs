//! Background loops, each of which watches one thing for as long as the daemon runs.

pub mod extend;
pub mod network;
pub mod space;
pub mod trim;
pub mod usage;
