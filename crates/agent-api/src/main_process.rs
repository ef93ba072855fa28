//! The main process of a guest without an init: the command of its image, which the agent runs and
//! starts again.
//!
//! The host writes a [`MainProcess`] as JSON to the file [`SEED_FILE`] of the seed drive. The agent
//! runs it as the exec with the id [`EXEC`], once host name, network and mounts are set up. All
//! runs of the main process write to one output.

use serde::{Deserialize, Serialize};

/// The name of the file on the seed drive.
pub const SEED_FILE: &str = "main";

/// The exec's id of the main process.
pub const EXEC: &str = "main";

/// Maximum size of the file, in bytes.
pub const MAX_BYTES: usize = 256 << 10;

/// The main process of a guest. The fields are those of [`StartExec`](crate::StartExec).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MainProcess {
    /// The program and its arguments; at least one.
    pub argv: Vec<String>,
    /// The environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// The working directory; by default `/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// The user and optionally the group; by default root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// When it is started again.
    pub restart: RestartPolicy,
    /// The number of the signal that asks it to end when the guest ends; by default 15, `SIGTERM`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<i32>,
}

/// When the main process is started again after its end.
///
/// The delay is 100 ms at first, and doubles with each start up to a minute. After a run of ten
/// seconds, it is 100 ms again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// Always.
    Always,
    /// After an exit status other than 0, after a signal, and if it could not be started.
    OnFailure,
    /// Never.
    Never,
}
