//! Connects to a guest's agent, independent of the hypervisor.

use scalebox_guest::{Agent, AgentError};
use scalebox_vmm::Machine;
use std::sync::Arc;

/// The error of a request to a guest agent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentFailed {
    /// The connection to the agent failed.
    #[error(transparent)]
    Unreachable(#[from] scalebox_vmm::Error),
    /// The agent does not respond, or reports an error.
    #[error(transparent)]
    Rejected(#[from] AgentError),
}

/// Connects to the agent of a machine's guest and waits for its response.
///
/// # Errors
/// [`AgentFailed`] if the guest is still booting, hangs or has no agent.
pub(crate) async fn reach(machine: &Arc<dyn Machine>) -> Result<Agent, AgentFailed> {
    Ok(Agent::connect(machine.agent().await?).await?)
}
