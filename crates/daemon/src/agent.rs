//! The way to a guest's agent, whatever the hypervisor.

use scalebox_guest::{Agent, AgentError};
use scalebox_vmm::Machine;
use std::sync::Arc;

/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NoAgent {
    /// It cannot be reached.
    #[error(transparent)]
    Unreached(#[from] scalebox_vmm::Error),
    /// It does not answer, or refuses.
    #[error(transparent)]
    Refused(#[from] AgentError),
}

/// The agent of a machine's guest, which answers.
///
/// # Errors
/// [`NoAgent`]: a guest that boots, hangs or has no agent.
pub async fn reach(machine: &Arc<dyn Machine>) -> Result<Agent, NoAgent> {
    Ok(Agent::connect(machine.agent().await?).await?)
}
