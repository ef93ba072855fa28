//! What happens on a host, as `GET /events` tells it: one [`Event`] at a time, in the order in
//! which it happened.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Event {
    /// Grows from event to event, also over a restart of the daemon, in steps of any size; below
    /// 2⁵³.
    pub id: u64,
    /// When it happened: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub at: String,
    /// What happened; a word of [`EventKind`], to which newer servers add.
    #[cfg_attr(feature = "openapi", schema(value_type = String, example = "created"))]
    pub kind: EventKind,
    /// The VM it happened to; absent where it is the host's affair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<EventVm>,
    /// What else there is to say; which fields, depends on the kind.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub details: Map<String, Value>,
}

/// The VM that an event is about, which may be gone when the event is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EventVm {
    /// `vm-` and twelve lower-case hex digits.
    #[cfg_attr(feature = "openapi", schema(pattern = "^vm-[0-9a-f]{12}$"))]
    pub id: String,
    /// Its name.
    pub name: String,
}

macro_rules! kinds {
    ($($(#[$doc:meta])+ $name:ident = $word:literal,)+) => {
        /// What happened.
        #[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum EventKind {
            $($(#[$doc])+ #[serde(rename = $word)] $name,)+
            /// A kind that a newer daemon knows, and this client does not.
            #[serde(untagged)]
            Other(String),
        }

        impl EventKind {
            /// The words of all kinds known.
            pub const WORDS: &[&str] = &[$($word),+];

            /// The word of the API.
            pub fn as_str(&self) -> &str {
                match self {
                    $(EventKind::$name => $word,)+
                    EventKind::Other(word) => word,
                }
            }
        }
    };
}

kinds! {
    /// A VM was made. `template`, `status`, `disk_size_gib`, `ssh_port`.
    Created = "created",
    /// Its machine was started, by a request or after a reboot of the host; its guest is still
    /// booting.
    Started = "started",
    /// Its machine ended as it should: by a request or by the guest itself. `by`: `request`,
    /// `guest`, or `reason`.
    Stopped = "stopped",
    /// Its disk grew. `from_gib`, `to_gib`, `by`: `request`, or `auto_extend` with `used_percent`.
    Grown = "grown",
    /// Its disk should have extended itself and did not. `reason`, `used_percent`.
    NotExtended = "not_extended",
    /// Its processors stand still. `reason`.
    Paused = "paused",
    /// They go on.
    Resumed = "resumed",
    /// A template was made of its disk. `template`, `stood_still_ms`.
    Snapshotted = "snapshotted",
    /// Its machine ended against its owner's will, or could not be started. `reason`.
    Failed = "failed",
    /// It is gone, and its disk.
    Deleted = "deleted",
    /// There is a new template. `template`.
    TemplateCreated = "template_created",
    /// A template is gone. `template`.
    TemplateDeleted = "template_deleted",
    /// The pool is larger. `capacity_bytes`, `free_bytes`.
    PoolGrown = "pool_grown",
    /// The pool is smaller. `capacity_bytes`, `free_bytes`.
    PoolShrunk = "pool_shrunk",
    /// Not an event of the host but of the stream: some between `since` and this one are not told,
    /// because the daemon no longer has them or was started anew. Look at what there is: `GET
    /// /vms`. `since`.
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
    fn an_event_is_read_as_it_is_written_also_one_of_a_newer_daemon() {
        for kind in ["created", "pool_grown", "missed", "teleported"] {
            let json = json!({"id": 7, "at": "2026-01-02T03:04:05.678Z", "kind": kind, "details": {"to_gib": 9},
                              "vm": {"id": "vm-0123456789ab", "name": "box"}});
            let event: Event = serde_json::from_value(json.clone()).unwrap();
            assert_eq!((event.kind.as_str(), event.kind.to_string().as_str()), (kind, kind));
            assert_eq!(
                EventKind::WORDS.contains(&kind),
                !matches!(event.kind, EventKind::Other(_))
            );
            assert_eq!(serde_json::to_value(event).unwrap(), json);
        }
    }
}
