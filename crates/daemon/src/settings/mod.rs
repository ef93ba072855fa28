//! Settings: from the environment, over a file of `KEY=VALUE` lines, over defaults.
//!
//! A setting that does not parse stops the daemon, with its name, its value and the expected form.
//! So does an unknown key in the file: if a misspelt setting were ignored, its default would apply
//! unnoticed.
//!
//! # Layout
//!
//! | file | contents |
//! |---|---|
//! | `table` | every setting: key, default, form, meaning |
//! | `given` | the values that are set, as text with their source |
//! | `values` | the settings, parsed |
//! | `contradictions` | settings that are valid but do not fit together |
//! | `load` | reads the environment and the file |
//! | `listing` | the settings in effect, for people and programs |
//! | `error` | the errors of rejected settings |
//!
//! To add a setting: an entry in `table`, a field in `values`, and the README's table, which a test
//! in `table` prints.

pub(crate) mod contradictions;
mod error;
mod given;
mod listing;
mod load;
mod table;
mod values;

pub(crate) use error::SettingsError;
pub(crate) use listing::{Origin, SettingInEffect, list};
pub(crate) use load::DEFAULT_FILE;
pub(crate) use table::keys;
pub(crate) use values::{AccelChoice, LogFormat, Settings, Token, VmmChoice};
