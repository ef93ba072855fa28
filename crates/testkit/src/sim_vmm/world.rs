//! All simulated machines, and the calls that are to fail.

use crate::sim_vmm::body::Body;
use crate::sim_vmm::faults::{Armed, Operation};
use crate::sim_vmm::guest::SimGuest;
use scalebox_units::VmId;
use scalebox_vmm::{ExitReason, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The first pid of simulated machines, above the maximum pid on Linux (`PID_MAX_LIMIT`).
const FIRST_PID: i32 = 1 << 23;

/// The simulated host.
#[derive(Default)]
pub(crate) struct World(Mutex<State>);

pub(crate) struct State {
    /// Running machines, and machines that ended for a known reason while they had no holder.
    pub(crate) machines: BTreeMap<VmId, Arc<Body>>,
    pub(crate) launching: BTreeSet<VmId>,
    pub(crate) faults: Vec<Armed>,
    /// The settings of guests that are launched from now on.
    pub(crate) guest: SimGuest,
    pub(crate) supports_discard: bool,
    pub(crate) can_launch: bool,
    next_pid: i32,
}

impl Default for State {
    fn default() -> State {
        State {
            machines: BTreeMap::new(),
            launching: BTreeSet::new(),
            faults: Vec::new(),
            guest: SimGuest::default(),
            supports_discard: true,
            can_launch: true,
            next_pid: FIRST_PID,
        }
    }
}

impl State {
    pub(crate) fn next_pid(&mut self) -> i32 {
        self.next_pid += 1;
        self.next_pid
    }
}

impl World {
    /// Locks the state. It is never locked across an await, nor while a body is locked.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies the fault that a test has set for a call.
    pub(crate) async fn fault(&self, id: &VmId, operation: Operation) -> Result<()> {
        let fault = {
            let faults = &mut self.lock().faults;
            let due = |armed: &Armed| {
                armed.operation == operation && armed.machine.as_ref().is_none_or(|machine| machine == id)
            };
            faults.iter().position(due).map(|index| faults.remove(index).fault)
        };
        match fault {
            Some(fault) => fault.happen(id, operation).await,
            None => Ok(()),
        }
    }

    /// Ends a machine. Does nothing if it has ended.
    pub(crate) fn end(&self, body: &Arc<Body>, reason: ExitReason) {
        let keeps_its_end = body.end(reason);
        let machines = &mut self.lock().machines;
        if !keeps_its_end
            && machines
                .get(&body.spec.id)
                .is_some_and(|current| Arc::ptr_eq(current, body))
        {
            machines.remove(&body.spec.id);
        }
    }

    /// Requests a shutdown of the guest. It obeys after its own time, if it runs and does not
    /// ignore requests.
    pub(crate) fn request_shutdown(self: &Arc<World>, body: &Arc<Body>) {
        let Some(after) = body.begin_shutdown() else { return };
        let (world, body) = (self.clone(), body.clone());
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            if body.finish_shutdown() {
                world.end(&body, ExitReason::GuestShutdown);
            }
        });
    }

    /// Boots the guest, after its own time.
    pub(crate) fn boot(body: &Arc<Body>) {
        let Some((boot, after)) = body.begin_boot() else { return };
        let body = body.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            body.finish_boot(boot);
        });
    }
}
