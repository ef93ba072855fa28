//! The handle with which a test controls a simulated machine.

use crate::sim_vmm::body::Body;
use crate::sim_vmm::faults::Operation;
use crate::sim_vmm::guest::SimGuest;
use crate::sim_vmm::next_call::NextCall;
use crate::sim_vmm::world::World;
use scalebox_units::Bytes;
use scalebox_vmm::{DiskLimits, ExitReason, MachineEvent, MachineSpec, MachineState};
use std::sync::Arc;

/// The handle with which a test controls one machine, from its launch to its end.
#[derive(Clone)]
pub struct SimMachine {
    pub(crate) world: Arc<World>,
    pub(crate) body: Arc<Body>,
}

impl SimMachine {
    /// Returns the specification that the machine was launched with.
    pub fn spec(&self) -> &MachineSpec {
        &self.body.spec
    }

    /// Returns the state of the machine.
    pub fn state(&self) -> MachineState {
        self.body.lock().state.clone()
    }

    /// Returns whether a daemon holds the machine.
    pub fn is_held(&self) -> bool {
        self.body.lock().holder.is_some()
    }

    /// Returns the size of the root disk.
    pub fn disk_size(&self) -> Bytes {
        self.body.lock().disk_size
    }

    /// Returns the limits of the root disk.
    pub fn limits(&self) -> DiskLimits {
        self.body.lock().limits
    }

    /// Returns whether the guest's file systems are frozen.
    pub fn is_frozen(&self) -> bool {
        self.body.lock().is_frozen
    }

    /// Returns how often the guest was made to discard its unused blocks.
    pub fn trims(&self) -> u32 {
        self.body.lock().trims
    }

    /// Sets the outcome of the next call of `operation` for this machine.
    pub fn next(&self, operation: Operation) -> NextCall {
        NextCall {
            world: self.world.clone(),
            machine: Some(self.body.spec.id.clone()),
            operation,
        }
    }

    /// Returns how many connections to our own agent were opened since the launch.
    pub fn agent_connections(&self) -> usize {
        self.body.lock().served.opened()
    }

    /// Changes the settings of the guest.
    pub fn set_guest(&self, change: impl FnOnce(&mut SimGuest)) {
        change(&mut self.body.lock().guest);
    }

    /// Ends the hypervisor's process, as a bug in it does.
    pub fn crash(&self) {
        let detail = "killed by signal 11".to_owned();
        self.world.end(&self.body, ExitReason::Crashed { detail });
    }

    /// Powers off the guest, as `poweroff` in it does.
    pub fn power_off(&self) {
        self.world.end(&self.body, ExitReason::GuestShutdown);
    }

    /// Reboots the guest, as `reboot` in it does. Needs a Tokio runtime.
    pub fn reboot(&self) {
        self.body.lock().publish(MachineEvent::GuestReboot);
        World::boot(&self.body);
    }

    /// Fills the host's disk, or makes space on it. While it is full, a running guest stalls at its
    /// next disk request, which is at once.
    pub fn set_disk_full(&self, full: bool) {
        let mut inside = self.body.lock();
        inside.is_disk_full = full;
        inside.stall_if_disk_full();
    }

    /// Makes the hypervisor hang, or respond again. While it hangs, commands and adoptions fail
    /// after 10 s; it can still be killed.
    pub fn set_hung(&self, hung: bool) {
        self.body.lock().is_hung = hung;
    }
}
