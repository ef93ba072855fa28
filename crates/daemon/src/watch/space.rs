//! Pauses VMs before the host runs out of space, so that no guest breaks.
//!
//! This task watches the pool together with the host disk under it. Before either runs full, it
//! grows the pool if that is allowed and the host disk has room; otherwise it pauses the VMs that
//! still allocate blocks, and resumes them when there is room. As a second line of defence, the
//! hypervisor pauses a guest whose write fails on the host instead of passing the error on. In both
//! cases the guest sees neither an I/O error nor a read-only root, only a gap in time; the VM is
//! `paused` with the reason `storage_full`.

use crate::host::advice::advised;
use crate::host::{Host, blocking};
use crate::pool::growth;
use crate::vm::pause;
use scalebox_units::{Bytes, VmId};
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

/// Free space below which the growth of disks is checked several times a second. A fast host writes
/// half of it in a second.
const WATCH_BELOW: Bytes = Bytes::from_mib(4096);
/// Free space below which VMs are paused that grow by more than [`TOLERATED_GROWTH`] between two
/// checks.
const PAUSE_BELOW: Bytes = Bytes::from_mib(1024);
/// Free space below which VMs are paused that grow at all.
const PAUSE_ALL_BELOW: Bytes = Bytes::from_mib(256);
/// Free space from which paused VMs are resumed. The distance to [`PAUSE_BELOW`] prevents VMs from
/// being paused and resumed in turn.
const RESUME_FROM: Bytes = Bytes::from_mib(1536);
/// Growth between two checks that does not pause a VM: more than the logs of a guest take.
const TOLERATED_GROWTH: Bytes = Bytes::from_mib(1);

const INTERVAL: Duration = Duration::from_secs(1);
const SHORT_INTERVAL: Duration = Duration::from_millis(200);
/// Time limit for waiting for a growth of the pool.
const GROWTH_TIMEOUT: Duration = Duration::from_millis(500);

/// Watches the pool for as long as it is polled.
pub(crate) async fn run(host: Host) -> Infallible {
    let mut before: HashMap<VmId, Bytes> = HashMap::new();
    loop {
        let pool = Arc::clone(&host.pool);
        let free = match blocking(move || pool.space()).await {
            Ok(space) => space.free,
            Err(error) => {
                tracing::warn!(%error, "cannot read the pool's free space; retrying");
                tokio::time::sleep(INTERVAL).await;
                continue;
            }
        };
        if growth::low_water(&host).is_some_and(|mark| free < mark.max(RESUME_FROM)) {
            // A slow growth continues in the background, and does not delay pausing VMs.
            let grown = tokio::time::timeout(GROWTH_TIMEOUT, growth::extend_pool(&host)).await;
            if grown.is_ok_and(|grown| grown) {
                continue;
            }
        }
        if free >= RESUME_FROM {
            pause::resume_paused(&host).await;
        }
        if free >= WATCH_BELOW {
            before.clear();
            tokio::time::sleep(INTERVAL).await;
            continue;
        }
        let now = disk_sizes(&host).await;
        if let Some(tolerated) = tolerated_growth(free) {
            pause_growing(&host, &before, &now, tolerated).await;
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
async fn disk_sizes(host: &Host) -> HashMap<VmId, Bytes> {
    let pool = Arc::clone(&host.pool);
    let ids: Vec<VmId> = host.vms.running().into_iter().map(|(id, _)| id).collect();
    let read = blocking(move || {
        // A disk that cannot be read has just been deleted.
        let used = |id: &VmId| pool.disk_used(id).ok();
        Ok::<_, crate::host::error::ServiceError>(ids.iter().filter_map(|id| Some((id.clone(), used(id)?))).collect())
    });
    read.await.unwrap_or_default()
}

async fn pause_growing(host: &Host, before: &HashMap<VmId, Bytes>, now: &HashMap<VmId, Bytes>, tolerated: Bytes) {
    for (id, machine) in host.vms.running() {
        let (Some(before), Some(now)) = (before.get(&id), now.get(&id)) else {
            continue;
        };
        if *now - *before <= tolerated {
            continue;
        }
        match machine.pause().await {
            Ok(()) => pause::mark_paused(host, &id, &machine, pause::STORAGE_FULL).await,
            Err(error) => {
                tracing::warn!(vm = %id, error = %advised(&error), "cannot pause the VM although the pool is nearly full")
            }
        }
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
