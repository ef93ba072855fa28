//! Sets the outcome of the next call of an operation.

use crate::sim_vmm::faults::{Armed, Fault, Gate, Operation};
use crate::sim_vmm::world::World;
use scalebox_units::VmId;
use scalebox_vmm::Error;
use std::sync::Arc;

/// Sets the outcome of the next call of an operation. Several outcomes apply to the next calls in
/// order.
#[must_use = "nothing happens to the call before it is decided"]
pub struct NextCall {
    pub(crate) world: Arc<World>,
    pub(crate) machine: Option<VmId>,
    pub(crate) operation: Operation,
}

impl NextCall {
    /// Makes the call fail with the error that is usual for the operation.
    pub fn fails(self) {
        let operation = self.operation;
        self.fails_with(move |id| operation.usual_error(id));
    }

    /// Makes the call fail with this error, which may depend on the machine.
    pub fn fails_with(self, error: impl FnOnce(&VmId) -> Error + Send + 'static) {
        self.decide(Fault::Fail(Box::new(error)));
    }

    /// Makes the hypervisor not respond to the call: it fails with [`Error::Hung`] after 10 s.
    pub fn hangs(self) {
        self.decide(Fault::Hang);
    }

    /// Makes the call wait until the gate is opened or dropped.
    pub fn waits(self) -> Gate {
        let (gate, fault) = Gate::new();
        self.decide(fault);
        gate
    }

    fn decide(self, fault: Fault) {
        self.world.lock().faults.push(Armed {
            machine: self.machine,
            operation: self.operation,
            fault,
        });
    }
}
