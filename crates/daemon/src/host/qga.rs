//! Connects to `qemu-guest-agent` in a guest, independent of the hypervisor.

use scalebox_guest::{Qga, QgaError};
use scalebox_vmm::{Channel, Machine};
use std::sync::Arc;

/// Why a request to a guest agent failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QgaFailed {
    /// The connection to the agent failed.
    #[error(transparent)]
    Unreachable(#[from] scalebox_vmm::Error),
    /// The agent does not respond, or reports an error.
    #[error(transparent)]
    Rejected(#[from] QgaError),
}

/// Connects to the agent of a machine's guest and waits for its response.
///
/// # Errors
/// [`QgaFailed`] if the guest is still booting, hangs or has no agent.
pub(crate) async fn reach(machine: &Arc<dyn Machine>) -> Result<Qga, QgaFailed> {
    Ok(Qga::connect(machine.channel(Channel::Qga).await?).await?)
}
