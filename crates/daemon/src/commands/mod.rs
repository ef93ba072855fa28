//! The subcommands, and the log.

pub(crate) mod client_config;
pub(crate) mod doctor;
pub(crate) mod down;
pub(crate) mod failed;
pub(crate) mod log;
pub(crate) mod open;
pub(crate) mod pool;
pub(crate) mod progress;
pub(crate) mod serve;
pub(crate) mod show_settings;
pub(crate) mod template;
