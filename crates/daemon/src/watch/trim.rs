//! Trims guests, one at a time, through their agents: by schedule and on demand.
//!
//! A guest that deletes a file keeps its blocks allocated until it trims. Then the hypervisor
//! punches holes in the disk, the pool frees the blocks, and the host disk gets them back (see
//! [`reclaim`](crate::pool::reclaim)).

use crate::host::Service;
use crate::host::agent::{self, AgentFailed};
use crate::host::error::ServiceError;
use scalebox_client::{Trimmed, VmStatus};
use scalebox_guest::AgentError;
use scalebox_units::Bytes;
use scalebox_vmm::Machine;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How often to check which guests are due.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Trims the file systems of a running guest, and requests a trim of the pool.
///
/// # Errors
/// 404; 409 if the VM is not running, or its agent does not respond or cannot trim.
pub async fn on_demand(service: &Service, reference: &str) -> Result<Trimmed, ServiceError> {
    let (record, machine) = service.inner().vms.find_with_machine(reference)?;
    let name = record.name;
    let (VmStatus::Running, Some(machine)) = (record.status, machine) else {
        return Err(ServiceError::WrongState(format!(
            "VM {name} is {}: only a running guest can be trimmed",
            record.status
        )));
    };
    if !machine.supports_discard() {
        return Err(ServiceError::WrongState(format!(
            "cannot trim VM {name}: its hypervisor does not support discard, so blocks are freed only when the VM is deleted"
        )));
    }
    let trimmed = trim(service, &machine).await.map_err(|why| {
        let advice = match why {
            AgentFailed::Unreachable(_) | AgentFailed::Rejected(AgentError::Timeout) => {
                "; if the guest has no agent, run `fstrim /` in it"
            }
            AgentFailed::Rejected(_) => "",
        };
        ServiceError::WrongState(format!("cannot trim VM {name}: {why}{advice}"))
    })?;
    Ok(Trimmed {
        trimmed_bytes: trimmed.as_u64(),
    })
}

async fn trim(service: &Service, machine: &Arc<dyn Machine>) -> Result<Bytes, AgentFailed> {
    let trimmed = agent::reach(machine).await?.trim().await?;
    service.inner().reclaim.freed();
    tracing::info!(vm = %machine.id(), trimmed_bytes = trimmed.as_u64(), "guest trimmed");
    Ok(trimmed)
}

/// Trims each guest once per interval, for as long as it is polled.
pub async fn run(service: Service) -> Infallible {
    let interval = service.inner().settings.guest_trim_interval;
    if interval.is_zero() {
        return std::future::pending().await;
    }
    let mut schedule = Schedule::default();
    loop {
        tokio::time::sleep(CHECK_INTERVAL.min(interval)).await;
        let running = service.inner().vms.running();
        let ids: Vec<&str> = running.iter().map(|(id, _)| id.as_str()).collect();
        let due = schedule.due(&ids, interval, Instant::now());
        for (id, machine) in running.iter().filter(|(id, _)| due.contains(id)) {
            if !machine.supports_discard() {
                continue;
            }
            if let Err(why) = trim(&service, machine).await {
                tracing::info!(
                    vm = id,
                    %why,
                    "cannot trim the guest; retrying after the next interval"
                );
            }
        }
    }
}

/// The time of each guest's next trim.
#[derive(Default)]
struct Schedule(HashMap<String, Instant>);

impl Schedule {
    /// Returns the guests in `running` that are due, and schedules each of them an interval later.
    /// The first trim of a guest is after a fraction of the interval derived from its id, so that
    /// guests started together are not trimmed together.
    fn due(&mut self, running: &[&str], interval: Duration, now: Instant) -> Vec<String> {
        self.0.retain(|id, _| running.contains(&id.as_str()));
        let mut due = Vec::new();
        for id in running {
            match self.0.get_mut(*id) {
                None => {
                    self.0.insert((*id).to_owned(), now + interval.mul_f64(fraction(id)));
                }
                Some(next) if *next <= now => {
                    *next = now + interval;
                    due.push((*id).to_owned());
                }
                Some(_) => {}
            }
        }
        due
    }
}

/// Returns a number in 0..1 from a VM's id, whose last digits are random hex.
fn fraction(id: &str) -> f64 {
    let digits = id.get(id.len().saturating_sub(4)..).unwrap_or_default();
    u16::from_str_radix(digits, 16).map_or(0.5, |bits| f64::from(bits) / 65536.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guest_is_trimmed_once_per_interval_and_many_guests_are_spread_over_it() {
        let ids: Vec<String> = (0..16).map(|n| format!("vm-00000000{n:x}800")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let (interval, begun) = (Duration::from_secs(1600), Instant::now());
        let mut schedule = Schedule::default();
        assert_eq!(schedule.due(&ids, interval, begun), Vec::<String>::new());
        for round in 1..=3 {
            let mut seen = Vec::new();
            for part in 1..=16 {
                let now = begun + interval * (round - 1) + interval * part / 16;
                let due = schedule.due(&ids, interval, now);
                assert!(due.len() <= 2, "{due:?}");
                seen.extend(due);
            }
            seen.sort();
            assert_eq!(seen, ids, "round {round}");
        }
        // A guest that was stopped and started is scheduled anew.
        assert_eq!(schedule.due(&[], interval, begun), Vec::<String>::new());
        assert!(schedule.0.is_empty());
    }
}
