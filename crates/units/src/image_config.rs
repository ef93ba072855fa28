//! The settings that an image carries for the programs that run in it.

use serde::{Deserialize, Serialize};

/// The settings of an OCI image: defaults of the programs that run in its file system.
///
/// Empty fields are omitted from the JSON. Values are the image's own: they are not checked, and
/// must be treated as data.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(default)]
pub struct ImageConfig {
    /// Environment variables, each `NAME=VALUE`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// The program and its first arguments; `cmd` is appended.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// The default arguments of the entrypoint; without one, the program and its arguments.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// The working directory; `/` if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// The user, by name or number, optionally with a group: `USER[:GROUP]`. Root if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The ports on which the programs listen: `PORT[/tcp|/udp]`, sorted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports: Vec<String>,
    /// The signal that ends the main process, by name or number; `SIGTERM` if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
}
