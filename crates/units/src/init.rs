//! The first process of a guest.

use serde::{Deserialize, Serialize};

/// The first process of a guest, which starts all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// The init system in the root file system, such as systemd.
    System,
    /// The agent of Scalebox: the root file system has no init system.
    Agent,
}
