//! Guests that give back what they have deleted: asked through their agents, one at a time, by
//! schedule and on demand.
//!
//! A guest that deletes a file keeps its blocks until it trims: then the hypervisor punches holes
//! in the disk, the pool frees the blocks, and the host disk has them (see
//! [`reclaim`](crate::reclaim)).

use crate::agent::{self, NoAgent};
use crate::error::ServiceError;
use crate::service::Service;
use scalebox_client::{Trimmed, VmStatus};
use scalebox_guest::AgentError;
use scalebox_units::Bytes;
use scalebox_vmm::Machine;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How often it is looked for guests whose turn has come.
const LOOK: Duration = Duration::from_secs(30);

/// Asks a guest that runs to trim its file systems, and hands on what that frees.
///
/// # Errors
/// 404; 409 when the VM does not run, or has no agent that answers and can trim.
pub async fn on_demand(service: &Service, reference: &str) -> Result<Trimmed, ServiceError> {
    let (record, machine) = service.inner().vms.find_with_machine(reference)?;
    let name = record.name;
    let (VmStatus::Running, Some(machine)) = (record.status, machine) else {
        return Err(ServiceError::WrongState(format!(
            "VM {name} is {}: only a guest that runs can give its blocks back",
            record.status
        )));
    };
    if !machine.supports_discard() {
        return Err(ServiceError::WrongState(format!(
            "VM {name} cannot be trimmed: its hypervisor offers its guests no discard, so the blocks stay until the VM is deleted"
        )));
    }
    let trimmed = trim(service, &machine).await.map_err(|why| {
        let advice = match why {
            NoAgent::Unreached(_) | NoAgent::Refused(AgentError::Timeout) => "; without an agent, run `fstrim /` in it",
            NoAgent::Refused(_) => "",
        };
        ServiceError::WrongState(format!("VM {name} could not be trimmed: {why}{advice}"))
    })?;
    Ok(Trimmed {
        trimmed_bytes: trimmed.as_u64(),
    })
}

async fn trim(service: &Service, machine: &Arc<dyn Machine>) -> Result<Bytes, NoAgent> {
    let trimmed = agent::reach(machine).await?.trim().await?;
    service.inner().reclaim.freed();
    tracing::info!(vm = %machine.id(), trimmed_bytes = trimmed.as_u64(), "the guest trimmed its file systems");
    Ok(trimmed)
}

/// Trims each guest once in an interval, for as long as it is polled.
pub async fn run(service: Service) -> Infallible {
    let interval = service.inner().settings.guest_trim_interval;
    if interval.is_zero() {
        return std::future::pending().await;
    }
    let mut turns = Turns::default();
    loop {
        tokio::time::sleep(LOOK.min(interval)).await;
        let running = service.inner().vms.running();
        let ids: Vec<&str> = running.iter().map(|(id, _)| id.as_str()).collect();
        let due = turns.due(&ids, interval, Instant::now());
        for (id, machine) in running.iter().filter(|(id, _)| due.contains(id)) {
            if !machine.supports_discard() {
                continue;
            }
            if let Err(why) = trim(&service, machine).await {
                tracing::info!(
                    vm = id,
                    %why,
                    "the guest was not trimmed; it is asked again at its next turn"
                );
            }
        }
    }
}

/// When each guest is to be trimmed next.
#[derive(Default)]
struct Turns(HashMap<String, Instant>);

impl Turns {
    /// The guests among `running` whose turn it is; their next is an interval later. A guest seen
    /// for the first time has its turn after a part of the interval that its id draws, so that
    /// guests started together are not trimmed together.
    fn due(&mut self, running: &[&str], interval: Duration, now: Instant) -> Vec<String> {
        self.0.retain(|id, _| running.contains(&id.as_str()));
        let mut due = Vec::new();
        for id in running {
            match self.0.get_mut(*id) {
                None => {
                    self.0.insert((*id).to_owned(), now + interval.mul_f64(share(id)));
                }
                Some(turn) if *turn <= now => {
                    *turn = now + interval;
                    due.push((*id).to_owned());
                }
                Some(_) => {}
            }
        }
        due
    }
}

/// A number in 0..1 from a VM's id, whose last digits are random bits in hex.
fn share(id: &str) -> f64 {
    let digits = id.get(id.len().saturating_sub(4)..).unwrap_or_default();
    u16::from_str_radix(digits, 16).map_or(0.5, |bits| f64::from(bits) / 65536.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guest_has_one_turn_an_interval_and_those_of_many_are_spread() {
        let ids: Vec<String> = (0..16).map(|n| format!("vm-00000000{n:x}800")).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let (interval, begun) = (Duration::from_secs(1600), Instant::now());
        let mut turns = Turns::default();
        assert_eq!(turns.due(&ids, interval, begun), Vec::<String>::new());
        for round in 1..=3 {
            let mut seen = Vec::new();
            for part in 1..=16 {
                let now = begun + interval * (round - 1) + interval * part / 16;
                let due = turns.due(&ids, interval, now);
                assert!(due.len() <= 2, "{due:?}");
                seen.extend(due);
            }
            seen.sort();
            assert_eq!(seen, ids, "round {round}");
        }
        // One that stopped and started again is new.
        assert_eq!(turns.due(&[], interval, begun), Vec::<String>::new());
        assert!(turns.0.is_empty());
    }
}
