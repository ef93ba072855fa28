//! The subcommands, and the log.

pub mod client_config;
pub mod doctor;
pub mod down;
pub mod failed;
pub mod log;
pub mod open;
pub mod pool;
pub mod progress;
pub mod serve;
pub mod show_settings;
pub mod template;
