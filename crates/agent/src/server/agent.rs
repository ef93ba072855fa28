//! The state of the agent.

use crate::exec::{Execs, supervise};
use crate::run_dir::RunDir;
use crate::system::Frozen;
use scalebox_agent_api::{InitKind, MainProcess};
use std::path::Path;
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

    /// Runs the main process of the guest as the exec `main`, until its policy demands no other
    /// start. `run_dir` is an existing folder, for the files that process 1 reads.
    pub async fn supervise(&self, main: MainProcess, run_dir: &Path) {
        supervise(Arc::clone(&self.execs), main, RunDir::at(run_dir)).await;
    }
}
