//! Auto-extend: grows a VM's disk before its guest's root file system is full.
//!
//! Only the guest can determine the usage of its file system, so its agent is queried every few
//! seconds, and every second close to the threshold. The disk then grows as with `PATCH /vms/{vm}`:
//! admitted, live, and recorded before it is done. It grows by the increment, or by as much as the
//! limit and the pool allow. Each step is logged and published as an event; a step that keeps
//! failing is reported once.

use crate::host::error::ServiceError;
use crate::host::{Host, blocking};
use crate::pool::admission;
use crate::state::Record;
use crate::vm::{change, guest_fs};
use futures::stream::{self, StreamExt};
use scalebox_api::{AutoExtend, EventKind};
use scalebox_guest::FsUsage;
use scalebox_storage::Reservation;
use scalebox_units::{Gib, VmId};
use scalebox_vmm::Machine;
use serde_json::json;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Query interval for guests that are nearly full or write fast.
const SHORT_INTERVAL: Duration = Duration::from_secs(1);
/// Query interval for all other guests.
const INTERVAL: Duration = Duration::from_secs(5);
/// Distance from its threshold, in percentage points, within which a file system counts as nearly
/// full.
const NEARLY_FULL_MARGIN: u64 = 10;
/// Limit on concurrent queries; a guest that does not respond delays few others.
const MAX_CONCURRENT_QUERIES: usize = 8;
/// Time before the same failure is reported again.
const REPORT_INTERVAL: Duration = Duration::from_secs(600);
/// Minimum size of a root file system, as a share of its disk. A smaller one has not followed the
/// last growth, so growing the disk again would not help.
const MIN_FILE_SYSTEM_SHARE: f64 = 0.8;

/// Extends disks for as long as it is polled.
pub(crate) async fn run(host: Host) -> Infallible {
    let schedule = Schedule::default();
    loop {
        tokio::time::sleep(SHORT_INTERVAL).await;
        let now = Instant::now();
        let extending = host.vms.extending();
        schedule.retain(&extending);
        let due = extending.into_iter().filter(|(vm, _)| schedule.is_due(&vm.id, now));
        stream::iter(due)
            .for_each_concurrent(MAX_CONCURRENT_QUERIES, |(vm, machine)| {
                check_guest(&host, &schedule, vm, machine)
            })
            .await;
    }
}

/// Queries one guest, and extends its disk if needed.
async fn check_guest(host: &Host, schedule: &Schedule, vm: Record, machine: Arc<dyn Machine>) {
    let Some(extend) = vm.auto_extend else { return };
    // The usage is unknown without an agent, or while the guest boots.
    let Some(root) = guest_fs::root_file_system(host, &machine).await else {
        schedule.check_in(&vm.id, INTERVAL);
        return;
    };
    let used = used_percent(&root);
    if used < extend.threshold_percent {
        schedule.clear_failure(&vm.id);
        let nearly = used + NEARLY_FULL_MARGIN >= extend.threshold_percent;
        schedule.check_in(&vm.id, if nearly { SHORT_INTERVAL } else { INTERVAL });
        return;
    }
    let reason = if root.total < vm.disk_size.bytes().scaled(MIN_FILE_SYSTEM_SHARE) {
        "the guest's file system has not grown since its disk last grew: run resize2fs in the guest".to_owned()
    } else {
        match extend_disk(host, &vm, extend, used).await {
            // The guest needs a moment to grow its file system.
            Ok(()) => {
                schedule.clear_failure(&vm.id);
                schedule.check_in(&vm.id, SHORT_INTERVAL);
                return;
            }
            Err(ServiceError::NotFound(_) | ServiceError::Busy(_)) => return,
            Err(error) => error.to_string(),
        }
    };
    schedule.check_in(&vm.id, INTERVAL);
    if schedule.should_report(&vm.id, &reason) {
        tracing::warn!(
            vm = %vm.id,
            name = vm.name,
            used_percent = used,
            reason,
            "cannot auto-extend the VM's disk"
        );
        let details = json!({ "reason": reason, "used_percent": used });
        host.events.publish(EventKind::NotExtended, Some(&vm), details);
    }
}

/// Returns the usage in percent, rounded up as by `df` in the guest.
fn used_percent(root: &FsUsage) -> u64 {
    let (used, total) = (u128::from(root.used.as_u64()), u128::from(root.total.as_u64()));
    // The figures come from the guest and may be arbitrary.
    (used * 100).div_ceil(total.max(1)).min(100) as u64
}

/// Extends a VM's disk once.
async fn extend_disk(host: &Host, vm: &Record, extend: AutoExtend, used: u64) -> Result<(), ServiceError> {
    let max_growth = extend
        .increment_gib
        .min(extend.limit_gib.saturating_sub(vm.disk_size.as_u64()));
    // Admission may wait for deleted disks, so it comes first: no operation on the VM waits for it.
    let admitted = admit(host, Gib::new(max_growth)).await?;
    let operation = host.vms.begin(vm.id.as_str(), "being extended")?;
    let now = &operation.record;
    if (now.disk_size, now.auto_extend) != (vm.disk_size, vm.auto_extend) || operation.machine.is_none() {
        // The VM was changed in the meantime; the next query decides again.
        return Ok(());
    }
    let cause = json!({ "by": "auto_extend", "used_percent": used });
    change::grow_and_publish(host, &operation, admitted, cause).await
}

/// Admits as much as fits, at most `max` and at least 1 GiB.
async fn admit(host: &Host, max: Gib) -> Result<Reservation, ServiceError> {
    let rejected = match admission::admit(host, max.bytes()).await {
        Err(error) if error.is_insufficient() => error,
        other => return other,
    };
    let pool = Arc::clone(&host.pool);
    match blocking(move || pool.admit_between(Gib::new(1).bytes(), max.bytes())).await {
        Err(error) if error.is_insufficient() => Err(rejected),
        other => other,
    }
}

/// The time of each guest's next query, and its last reported failure.
#[derive(Default)]
struct Schedule(Mutex<HashMap<VmId, GuestSchedule>>);

struct GuestSchedule {
    next: Instant,
    reported: Option<(String, Instant)>,
}

impl Schedule {
    fn lock(&self) -> MutexGuard<'_, HashMap<VmId, GuestSchedule>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn retain(&self, vms: &[(Record, Arc<dyn Machine>)]) {
        self.lock().retain(|id, _| vms.iter().any(|(vm, _)| vm.id == *id));
    }

    fn is_due(&self, id: &VmId, now: Instant) -> bool {
        self.lock().get(id).is_none_or(|guest| guest.next <= now)
    }

    fn check_in(&self, id: &VmId, time: Duration) {
        let next = Instant::now() + time;
        self.lock()
            .entry(id.to_owned())
            .and_modify(|guest| guest.next = next)
            .or_insert(GuestSchedule { next, reported: None });
    }

    fn clear_failure(&self, id: &VmId) {
        if let Some(guest) = self.lock().get_mut(id) {
            guest.reported = None;
        }
    }

    /// Returns whether this failure has not been reported recently.
    fn should_report(&self, id: &VmId, reason: &str) -> bool {
        let (mut guests, now) = (self.lock(), Instant::now());
        let Some(guest) = guests.get_mut(id) else { return true };
        let known =
            matches!(&guest.reported, Some((reported, at)) if reported == reason && now < *at + REPORT_INTERVAL);
        if !known {
            guest.reported = Some((reason.to_owned(), now));
        }
        !known
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_units::Bytes;

    #[test]
    fn the_usage_in_percent_matches_df_in_the_guest() {
        let used = |used, total| {
            used_percent(&FsUsage {
                used: Bytes::new(used),
                total: Bytes::new(total),
            })
        };
        assert_eq!(
            [used(0, 100), used(1, 1000), used(799, 1000), used(1000, 1000)],
            [0, 1, 80, 100]
        );
        assert_eq!(
            [used(5, 0), used(u64::MAX, 1), used(u64::MAX, u64::MAX)],
            [100, 100, 100]
        );
    }

    #[test]
    fn a_failure_is_reported_once_until_it_changes_or_is_resolved() {
        let schedule = Schedule::default();
        let vm: VmId = "vm-0123456789ab".parse().unwrap();
        schedule.check_in(&vm, INTERVAL);
        assert!(schedule.should_report(&vm, "full"));
        assert!(!schedule.should_report(&vm, "full"));
        assert!(schedule.should_report(&vm, "another reason"));
        schedule.clear_failure(&vm);
        assert!(schedule.should_report(&vm, "another reason"));
    }
}
