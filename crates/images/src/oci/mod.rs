//! Images of containers.

mod address;
pub(crate) mod archive;
mod auth;
mod build;
mod cache;
mod digest;
mod download;
mod error;
mod ext4;
#[cfg(test)]
mod fake_registry;
#[cfg(test)]
mod hand_made;
#[cfg(test)]
mod image_tests;
mod layer;
mod limits;
mod manifest;
mod pull;
mod registry;
#[cfg(test)]
mod registry_tests;
mod task;
mod tree;
mod unpack;

pub use auth::Credentials;
pub use build::Made;
pub use cache::LayerCache;
pub use digest::{Digest, InvalidDigest};
pub use error::OciError;
pub use limits::{Deadlines, Limits};
pub use pull::{PullRequest, complete_reference, pull};
pub use task::{Phase, Room, Supervisor, Task};
