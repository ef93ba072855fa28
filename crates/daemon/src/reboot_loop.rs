//! A guest that restarts itself over and over does not come up: its kernel panics, or it finds no
//! root file system. It would take a processor for ever, and look as if it ran. One whose agent was
//! there in between did come up, and may restart as often as it likes.

use scalebox_vmm::{Machine, MachineEvent};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

/// So many restarts in a row are a loop.
const RESTARTS: u32 = 6;
/// In a row are those that follow one another within this time; an emulated guest takes about ten
/// seconds to find out that it cannot boot.
const WITHIN: Duration = Duration::from_secs(60);

/// Waits until the guest is in such a loop, and says so.
pub async fn seen(machine: &Arc<dyn Machine>) -> String {
    let mut events = machine.events();
    let mut row = Row::default();
    loop {
        match events.recv().await {
            Ok(MachineEvent::GuestReboot) if row.another(Instant::now()) => {
                return format!(
                    "its guest cannot boot: it restarted itself {RESTARTS} times, each within {} s of the time before",
                    WITHIN.as_secs()
                );
            }
            Ok(MachineEvent::AgentUp) => row = Row::default(),
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            // With the machine, whose end somebody else waits for.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// Restarts in a row.
#[derive(Default)]
struct Row {
    restarts: u32,
    last: Option<Instant>,
}

impl Row {
    /// Counts one; whether it is a loop by now.
    fn another(&mut self, now: Instant) -> bool {
        let follows = self.last.is_some_and(|last| now - last <= WITHIN);
        self.restarts = if follows { self.restarts + 1 } else { 1 };
        self.last = Some(now);
        self.restarts >= RESTARTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_far_apart_are_no_loop() {
        let begun = Instant::now();
        let mut row = Row::default();
        let apart = |n: u32| begun + (WITHIN + Duration::from_secs(1)) * n;
        assert!((0..20).all(|n| !row.another(apart(n))));
        let close = |n: u32| apart(20) + Duration::from_secs(u64::from(n));
        let loops: Vec<bool> = (0..6).map(|n| row.another(close(n))).collect();
        assert_eq!(loops, [false, false, false, false, false, true]);
    }
}
