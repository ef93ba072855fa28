//! The commands that requests started and whose end is not published yet.

use scalebox_units::{ExecId, VmId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::time::Instant;

/// Maximum number of commands whose events are published in a burst.
const MAX_BURST: f64 = 100.0;
/// Number of commands per second whose events are published. Clients would lose all other events
/// if thousands of commands filled the ring of events.
const EVENTS_PER_SECOND: f64 = 20.0;

/// The commands whose end is to be published. A clone is another handle on the same table.
#[derive(Clone, Default)]
pub(crate) struct StartedExecs(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    by_vm: HashMap<VmId, HashMap<ExecId, usize>>,
    /// Number of all commands that were started.
    total: u64,
    budget: Option<Budget>,
}

/// A token bucket.
struct Budget {
    tokens: f64,
    at: Instant,
}

/// The effects of the start of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Start {
    /// The events of the command are to be published.
    pub publish: bool,
    /// The command is the first of its VM: a watch is to be started.
    pub watch: bool,
}

/// Guard of a stream that follows a command. The watch does not query the command until all its
/// guards are dropped.
pub(crate) struct Following {
    execs: StartedExecs,
    vm: VmId,
    exec: ExecId,
}

impl StartedExecs {
    /// Adds a command.
    pub(crate) fn start(&self, vm: &VmId, exec: &ExecId) -> Start {
        let mut table = self.lock();
        table.total += 1;
        if !table.spend() {
            return Start {
                publish: false,
                watch: false,
            };
        }
        let watch = !table.by_vm.contains_key(vm);
        table.by_vm.entry(vm.clone()).or_default().insert(exec.clone(), 0);
        Start { publish: true, watch }
    }

    /// Removes a command that has ended. Returns whether its event is to be published.
    pub(crate) fn end(&self, vm: &VmId, exec: &ExecId) -> bool {
        let mut table = self.lock();
        table
            .by_vm
            .get_mut(vm)
            .is_some_and(|execs| execs.remove(exec).is_some())
    }

    /// Returns a guard for a stream that follows the command.
    pub(crate) fn follow(&self, vm: &VmId, exec: &ExecId) -> Following {
        self.count(vm, exec, |followers| followers + 1);
        Following {
            execs: self.clone(),
            vm: vm.clone(),
            exec: exec.clone(),
        }
    }

    /// Lists the commands of a VM that no stream follows. `None`, once, if there are no commands:
    /// the watch ends, and the next command starts another one.
    pub(crate) fn unattended(&self, vm: &VmId) -> Option<Vec<ExecId>> {
        let mut table = self.lock();
        let execs = table.by_vm.get(vm)?;
        if execs.is_empty() {
            table.by_vm.remove(vm);
            return None;
        }
        let unattended = execs.iter().filter(|(_, followers)| **followers == 0);
        Some(unattended.map(|(exec, _)| exec.clone()).collect())
    }

    /// Removes all commands of a VM whose machine has ended.
    pub(crate) fn forget(&self, vm: &VmId) {
        self.lock().by_vm.remove(vm);
    }

    /// Returns the number of commands that were started.
    pub(crate) fn total(&self) -> u64 {
        self.lock().total
    }

    fn count(&self, vm: &VmId, exec: &ExecId, change: impl FnOnce(usize) -> usize) {
        let mut table = self.lock();
        let followers = table.by_vm.get_mut(vm).and_then(|execs| execs.get_mut(exec));
        if let Some(followers) = followers {
            *followers = change(*followers);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Returns whether the events of another command may be published.
    fn spend(&mut self) -> bool {
        let now = Instant::now();
        let budget = self.budget.get_or_insert(Budget {
            tokens: MAX_BURST,
            at: now,
        });
        let gained = now.duration_since(budget.at).as_secs_f64() * EVENTS_PER_SECOND;
        budget.tokens = (budget.tokens + gained).min(MAX_BURST);
        budget.at = now;
        let may = budget.tokens >= 1.0;
        if may {
            budget.tokens -= 1.0;
        }
        may
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.execs
            .count(&self.vm, &self.exec, |followers| followers.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn vm() -> VmId {
        "vm-0123456789ab".parse().unwrap()
    }

    #[test]
    fn each_end_is_published_once_and_followed_execs_are_not_watched() {
        let execs = StartedExecs::default();
        let (first, second) = (ExecId::from_number(1), ExecId::from_number(2));
        let started = |publish, watch| Start { publish, watch };
        assert_eq!(execs.start(&vm(), &first), started(true, true));
        assert_eq!(execs.start(&vm(), &second), started(true, false));
        let following = execs.follow(&vm(), &first);
        assert_eq!(execs.unattended(&vm()), Some(vec![second.clone()]));
        drop(following);
        assert_eq!(execs.unattended(&vm()).unwrap().len(), 2);
        assert!(execs.end(&vm(), &first) && !execs.end(&vm(), &first));
        assert!(execs.end(&vm(), &second));
        assert_eq!(execs.unattended(&vm()), None);
        assert_eq!(execs.start(&vm(), &first), started(true, true));
        execs.forget(&vm());
        assert!(!execs.end(&vm(), &first));
        assert_eq!(execs.total(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn events_have_a_bounded_rate() {
        let execs = StartedExecs::default();
        let publish = |number| execs.start(&vm(), &ExecId::from_number(number)).publish;
        assert_eq!((0..10_000).filter(|number| publish(*number)).count(), 100);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!((0..10_000).filter(|number| publish(*number)).count(), 40);
        assert_eq!(execs.total(), 20_000);
    }
}
