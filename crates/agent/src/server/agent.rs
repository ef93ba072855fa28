//! The state of the agent.

use crate::exec::Execs;
use crate::system::Frozen;
use scalebox_agent_api::InitKind;
use std::sync::Arc;

/// The state that all connections share.
pub struct Agent {
    /// The commands.
    pub(crate) execs: Arc<Execs>,
    /// The program that is process 1.
    pub(crate) init: InitKind,
    /// The state of freezing the guest's file systems.
    pub(crate) frozen: Arc<Frozen>,
}

impl Agent {
    /// Creates the state of an agent without commands.
    pub fn new(init: InitKind) -> Arc<Agent> {
        Arc::new(Agent {
            execs: Arc::default(),
            init,
            frozen: Arc::default(),
        })
    }
}
