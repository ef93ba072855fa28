//! The machines that are paused because storage is full.

use scalebox_units::VmId;
use scalebox_vmm::Machine;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The machines that are paused because storage is full, by VM id.
#[derive(Default)]
pub(crate) struct PausedVms {
    machines: Mutex<HashMap<VmId, Arc<dyn Machine>>>,
}

impl PausedVms {
    /// Locks the table. Held for look-ups only, never across an await.
    pub(crate) fn lock(&self) -> MutexGuard<'_, HashMap<VmId, Arc<dyn Machine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
