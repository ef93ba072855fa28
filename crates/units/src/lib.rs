//! Types for names and keys that clients send. Each type has one parser, and all later code takes
//! the type. So a value that the API accepted is not rejected when a VM starts with it.
//!
//! # Layout
//!
//! | file | contents |
//! |---|---|
//! | `names` | [`TemplateName`], [`VmName`], VM ids; [`InvalidFormat`], the parse error |
//! | `key` | [`SshPublicKey`] |
//! | `schema` (feature `openapi`) | the JSON schema of each type |

#![warn(missing_docs)]

mod key;
mod names;
#[cfg(feature = "openapi")]
mod schema;

pub use key::SshPublicKey;
pub use names::{InvalidFormat, TemplateName, VmName, is_vm_id};
