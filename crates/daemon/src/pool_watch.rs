//! No guest breaks because the host ran out of space.
//!
//! The pool is watched together with the host disk under it. Before either runs out, the pool grows
//! if it may and the host disk has room; else the VMs that still take new blocks are paused; they
//! are resumed when there is room. Behind that stands the hypervisor, which stops a guest whose
//! write the host refuses rather than hand the error on. In both cases the guest sees neither an
//! I/O error nor a read-only root, only time that passed; the VM is `paused` with the reason
//! `storage_full`.

use crate::service::{Service, blocking};
use scalebox_client::{EventKind, VmStatus};
use scalebox_units::{Bytes, VmId};
use scalebox_vmm::{Machine, MachineEvent, MachineState};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;

const STORAGE_FULL: &str = "storage_full";
/// With less than this free, disks are watched for growth, several times a second: a fast host
/// writes half of it in a second.
const NEAR: Bytes = Bytes::from_mib(4096);
/// With less than this free, VMs whose disks grow by [`MUCH`] between two looks are paused.
const PAUSE_BELOW: Bytes = Bytes::from_mib(1024);
/// With less than this free, VMs whose disks grow at all are paused.
const PAUSE_ALL_BELOW: Bytes = Bytes::from_mib(256);
/// With this much free, those that were paused go on. The distance to [`PAUSE_BELOW`] keeps a VM
/// from being paused and resumed in turn.
const RESUME_FROM: Bytes = Bytes::from_mib(1536);
/// More than a guest's log takes.
const MUCH: Bytes = Bytes::from_mib(1);

const INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_NEAR: Duration = Duration::from_millis(200);
/// How long a growth of the pool is waited for.
const GROWTH: Duration = Duration::from_millis(500);

/// The machines that stand still for lack of space, by VM.
#[derive(Default)]
pub struct Held {
    machines: Mutex<HashMap<String, Arc<dyn Machine>>>,
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<dyn Machine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches the pool for as long as it is polled.
pub async fn run(service: Service) -> Infallible {
    let mut before: HashMap<String, Bytes> = HashMap::new();
    loop {
        let pool = Arc::clone(&service.inner().pool);
        let free = match blocking(move || pool.space()).await {
            Ok(space) => space.free,
            Err(error) => {
                tracing::warn!(%error, "the pool's space cannot be read: it is not watched");
                tokio::time::sleep(INTERVAL).await;
                continue;
            }
        };
        if service.low_water().is_some_and(|mark| free < mark.max(RESUME_FROM)) {
            // A growth that takes its time goes on, and does not keep the VMs from being paused
            // meanwhile.
            let grown = tokio::time::timeout(GROWTH, service.extend_pool()).await;
            if grown.is_ok_and(|grown| grown) {
                continue;
            }
        }
        if free >= RESUME_FROM {
            resume_held(&service).await;
        }
        if free >= NEAR {
            before.clear();
            tokio::time::sleep(INTERVAL).await;
            continue;
        }
        let now = disk_sizes(&service).await;
        if let Some(tolerated) = tolerated_growth(free) {
            pause_growing(&service, &before, &now, tolerated).await;
        }
        before = now;
        tokio::time::sleep(INTERVAL_NEAR).await;
    }
}

/// How much a disk may grow between two looks without its VM being paused; `None` where there is
/// room enough.
fn tolerated_growth(free: Bytes) -> Option<Bytes> {
    if free < PAUSE_ALL_BELOW {
        Some(Bytes::ZERO)
    } else if free < PAUSE_BELOW {
        Some(MUCH)
    } else {
        None
    }
}

/// The blocks that the disks of running VMs map.
async fn disk_sizes(service: &Service) -> HashMap<String, Bytes> {
    let pool = Arc::clone(&service.inner().pool);
    let ids: Vec<String> = service.inner().vms.running().into_iter().map(|(id, _)| id).collect();
    let read = blocking(move || {
        // A disk that cannot be read now was deleted a moment ago.
        let used = |id: &String| pool.disk_used(&id.parse::<VmId>().ok()?).ok();
        Ok::<_, crate::error::ServiceError>(ids.iter().filter_map(|id| Some((id.clone(), used(id)?))).collect())
    });
    read.await.unwrap_or_default()
}

async fn pause_growing(
    service: &Service,
    before: &HashMap<String, Bytes>,
    now: &HashMap<String, Bytes>,
    tolerated: Bytes,
) {
    for (id, machine) in service.inner().vms.running() {
        let (Some(before), Some(now)) = (before.get(&id), now.get(&id)) else {
            continue;
        };
        if *now - *before <= tolerated {
            continue;
        }
        match machine.pause().await {
            Ok(()) => hold(service, &id, &machine, STORAGE_FULL),
            Err(error) => tracing::warn!(vm = id, %error, "could not be paused, though the pool runs full"),
        }
    }
}

fn hold(service: &Service, id: &str, machine: &Arc<dyn Machine>, reason: &str) {
    tracing::warn!(vm = id, reason, "paused");
    if let Some(vm) = service.inner().vms.note(id, machine, VmStatus::Paused, Some(reason)) {
        let details = json!({ "reason": reason });
        service.inner().events.publish(EventKind::Paused, Some(&vm), details);
    }
    service.inner().held.lock().insert(id.to_owned(), Arc::clone(machine));
}

async fn resume_held(service: &Service) {
    let held: Vec<_> = service.inner().held.lock().drain().collect();
    for (id, machine) in held {
        match machine.resume().await {
            Ok(()) => {
                if let Some(vm) = service.inner().vms.note(&id, &machine, VmStatus::Running, None) {
                    service
                        .inner()
                        .events
                        .publish(EventKind::Resumed, Some(&vm), Value::Null);
                }
                tracing::info!(vm = id, "resumed: there is room again");
            }
            // Stopped or deleted meanwhile.
            Err(scalebox_vmm::Error::Ended { .. }) => {}
            Err(error) => {
                tracing::warn!(vm = id, %error, "could not be resumed; trying again");
                service.inner().held.lock().insert(id, machine);
            }
        }
    }
}

/// Follows what the hypervisor says of one machine, for as long as it is polled: one that it stops
/// is held until there is room.
pub async fn follow(service: &Service, id: &str, machine: &Arc<dyn Machine>) -> Infallible {
    let mut events = machine.events();
    // One that an earlier daemon held stands still since.
    hold_if_still(service, id, machine).await;
    loop {
        match events.recv().await {
            Ok(MachineEvent::IoError { nospace: true, .. }) => hold(service, id, machine, STORAGE_FULL),
            // What lies below the pool may have another word for being full; with room enough, the
            // resumption comes at once.
            Ok(MachineEvent::IoError { nospace: false, reason }) => {
                hold(service, id, machine, &format!("disk_error: {reason}"));
            }
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => hold_if_still(service, id, machine).await,
            // It ends with the machine, whose end somebody else waits for.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

async fn hold_if_still(service: &Service, id: &str, machine: &Arc<dyn Machine>) {
    if matches!(machine.state().await, Ok(MachineState::Stalled | MachineState::Paused)) {
        hold(service, id, machine, STORAGE_FULL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_less_is_free_the_less_growth_is_tolerated() {
        assert_eq!(tolerated_growth(RESUME_FROM), None);
        assert_eq!(tolerated_growth(PAUSE_BELOW - Bytes::new(1)), Some(MUCH));
        assert_eq!(tolerated_growth(PAUSE_ALL_BELOW - Bytes::new(1)), Some(Bytes::ZERO));
        assert_eq!(tolerated_growth(Bytes::ZERO), Some(Bytes::ZERO));
    }
}
