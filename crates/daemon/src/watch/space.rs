//! Pauses VMs before the host runs out of space, so that no guest breaks.
//!
//! This task watches the pool together with the host disk under it. Before either runs full, it
//! grows the pool if that is allowed and the host disk has room; otherwise it pauses the VMs that
//! still allocate blocks, and resumes them when there is room. As a second line of defence, the
//! hypervisor pauses a guest whose write fails on the host instead of passing the error on. In both
//! cases the guest sees neither an I/O error nor a read-only root, only a gap in time; the VM is
//! `paused` with the reason `storage_full`.

use crate::host::{Service, blocking};
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
/// With less free space than this, disk growth is checked several times a second. A fast host
/// writes half of it in a second.
const WATCH_BELOW: Bytes = Bytes::from_mib(4096);
/// With less free space than this, VMs are paused that grow by more than [`TOLERATED_GROWTH`]
/// between two checks.
const PAUSE_BELOW: Bytes = Bytes::from_mib(1024);
/// With less free space than this, VMs are paused that grow at all.
const PAUSE_ALL_BELOW: Bytes = Bytes::from_mib(256);
/// With this much free space, paused VMs are resumed. The distance to [`PAUSE_BELOW`] prevents VMs
/// from being paused and resumed in turn.
const RESUME_FROM: Bytes = Bytes::from_mib(1536);
/// More than a guest's logs write between two checks.
const TOLERATED_GROWTH: Bytes = Bytes::from_mib(1);

const INTERVAL: Duration = Duration::from_secs(1);
const SHORT_INTERVAL: Duration = Duration::from_millis(200);
/// Time limit for waiting for a growth of the pool.
const GROWTH_TIMEOUT: Duration = Duration::from_millis(500);

/// The machines that are paused because storage is full, by VM id.
#[derive(Default)]
pub struct PausedVms {
    machines: Mutex<HashMap<String, Arc<dyn Machine>>>,
}

impl PausedVms {
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
                tracing::warn!(%error, "cannot read the pool's free space; retrying");
                tokio::time::sleep(INTERVAL).await;
                continue;
            }
        };
        if service.low_water().is_some_and(|mark| free < mark.max(RESUME_FROM)) {
            // A slow growth continues in the background, and does not delay pausing VMs.
            let grown = tokio::time::timeout(GROWTH_TIMEOUT, service.extend_pool()).await;
            if grown.is_ok_and(|grown| grown) {
                continue;
            }
        }
        if free >= RESUME_FROM {
            resume_paused(&service).await;
        }
        if free >= WATCH_BELOW {
            before.clear();
            tokio::time::sleep(INTERVAL).await;
            continue;
        }
        let now = disk_sizes(&service).await;
        if let Some(tolerated) = tolerated_growth(free) {
            pause_growing(&service, &before, &now, tolerated).await;
        }
        before = now;
        tokio::time::sleep(SHORT_INTERVAL).await;
    }
}

/// Returns the growth between two checks up to which a VM is not paused; `None` if there is enough
/// space.
fn tolerated_growth(free: Bytes) -> Option<Bytes> {
    if free < PAUSE_ALL_BELOW {
        Some(Bytes::ZERO)
    } else if free < PAUSE_BELOW {
        Some(TOLERATED_GROWTH)
    } else {
        None
    }
}

/// Returns the allocated bytes of the disks of running VMs.
async fn disk_sizes(service: &Service) -> HashMap<String, Bytes> {
    let pool = Arc::clone(&service.inner().pool);
    let ids: Vec<String> = service.inner().vms.running().into_iter().map(|(id, _)| id).collect();
    let read = blocking(move || {
        // A disk that cannot be read has just been deleted.
        let used = |id: &String| pool.disk_used(&id.parse::<VmId>().ok()?).ok();
        Ok::<_, crate::host::error::ServiceError>(ids.iter().filter_map(|id| Some((id.clone(), used(id)?))).collect())
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
            Ok(()) => mark_paused(service, &id, &machine, STORAGE_FULL),
            Err(error) => tracing::warn!(vm = id, %error, "cannot pause the VM although the pool is nearly full"),
        }
    }
}

fn mark_paused(service: &Service, id: &str, machine: &Arc<dyn Machine>, reason: &str) {
    tracing::warn!(vm = id, reason, "VM paused");
    if let Some(vm) = service
        .inner()
        .vms
        .set_if_current(id, machine, VmStatus::Paused, Some(reason))
    {
        let details = json!({ "reason": reason });
        service.inner().events.publish(EventKind::Paused, Some(&vm), details);
    }
    service.inner().paused.lock().insert(id.to_owned(), Arc::clone(machine));
}

async fn resume_paused(service: &Service) {
    let paused: Vec<_> = service.inner().paused.lock().drain().collect();
    for (id, machine) in paused {
        match machine.resume().await {
            Ok(()) => {
                if let Some(vm) = service
                    .inner()
                    .vms
                    .set_if_current(&id, &machine, VmStatus::Running, None)
                {
                    service
                        .inner()
                        .events
                        .publish(EventKind::Resumed, Some(&vm), Value::Null);
                }
                tracing::info!(vm = id, "VM resumed: the pool has free space again");
            }
            // The VM was stopped or deleted in the meantime.
            Err(scalebox_vmm::Error::Ended { .. }) => {}
            Err(error) => {
                tracing::warn!(vm = id, %error, "cannot resume the VM; retrying");
                service.inner().paused.lock().insert(id, machine);
            }
        }
    }
}

/// Follows the events of one machine for as long as it is polled. A machine that its hypervisor
/// pauses stays paused until there is space.
pub async fn follow(service: &Service, id: &str, machine: &Arc<dyn Machine>) -> Infallible {
    let mut events = machine.events();
    // A VM paused by a previous daemon is still paused.
    mark_if_paused(service, id, machine).await;
    loop {
        match events.recv().await {
            Ok(MachineEvent::IoError { nospace: true, .. }) => mark_paused(service, id, machine, STORAGE_FULL),
            // A layer below the pool may report a full disk as another error. If there is enough
            // space, the VM is resumed at once.
            Ok(MachineEvent::IoError { nospace: false, reason }) => {
                mark_paused(service, id, machine, &format!("disk_error: {reason}"));
            }
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => mark_if_paused(service, id, machine).await,
            // The channel closes when the machine ends; another task waits for that.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

async fn mark_if_paused(service: &Service, id: &str, machine: &Arc<dyn Machine>) {
    if matches!(machine.state().await, Ok(MachineState::Stalled | MachineState::Paused)) {
        mark_paused(service, id, machine, STORAGE_FULL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_growth_is_tolerated_with_less_free_space() {
        assert_eq!(tolerated_growth(RESUME_FROM), None);
        assert_eq!(tolerated_growth(PAUSE_BELOW - Bytes::new(1)), Some(TOLERATED_GROWTH));
        assert_eq!(tolerated_growth(PAUSE_ALL_BELOW - Bytes::new(1)), Some(Bytes::ZERO));
        assert_eq!(tolerated_growth(Bytes::ZERO), Some(Bytes::ZERO));
    }
}
