//! The faults of calls of the simulated hypervisor.

use scalebox_units::VmId;
use scalebox_vmm::{Error, Result};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::sleep;

/// Timeout of a call to a hypervisor that hangs.
pub(crate) const HANG_TIMEOUT: Duration = Duration::from_secs(10);

/// A method of [`Vmm`](scalebox_vmm::Vmm) or [`Machine`](scalebox_vmm::Machine).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the methods and of the channels")]
pub enum Operation {
    Launch,
    Adopt,
    ForceStop,
    State,
    Pause,
    Resume,
    ResizeRoot,
    LimitDisk,
    Stop,
    Kill,
    Qga,
    Agent,
}

impl Operation {
    /// Returns the name that errors have for the call.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Operation::Launch => "launch",
            Operation::Adopt => "a new connection",
            Operation::ForceStop => "force stop",
            Operation::State => "query-status",
            Operation::Pause => "stop",
            Operation::Resume => "cont",
            Operation::ResizeRoot => "block_resize",
            Operation::LimitDisk => "block_set_io_throttle",
            Operation::Stop => "system_powerdown",
            Operation::Kill => "kill",
            Operation::Qga | Operation::Agent => "agent",
        }
    }

    pub(crate) fn usual_error(self, id: &VmId) -> Error {
        let (id, why) = (id.clone(), "simulated failure".to_owned());
        let (command, after) = (self.name(), HANG_TIMEOUT);
        match self {
            Operation::Launch => Error::Launch {
                id,
                why,
                output: String::new(),
            },
            Operation::Adopt => Error::Hung { id, command, after },
            Operation::ForceStop | Operation::Stop | Operation::Kill => Error::Unkillable { id, pid: 0, after },
            Operation::Qga | Operation::Agent => Error::Agent { id, why },
            _ => Error::Control { id, command, why },
        }
    }
}

/// A gate that one call waits for; dropping it lets the call proceed.
#[must_use = "dropping the gate opens it"]
pub struct Gate {
    arrived: watch::Sender<bool>,
    open: watch::Sender<bool>,
}

impl Gate {
    /// Returns the gate and the fault that waits for the gate.
    pub(crate) fn new() -> (Gate, Fault) {
        let (arrived, open) = (watch::Sender::new(false), watch::Sender::new(false));
        let fault = Fault::Wait {
            arrived: arrived.clone(),
            open: open.subscribe(),
        };
        (Gate { arrived, open }, fault)
    }

    /// Waits until the call has been made.
    pub async fn reached(&self) {
        let mut arrived = self.arrived.subscribe();
        // This value keeps the sender alive.
        let _ = arrived.wait_for(|arrived| *arrived).await;
    }

    /// Lets the call proceed.
    pub fn open(self) {}
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open.send_replace(true);
    }
}

/// A fault that waits for its call.
pub(crate) struct Armed {
    pub(crate) machine: Option<VmId>,
    pub(crate) operation: Operation,
    pub(crate) fault: Fault,
}

pub(crate) enum Fault {
    Fail(Box<dyn FnOnce(&VmId) -> Error + Send>),
    Hang,
    Wait {
        arrived: watch::Sender<bool>,
        open: watch::Receiver<bool>,
    },
}

impl Fault {
    /// Applies the fault to a call.
    pub(crate) async fn happen(self, id: &VmId, operation: Operation) -> Result<()> {
        match self {
            Fault::Fail(error) => Err(error(id)),
            Fault::Hang => Err(hang(id, operation).await),
            Fault::Wait { arrived, mut open } => {
                arrived.send_replace(true);
                // An error means that the gate was dropped.
                let _ = open.wait_for(|open| *open).await;
                Ok(())
            }
        }
    }
}

/// Waits until the timeout of a hypervisor's response has passed, and returns the error.
pub(crate) async fn hang(id: &VmId, operation: Operation) -> Error {
    sleep(HANG_TIMEOUT).await;
    Error::Hung {
        id: id.clone(),
        command: operation.name(),
        after: HANG_TIMEOUT,
    }
}
