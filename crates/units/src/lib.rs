//! Names and keys that a client sends, as types. Each type has one parser, and every later stage
//! takes the type: a value that the API accepts cannot be refused when a VM is started with it.
//!
//! # Layout
//!
//! | file | job |
//! |---|---|
//! | `names` | [`TemplateName`], [`VmName`], a VM's id; [`WrongForm`], why a text is not one |
//! | `key` | [`SshPublicKey`] |
//! | `schema` (feature `openapi`) | the JSON schema of each |

#![warn(missing_docs)]

mod key;
mod names;
#[cfg(feature = "openapi")]
mod schema;

pub use key::SshPublicKey;
pub use names::{TemplateName, VmName, WrongForm, is_vm_id};
