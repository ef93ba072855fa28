//! The words that all crates of Scalebox share: sizes, ids, names and addresses, each a type with
//! one parser.
//!
//! All later code takes the type. So a value that the API accepted is not rejected when a VM starts
//! with it. The crate does no I/O.
//!
//! # Layout
//!
//! | file | contents |
//! |---|---|
//! | `size` | [`Bytes`] and [`Gib`]: sizes, and their rounding |
//! | `names` | [`TemplateName`], [`VmName`], VM ids; [`InvalidFormat`], the parse error |
//! | `key` | [`SshPublicKey`] |
//! | `disk_location` | [`DiskLocation`] |
//! | `schema` (feature `openapi`) | the JSON schema of each type |

#![warn(missing_docs)]

mod disk_location;
mod key;
mod names;
#[cfg(feature = "openapi")]
mod schema;
mod size;

pub use disk_location::DiskLocation;
pub use key::SshPublicKey;
pub use names::{InvalidFormat, TemplateName, VmName, is_vm_id};
pub use size::{Bytes, Gib, ParseSizeError};
