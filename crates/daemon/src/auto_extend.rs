//! Disks that extend themselves: before a guest's root file system is full, its disk grows.
//!
//! How full it is only the guest knows, so its agent is asked, every few seconds, and every second
//! when it is nearly time. The disk then grows as by `PATCH /vms/{vm}`: admitted, live, recorded
//! before it is done; by the increment, or by what limit and pool allow. Each step is an event and
//! a line in the log; so is one that could not be taken, once until it can.

use crate::create::is_refusal;
use crate::error::ServiceError;
use crate::resize;
use crate::service::{Service, blocking};
use crate::state::Record;
use futures::stream::{self, StreamExt};
use scalebox_client::{AutoExtend, EventKind};
use scalebox_guest::FsUsage;
use scalebox_storage::Reservation;
use scalebox_units::Gib;
use scalebox_vmm::Machine;
use serde_json::json;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// How often guests are looked at that are nearly full, or write fast.
const TICK: Duration = Duration::from_secs(1);
/// How often all others are.
const INTERVAL: Duration = Duration::from_secs(5);
/// This near to its threshold, in percent, a file system is nearly full.
const NEARLY: u64 = 10;
/// So many guests are asked at the same time: one that does not answer holds up few others.
const AT_ONCE: usize = 8;
/// A step that cannot be taken is told again after this long.
const TELL_AGAIN: Duration = Duration::from_secs(600);
/// A guest whose root file system is smaller than this share of its disk has not followed the last
/// growth: another would not help it.
const FOLLOWED: f64 = 0.8;

/// Refuses a limit that the disk has passed already.
///
/// # Errors
/// 400.
pub fn check(extend: AutoExtend, size: Gib) -> Result<(), ServiceError> {
    if extend.limit_gib < size.as_u64() {
        return Err(ServiceError::invalid_field(
            "disk_auto_extend.limit_gib",
            format!("disk_auto_extend.limit_gib must be at least the size of the disk, which is {size} GiB"),
        ));
    }
    Ok(())
}

/// Extends disks for as long as it is polled.
pub async fn run(service: Service) -> Infallible {
    let turns = Turns::default();
    loop {
        tokio::time::sleep(TICK).await;
        let now = Instant::now();
        let extending = service.inner().vms.extending();
        turns.forget_all_but(&extending);
        let due = extending.into_iter().filter(|(vm, _)| turns.is_due(&vm.id, now));
        stream::iter(due)
            .for_each_concurrent(AT_ONCE, |(vm, machine)| look(&service, &turns, vm, machine))
            .await;
    }
}

/// Looks at one guest, and extends its disk for as long as that is needed.
async fn look(service: &Service, turns: &Turns, vm: Record, machine: Arc<dyn Machine>) {
    let Some(extend) = vm.auto_extend else { return };
    // Without an agent, or while it boots, nothing is known.
    let Some(root) = resize::root_of(&machine).await else {
        turns.look_in(&vm.id, INTERVAL);
        return;
    };
    let used = used_percent(&root);
    if used < extend.threshold_percent {
        turns.went_well(&vm.id);
        let nearly = used + NEARLY >= extend.threshold_percent;
        turns.look_in(&vm.id, if nearly { TICK } else { INTERVAL });
        return;
    }
    let reason = if root.total < Gib::new(vm.disk_size_gib).bytes().scaled(FOLLOWED) {
        "the guest has not grown its file system since the last growth of its disk: run resize2fs in it".to_owned()
    } else {
        match step(service, &vm, extend, used).await {
            // The guest takes a moment to grow its file system.
            Ok(()) => {
                turns.went_well(&vm.id);
                turns.look_in(&vm.id, TICK);
                return;
            }
            Err(ServiceError::NotFound(_) | ServiceError::Busy(_)) => return,
            Err(error) => error.to_string(),
        }
    };
    turns.look_in(&vm.id, INTERVAL);
    if turns.is_news(&vm.id, &reason) {
        tracing::warn!(
            vm = vm.id,
            name = vm.name,
            used_percent = used,
            reason,
            "its disk does not extend itself"
        );
        let details = json!({ "reason": reason, "used_percent": used });
        service
            .inner()
            .events
            .publish(EventKind::NotExtended, Some(&vm), details);
    }
}

/// As `df` in the guest shows it: rounded up.
fn used_percent(root: &FsUsage) -> u64 {
    let (used, total) = (u128::from(root.used.as_u64()), u128::from(root.total.as_u64()));
    // A guest may say anything.
    (used * 100).div_ceil(total.max(1)).min(100) as u64
}

/// One growth.
async fn step(service: &Service, vm: &Record, extend: AutoExtend, used: u64) -> Result<(), ServiceError> {
    let most = extend
        .increment_gib
        .min(extend.limit_gib.saturating_sub(vm.disk_size_gib));
    // Admitted before the VM is taken: that may wait for deleted disks, and nobody is to wait for
    // it.
    let admitted = admit(service, Gib::new(most)).await?;
    let operation = service.inner().vms.begin(&vm.id, "being extended")?;
    let now = &operation.record;
    if (now.disk_size_gib, now.auto_extend) != (vm.disk_size_gib, vm.auto_extend) || operation.machine.is_none() {
        // Changed meanwhile: it is looked at again.
        return Ok(());
    }
    let cause = json!({ "by": "auto_extend", "used_percent": used });
    service.enlarge(&operation, admitted, cause).await
}

/// As much as there is room for, at most `most` and at least 1 GiB.
async fn admit(service: &Service, most: Gib) -> Result<Reservation, ServiceError> {
    let refused = match service.admit(most.bytes()).await {
        Err(error) if is_refusal(&error) => error,
        other => return other,
    };
    let pool = Arc::clone(&service.inner().pool);
    let less = blocking(move || {
        let smaller = (1..most.as_u64()).rev().map(|size| Gib::new(size).bytes());
        Ok::<_, ServiceError>(smaller.map(|size| pool.admit(size)).find_map(Result::ok))
    });
    less.await?.ok_or(refused)
}

/// When each guest is looked at next, and what was told of it.
#[derive(Default)]
struct Turns(Mutex<HashMap<String, Turn>>);

struct Turn {
    next: Instant,
    told: Option<(String, Instant)>,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Turn>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget_all_but(&self, vms: &[(Record, Arc<dyn Machine>)]) {
        self.lock().retain(|id, _| vms.iter().any(|(vm, _)| vm.id == *id));
    }

    fn is_due(&self, id: &str, now: Instant) -> bool {
        self.lock().get(id).is_none_or(|turn| turn.next <= now)
    }

    fn look_in(&self, id: &str, time: Duration) {
        let next = Instant::now() + time;
        self.lock()
            .entry(id.to_owned())
            .and_modify(|turn| turn.next = next)
            .or_insert(Turn { next, told: None });
    }

    fn went_well(&self, id: &str) {
        if let Some(turn) = self.lock().get_mut(id) {
            turn.told = None;
        }
    }

    /// Whether that was not told of it lately.
    fn is_news(&self, id: &str, reason: &str) -> bool {
        let (mut turns, now) = (self.lock(), Instant::now());
        let Some(turn) = turns.get_mut(id) else { return true };
        let known = matches!(&turn.told, Some((told, at)) if told == reason && now < *at + TELL_AGAIN);
        if !known {
            turn.told = Some((reason.to_owned(), now));
        }
        !known
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_units::Bytes;

    #[test]
    fn how_full_a_guest_is_is_what_its_df_shows() {
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
    fn what_cannot_be_done_is_told_once_until_it_changes_or_works() {
        let turns = Turns::default();
        turns.look_in("vm-1", INTERVAL);
        assert!(turns.is_news("vm-1", "full"));
        assert!(!turns.is_news("vm-1", "full"));
        assert!(turns.is_news("vm-1", "another reason"));
        turns.went_well("vm-1");
        assert!(turns.is_news("vm-1", "another reason"));
    }
}
