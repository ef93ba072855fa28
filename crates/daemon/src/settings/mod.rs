//! Settings: from the environment, over a file of `KEY=VALUE` lines, over defaults.
//!
//! A setting that does not parse stops the daemon, with its name, its value and the expected form.
//! So does an unknown key in the file: if a misspelt setting were ignored, its default would apply
//! unnoticed.

pub mod contradictions;
mod load;
mod values;

pub use values::{AccelChoice, LogFormat, Settings, SettingsError, Token, VmmChoice};
