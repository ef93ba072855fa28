//! Trims guests, one at a time, through their agents: by schedule and on demand.
//!
//! A guest that deletes a file keeps its blocks allocated until it trims. Then the hypervisor
//! punches holes in the disk, the pool frees the blocks, and the blocks return to the host disk
//! (see [`reclaim`](crate::pool::reclaim)).

use crate::host::Host;
use crate::vm::trim;
use scalebox_units::VmId;
use std::collections::HashMap;
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::Instant;

/// Interval of checks for guests that are due.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Trims each guest once per interval, for as long as it is polled.
pub(crate) async fn run(host: Host) -> Infallible {
    let interval = host.settings.guest_trim_interval;
    if interval.is_zero() {
        return std::future::pending().await;
    }
    let mut schedule = Schedule::default();
    loop {
        tokio::time::sleep(CHECK_INTERVAL.min(interval)).await;
        let running = host.vms.running();
        let ids: Vec<&VmId> = running.iter().map(|(id, _)| id).collect();
        let due = schedule.due(&ids, interval, Instant::now());
        for (id, machine) in running.iter().filter(|(id, _)| due.contains(id)) {
            if !machine.supports_discard() {
                continue;
            }
            if let Err(why) = trim::trim(&host, machine).await {
                tracing::info!(
                    vm = %id,
                    %why,
                    "cannot trim the guest; retrying after the next interval"
                );
            }
        }
    }
}

/// The time of each guest's next trim.
#[derive(Default)]
struct Schedule(HashMap<VmId, Instant>);

impl Schedule {
    /// Returns the guests in `running` that are due, and schedules each of them an interval later.
    /// The first trim of a guest is after a fraction of the interval derived from its id, so that
    /// guests started together are not trimmed together.
    fn due(&mut self, running: &[&VmId], interval: Duration, now: Instant) -> Vec<VmId> {
        self.0.retain(|id, _| running.contains(&id));
        let mut due = Vec::new();
        for id in running {
            match self.0.get_mut(*id) {
                None => {
                    self.0.insert((*id).clone(), now + interval.mul_f64(fraction(id)));
                }
                Some(next) if *next <= now => {
                    *next = now + interval;
                    due.push((*id).clone());
                }
                Some(_) => {}
            }
        }
        due
    }
}

/// Returns a number in 0..1 from a VM's id, whose last digits are random hex.
fn fraction(id: &VmId) -> f64 {
    let digits = id.digits();
    let digits = digits.get(digits.len().saturating_sub(4)..).unwrap_or_default();
    u16::from_str_radix(digits, 16).map_or(0.5, |bits| f64::from(bits) / 65536.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guest_is_trimmed_once_per_interval_and_many_guests_are_spread_over_it() {
        let ids: Vec<VmId> = (0..16)
            .map(|n| format!("vm-00000000{n:x}800").parse().unwrap())
            .collect();
        let ids: Vec<&VmId> = ids.iter().collect();
        let (interval, begun) = (Duration::from_secs(1600), Instant::now());
        let mut schedule = Schedule::default();
        assert_eq!(schedule.due(&ids, interval, begun), Vec::<VmId>::new());
        for round in 1..=3 {
            let mut seen = Vec::new();
            for part in 1..=16 {
                let now = begun + interval * (round - 1) + interval * part / 16;
                let due = schedule.due(&ids, interval, now);
                assert!(due.len() <= 2, "{due:?}");
                seen.extend(due);
            }
            seen.sort();
            assert_eq!(seen.iter().collect::<Vec<_>>(), ids, "round {round}");
        }
        // A guest that was stopped and started is scheduled anew.
        assert_eq!(schedule.due(&[], interval, begun), Vec::<VmId>::new());
        assert!(schedule.0.is_empty());
    }
}
