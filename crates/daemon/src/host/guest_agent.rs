//! The agent for operations on a whole guest: our own, or `qemu-guest-agent` in guests that lack
//! it.

use crate::host::Host;
use crate::host::agent_link::Agent;
use scalebox_guest::{AgentError, FsUsage, Qga, QgaError};
use scalebox_units::Bytes;
use scalebox_vmm::{Channel, Machine};
use std::sync::Arc;
use std::time::Duration;

/// The reason why a request to the agent of a guest failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestAgentError {
    /// The connection to `qemu-guest-agent` failed.
    #[error(transparent)]
    Unreachable(#[from] scalebox_vmm::Error),
    /// `qemu-guest-agent` does not respond, or reports an error.
    #[error(transparent)]
    Qga(#[from] QgaError),
    /// Our own agent does not respond any more, or reports an error.
    #[error(transparent)]
    Own(#[from] AgentError),
}

impl GuestAgentError {
    /// Returns whether the guest may have no agent at all.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(
            self,
            GuestAgentError::Unreachable(_) | GuestAgentError::Qga(QgaError::Timeout)
        )
    }
}

/// The agent of a guest that responds.
pub(crate) enum GuestAgent {
    /// Our own.
    Own(Agent),
    /// `qemu-guest-agent`.
    Qga(Qga),
}

impl GuestAgent {
    /// Connects to our own agent in a machine's guest, or else to `qemu-guest-agent`, and waits for
    /// its response.
    ///
    /// # Errors
    /// [`GuestAgentError`] if the guest is still booting, hangs or has no agent.
    pub(crate) async fn reach(host: &Host, machine: &Arc<dyn Machine>) -> Result<GuestAgent, GuestAgentError> {
        if let Some(own) = host.agents.find(machine).await {
            return Ok(GuestAgent::Own(own));
        }
        let stream = machine.channel(Channel::Qga).await?;
        Ok(GuestAgent::Qga(Qga::connect(stream).await?))
    }

    /// Returns the usage of the guest's root file system.
    pub(crate) async fn root_file_system(&self) -> Result<FsUsage, GuestAgentError> {
        Ok(match self {
            GuestAgent::Own(agent) => {
                let stats = agent.stats().await?;
                usage(stats.root_total, stats.root_used)
            }
            GuestAgent::Qga(agent) => agent.root_file_system().await?,
        })
    }

    /// Makes the guest's root file system as large as its disk, if the agent can, and returns its
    /// usage. In guests with `qemu-guest-agent`, a program of the guest grows it.
    pub(crate) async fn grown_root(&self) -> Result<FsUsage, GuestAgentError> {
        Ok(match self {
            GuestAgent::Own(agent) => {
                let root = agent.grow().await?;
                usage(root.total, root.used)
            }
            GuestAgent::Qga(agent) => agent.root_file_system().await?,
        })
    }

    /// Makes the guest discard its unused blocks. Returns their total size.
    pub(crate) async fn trim(&self) -> Result<Bytes, GuestAgentError> {
        Ok(match self {
            GuestAgent::Own(agent) => Bytes::new(agent.trim().await?.bytes),
            GuestAgent::Qga(agent) => agent.trim().await?,
        })
    }

    /// Flushes the guest's file systems, for at most `within`.
    pub(crate) async fn flush(&self, within: Duration) -> Result<(), GuestAgentError> {
        match self {
            GuestAgent::Own(agent) => agent.sync(within).await?,
            GuestAgent::Qga(agent) => agent.flush(within).await?,
        }
        Ok(())
    }

    /// Freezes the guest's file systems. After an error they may be frozen nevertheless.
    pub(crate) async fn freeze(&self) -> Result<(), GuestAgentError> {
        match self {
            GuestAgent::Own(agent) => agent.freeze().await?,
            GuestAgent::Qga(agent) => agent.freeze().await?,
        }
        Ok(())
    }

    /// Thaws the guest's file systems. Does nothing if they are not frozen.
    pub(crate) async fn thaw(&self) -> Result<(), GuestAgentError> {
        match self {
            GuestAgent::Own(agent) => agent.thaw().await?,
            GuestAgent::Qga(agent) => agent.thaw().await?,
        }
        Ok(())
    }
}

fn usage(total: u64, used: u64) -> FsUsage {
    FsUsage {
        total: Bytes::new(total),
        used: Bytes::new(used),
    }
}
