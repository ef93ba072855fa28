//! Detects guests that cannot boot.
//!
//! A guest that reboots over and over does not start: its kernel panics, or it finds no root file
//! system. It would use a processor for ever and appear to be running. A guest whose agent was up
//! in between did boot, and may reboot any number of times.

use scalebox_vmm::{Machine, MachineEvent};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

/// Number of reboots in a row that count as a loop.
const LOOP_REBOOTS: u32 = 6;
/// Maximum interval between reboots in a row. An emulated guest takes about ten seconds to fail to
/// boot.
const MAX_REBOOT_INTERVAL: Duration = Duration::from_secs(60);

/// Waits until the guest is in a reboot loop, and returns the reason for the failure.
pub(crate) async fn detect(machine: &Arc<dyn Machine>) -> String {
    let mut events = machine.events();
    let mut reboots = RebootCounter::default();
    loop {
        match events.recv().await {
            Ok(MachineEvent::GuestReboot) if reboots.count(Instant::now()) => {
                return format!(
                    "the guest cannot boot: it rebooted {LOOP_REBOOTS} times, each within {} s of the previous time",
                    MAX_REBOOT_INTERVAL.as_secs()
                );
            }
            Ok(MachineEvent::AgentUp) => reboots = RebootCounter::default(),
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            // The channel closes when the machine ends; another task waits for that.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// Counts reboots in a row.
#[derive(Default)]
struct RebootCounter {
    in_a_row: u32,
    last: Option<Instant>,
}

impl RebootCounter {
    /// Counts a reboot. Returns whether the guest is in a loop.
    fn count(&mut self, now: Instant) -> bool {
        let follows = self.last.is_some_and(|last| now - last <= MAX_REBOOT_INTERVAL);
        self.in_a_row = if follows { self.in_a_row + 1 } else { 1 };
        self.last = Some(now);
        self.in_a_row >= LOOP_REBOOTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reboots_far_apart_are_not_a_loop() {
        let begun = Instant::now();
        let mut reboots = RebootCounter::default();
        let apart = |n: u32| begun + (MAX_REBOOT_INTERVAL + Duration::from_secs(1)) * n;
        assert!((0..20).all(|n| !reboots.count(apart(n))));
        let close = |n: u32| apart(20) + Duration::from_secs(u64::from(n));
        let loops: Vec<bool> = (0..6).map(|n| reboots.count(close(n))).collect();
        assert_eq!(loops, [false, false, false, false, false, true]);
    }
}
