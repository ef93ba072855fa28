//! Changes of a VM's status, and the single place that makes them.
//!
//! A status is in three places: the state file, the table in memory, and the events that clients
//! follow. [`transition`] changes them in this order: it records, then updates the table, then
//! publishes. If the change cannot be recorded, it is not made.
//!
//! Facts are the exception. When a machine has ended, the table is updated even if the record
//! cannot be written, and the event is published once it is ([`record_later`]). A paused machine is
//! not recorded at all: after a restart of the daemon, the machine itself shows that it is paused.

use crate::host::error::ServiceError;
use crate::host::{Host, blocking};
use crate::state::Record;
use scalebox_api::{EventKind, VmStatus};
use scalebox_units::VmId;
use scalebox_vmm::Machine;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Recorded reason of a stopped VM whose machine may still be shutting down.
pub(crate) const STOPPING: &str = "being stopped";

/// Retry interval for recording a fact while the state cannot be written.
const RECORD_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// A change of a VM's status.
#[derive(Clone)]
pub(crate) enum Transition {
    /// A machine was started.
    Started(Arc<dyn Machine>),
    /// A machine of an earlier daemon was adopted.
    Adopted(Arc<dyn Machine>),
    /// A machine was adopted whose stop a crash interrupted; the stop is completed next.
    AdoptedForStop(Arc<dyn Machine>),
    /// The machine is about to be stopped. Clients do not see it: the VM is still running.
    Stopping,
    /// The machine could not be stopped and keeps running.
    StopFailed,
    /// The machine has ended. `by` names the initiator: `request` or `guest`.
    Stopped {
        /// `request` or `guest`.
        by: &'static str,
    },
    /// A start that was due after the host's reboot was cancelled.
    StartCancelled,
    /// The machine ended while no daemon was running.
    FoundEnded {
        /// The reason of the end, if it was not a request.
        reason: Option<String>,
    },
    /// The machine was shut down with the host. The state keeps it as running.
    ShutDownWithHost,
    /// The VM failed.
    Failed {
        /// The cause and the remedy.
        reason: String,
        /// The machine, if it runs nevertheless.
        machine: Option<Arc<dyn Machine>>,
    },
    /// The machine may run, but could not be adopted. The next start tries again.
    Unreachable {
        /// The cause and the remedy.
        reason: String,
    },
    /// A machine was paused because storage is full.
    Paused {
        /// The machine that was paused.
        machine: Arc<dyn Machine>,
        /// `storage_full`, or the error of the disk.
        reason: String,
    },
    /// A machine was resumed.
    Resumed(Arc<dyn Machine>),
}

/// The kind of record of a transition, and the effect of a failure to write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recording {
    /// The transition is only made if its record can be written.
    Required,
    /// The transition has already happened, and is recorded as soon as possible.
    Fact,
    /// The transition is not recorded: the state file does not change.
    None,
}

/// The changes that a transition makes, computed only from the transition and the VM's record.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Effect {
    /// The VM's new status.
    pub status: VmStatus,
    /// The reason of the new status.
    pub reason: Option<String>,
    /// The kind of record of the transition.
    pub recording: Recording,
    /// `true` if clients see the transition; otherwise only the state file changes.
    pub visible: bool,
    /// The event that is published, with its details.
    pub event: Option<(EventKind, Value)>,
}

impl Effect {
    fn visible(
        status: VmStatus,
        reason: Option<&str>,
        recording: Recording,
        event: Option<(EventKind, Value)>,
    ) -> Effect {
        Effect {
            status,
            reason: reason.map(str::to_owned),
            recording,
            visible: true,
            event,
        }
    }

    /// Returns an effect that clients do not see: only the state file changes.
    fn unseen(status: VmStatus, reason: Option<&str>) -> Effect {
        Effect {
            visible: false,
            ..Effect::visible(status, reason, Recording::Required, None)
        }
    }
}

fn with_reason(kind: EventKind, reason: Option<&str>) -> Option<(EventKind, Value)> {
    Some((kind, json!({ "reason": reason })))
}

impl Transition {
    /// Returns the changes that the transition makes to a VM with the record `before`.
    pub(crate) fn effect(&self, before: &Record) -> Effect {
        use Recording::{Fact, Required};
        match self {
            Transition::Started(_) => Effect::visible(
                VmStatus::Running,
                None,
                Required,
                Some((EventKind::Started, Value::Null)),
            ),
            Transition::Adopted(_) => {
                // For clients, the adoption of a machine that kept running is not a change.
                let is_news = (before.status, &before.status_reason) != (VmStatus::Running, &None);
                let event = is_news.then_some((EventKind::Resumed, json!({ "reason": null })));
                let recording = if is_news { Fact } else { Recording::None };
                Effect::visible(VmStatus::Running, None, recording, event)
            }
            Transition::AdoptedForStop(_) => Effect::visible(
                VmStatus::Running,
                None,
                Recording::None,
                with_reason(EventKind::Resumed, None),
            ),
            Transition::Stopping => Effect::unseen(VmStatus::Stopped, Some(STOPPING)),
            Transition::StopFailed => Effect::unseen(before.status, before.status_reason.as_deref()),
            Transition::Stopped { by } => Effect::visible(
                VmStatus::Stopped,
                None,
                Fact,
                Some((EventKind::Stopped, json!({ "by": by }))),
            ),
            Transition::StartCancelled => Effect::visible(VmStatus::Stopped, None, Required, None),
            Transition::FoundEnded { reason } => {
                let reason = reason.as_deref();
                Effect::visible(VmStatus::Stopped, reason, Fact, with_reason(EventKind::Stopped, reason))
            }
            Transition::ShutDownWithHost => Effect::visible(VmStatus::Stopped, None, Recording::None, None),
            Transition::Failed { reason, .. } => {
                let reason = Some(reason.as_str());
                Effect::visible(VmStatus::Failed, reason, Fact, with_reason(EventKind::Failed, reason))
            }
            Transition::Unreachable { reason } => {
                let reason = Some(reason.as_str());
                let event = with_reason(EventKind::Failed, reason);
                Effect::visible(VmStatus::Failed, reason, Recording::None, event)
            }
            Transition::Paused { reason, .. } => {
                let event = with_reason(EventKind::Paused, Some(reason));
                Effect::visible(VmStatus::Paused, Some(reason), Recording::None, event)
            }
            Transition::Resumed(_) => Effect::visible(
                VmStatus::Running,
                None,
                Recording::None,
                Some((EventKind::Resumed, Value::Null)),
            ),
        }
    }

    /// Updates the table. Returns whether the status changed for clients.
    fn update_table(&self, host: &Host, id: &VmId, effect: &Effect) -> bool {
        let (status, reason) = (effect.status, effect.reason.clone());
        match self {
            // No operation holds the VM, so one may have given it another machine meanwhile.
            Transition::Paused { machine, .. } | Transition::Resumed(machine) => {
                host.vms.set_if_current(id, machine, status, reason)
            }
            Transition::Started(machine) | Transition::Adopted(machine) | Transition::AdoptedForStop(machine) => {
                host.vms.set(id, status, reason, Some(Arc::clone(machine)))
            }
            Transition::Failed { machine, .. } => host.vms.set(id, status, reason, machine.clone()),
            _ => host.vms.set(id, status, reason, None),
        }
    }
}

/// Changes a VM's status: records it, then updates the table, then publishes the event.
///
/// # Errors
/// If the change cannot be recorded. The transition is not made then, unless it is a fact: clients
/// see a fact, and its event is published later ([`record_later`]).
pub(crate) async fn transition(host: &Host, before: &Record, transition: Transition) -> Result<(), ServiceError> {
    let effect = transition.effect(before);
    let recorded = match effect.recording {
        Recording::None => Ok(()),
        Recording::Required | Recording::Fact => record(host, &before.id, &effect).await,
    };
    if recorded.is_err() && effect.recording == Recording::Required {
        return recorded;
    }
    let is_news = effect.visible && transition.update_table(host, &before.id, &effect);
    recorded?;
    if let Some((kind, details)) = effect.event.filter(|_| is_news) {
        host.events.publish(kind, Some(before), details);
    }
    Ok(())
}

async fn record(host: &Host, id: &VmId, effect: &Effect) -> Result<(), ServiceError> {
    let (state, id) = (Arc::clone(&host.state), id.to_owned());
    let (status, reason) = (effect.status, effect.reason.clone());
    blocking(move || state.set_status(&id, status, reason.as_deref())).await
}

/// Records a fact in the background once the state can be written, and publishes its event. Stops
/// if the VM was started or deleted in the meantime.
pub(crate) fn record_later(host: &Host, before: &Record, fact: Transition) {
    let (host, before) = (host.clone(), before.clone());
    tokio::spawn(async move {
        let status = fact.effect(&before).status;
        loop {
            tokio::time::sleep(RECORD_RETRY_INTERVAL).await;
            let Ok(operation) = host.vms.begin_when_idle(before.id.as_str(), "ending").await else {
                return;
            };
            if operation.machine.is_some() || operation.record.status != status {
                return;
            }
            if transition(&host, &before, fact.clone()).await.is_ok() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(status: VmStatus, reason: Option<&str>) -> Record {
        Record {
            status,
            status_reason: reason.map(str::to_owned),
            ..crate::state::example_record(1)
        }
    }

    fn failed() -> Transition {
        Transition::Failed {
            reason: "why".to_owned(),
            machine: None,
        }
    }

    #[test]
    fn an_intent_to_stop_is_recorded_before_anything_is_visible() {
        let effect = Transition::Stopping.effect(&record(VmStatus::Running, None));
        assert_eq!(
            (effect.status, effect.reason.as_deref()),
            (VmStatus::Stopped, Some(STOPPING))
        );
        assert_eq!((effect.recording, effect.visible), (Recording::Required, false));
        assert_eq!(effect.event, None);
    }

    #[test]
    fn a_failed_stop_records_what_was_there_before() {
        for before in [
            record(VmStatus::Running, None),
            record(VmStatus::Paused, Some("storage_full")),
        ] {
            let effect = Transition::StopFailed.effect(&before);
            assert_eq!((effect.status, &effect.reason), (before.status, &before.status_reason));
            assert_eq!((effect.visible, effect.event), (false, None));
        }
    }

    #[test]
    fn the_end_of_a_machine_is_a_fact() {
        let before = record(VmStatus::Running, None);
        let ends = [
            Transition::Stopped { by: "guest" },
            Transition::Stopped { by: "request" },
            Transition::FoundEnded { reason: None },
            failed(),
        ];
        for end in ends {
            let effect = end.effect(&before);
            assert_eq!((effect.recording, effect.visible), (Recording::Fact, true));
            assert!(effect.event.is_some());
        }
    }

    #[test]
    fn what_the_next_start_finds_out_by_itself_is_not_recorded() {
        let before = record(VmStatus::Running, None);
        let unreachable = Transition::Unreachable {
            reason: "why".to_owned(),
        };
        for transition in [unreachable, Transition::ShutDownWithHost] {
            assert_eq!(transition.effect(&before).recording, Recording::None);
        }
    }

    #[test]
    fn events_say_why() {
        let before = record(VmStatus::Running, None);
        let event = |transition: Transition| transition.effect(&before).event;
        assert_eq!(
            event(Transition::Stopped { by: "guest" }),
            Some((EventKind::Stopped, json!({ "by": "guest" })))
        );
        assert_eq!(event(failed()), Some((EventKind::Failed, json!({ "reason": "why" }))));
        assert_eq!(event(Transition::StartCancelled), None);
    }
}
