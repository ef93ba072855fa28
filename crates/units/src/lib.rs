//! The value types that all crates of Scalebox share: sizes, ids, names and addresses, each a type
//! with one parser.
//!
//! All later code takes the type. So a value that the API accepted is not rejected when a VM starts
//! with it. The crate does no I/O.
//!
//! # Layout
//!
//! | file | contents |
//! |---|---|
//! | `size` | [`Bytes`] and [`Gib`]: sizes, and their rounding |
//! | `vm_id` | [`VmId`] |
//! | `exec_id` | [`ExecId`] |
//! | `kernel_id` | [`KernelId`] |
//! | `names` | [`TemplateName`] and [`VmName`] |
//! | `key` | [`SshPublicKey`] |
//! | `mac` | [`Mac`] |
//! | `disk_location` | [`DiskLocation`] |
//! | `image_reference` | [`ImageReference`]: an image in a registry |
//! | `image_config` | [`ImageConfig`]: the settings that an image carries |
//! | `init` | [`Init`]: the first process of a guest |
//! | `format` | [`InvalidFormat`]: the error of the parsers |
//! | `schema` (feature `openapi`) | the JSON schema of each type |

#![warn(missing_docs)]

mod disk_location;
mod exec_id;
mod format;
mod image_config;
mod image_reference;
mod init;
mod kernel_id;
mod key;
mod mac;
mod names;
#[cfg(feature = "openapi")]
mod schema;
mod size;
mod vm_id;

pub use disk_location::DiskLocation;
pub use exec_id::ExecId;
pub use format::InvalidFormat;
pub use image_config::ImageConfig;
pub use image_reference::ImageReference;
pub use init::Init;
pub use kernel_id::KernelId;
pub use key::SshPublicKey;
pub use mac::Mac;
pub use names::{TemplateName, VmName};
pub use size::{Bytes, Gib, ParseSizeError};
pub use vm_id::VmId;
