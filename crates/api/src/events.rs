//! Events of a host, as `GET /events` streams them in the order in which they happened.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// An event of a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Event {
    /// Id of the event. Ids increase from event to event, also over a restart of the daemon, in
    /// steps of any size; they stay below 2⁵³.
    pub id: u64,
    /// Time of the event: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub at: String,
    /// Kind of the event; newer servers may send kinds that are not listed.
    #[cfg_attr(feature = "openapi", schema(value_type = String, example = "created"))]
    pub kind: EventKind,
    /// VM that the event is about; absent for events of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<EventVm>,
    /// Further fields; they depend on the kind.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub details: Map<String, Value>,
}

/// The VM that an event is about. It may have been deleted since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EventVm {
    /// `vm-` and twelve lower-case hex digits.
    #[cfg_attr(feature = "openapi", schema(pattern = "^vm-[0-9a-f]{12}$"))]
    pub id: String,
    /// Name of the VM.
    pub name: String,
}

macro_rules! kinds {
    ($($(#[$doc:meta])+ $name:ident = $text:literal,)+) => {
        /// The kind of an event.
        #[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum EventKind {
            $($(#[$doc])+ #[serde(rename = $text)] $name,)+
            /// A kind that a newer daemon sends and this client does not know.
            #[serde(untagged)]
            Other(String),
        }

        impl EventKind {
            /// All known kinds, as strings of the API.
            pub const NAMES: &[&str] = &[$($text),+];

            /// Returns the API's string for the kind.
            pub fn as_str(&self) -> &str {
                match self {
                    $(EventKind::$name => $text,)+
                    EventKind::Other(text) => text,
                }
            }
        }
    };
}

kinds! {
    /// A VM was created. Details: `template`, `status`, `disk_size_gib`, `ssh_port`.
    Created = "created",
    /// A VM was started, by a request or after a reboot of the host; its guest is still booting.
    Started = "started",
    /// A VM was stopped, by a request or by its guest. Details: `by` (`request` or `guest`), or
    /// `reason`.
    Stopped = "stopped",
    /// A VM's disk grew. Details: `from_gib`, `to_gib`, `by` (`request`, or `auto_extend` with
    /// `used_percent`).
    Grown = "grown",
    /// A VM's disk could not be extended automatically. Details: `reason`, `used_percent`.
    NotExtended = "not_extended",
    /// A VM's processors were paused. Details: `reason`.
    Paused = "paused",
    /// A VM's processors were resumed.
    Resumed = "resumed",
    /// A template was created from a VM's disk. Details: `template`, `stood_still_ms`.
    Snapshotted = "snapshotted",
    /// A request started a command in a VM. Details: `exec`, `program`.
    ExecStarted = "exec_started",
    /// Such a command ended. Details: `exec`, `exit_code`, `signal`.
    ExecEnded = "exec_ended",
    /// A VM's process ended unexpectedly, or the VM could not be started. Details: `reason`.
    Failed = "failed",
    /// A VM was deleted, with its disk.
    Deleted = "deleted",
    /// A template was created. Details: `template`.
    TemplateCreated = "template_created",
    /// A template was deleted. Details: `template`.
    TemplateDeleted = "template_deleted",
    /// A job was started. Details: `job`, `kind`, `template`.
    JobStarted = "job_started",
    /// A running job made progress; at most one event a second for each job. Details: `job`,
    /// `phase`, `done_bytes`, `total_bytes`.
    JobProgress = "job_progress",
    /// A job ended. Details: `job`, `status` (`done`, `failed` or `cancelled`), and `reason` if it
    /// failed.
    JobEnded = "job_ended",
    /// The pool grew. Details: `capacity_bytes`, `free_bytes`.
    PoolGrown = "pool_grown",
    /// The pool shrank. Details: `capacity_bytes`, `free_bytes`.
    PoolShrunk = "pool_shrunk",
    /// The stream lacks events between `since` and this one, because the daemon no longer has them
    /// or was restarted. Query the present state with `GET /vms`. Details: `since`.
    Missed = "missed",
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_survive_a_round_trip_also_with_an_unknown_kind() {
        for kind in ["created", "pool_grown", "missed", "teleported"] {
            let json = json!({"id": 7, "at": "2026-01-02T03:04:05.678Z", "kind": kind, "details": {"to_gib": 9},
                              "vm": {"id": "vm-0123456789ab", "name": "box"}});
            let event: Event = serde_json::from_value(json.clone()).unwrap();
            assert_eq!((event.kind.as_str(), event.kind.to_string().as_str()), (kind, kind));
            assert_eq!(
                EventKind::NAMES.contains(&kind),
                !matches!(event.kind, EventKind::Other(_))
            );
            assert_eq!(serde_json::to_value(event).unwrap(), json);
        }
    }
}
