//! Trimming a guest: its agent discards the blocks that its file systems do not use.

use crate::host::Host;
use crate::host::error::ServiceError;
use crate::host::guest_agent::{GuestAgent, GuestAgentError};
use scalebox_api::{Trimmed, VmStatus};
use scalebox_units::Bytes;
use scalebox_vmm::Machine;
use std::sync::Arc;

/// Trims the file systems of a running guest, and requests a trim of the pool.
///
/// # Errors
/// 404; 409 if the VM is not running, or its agent does not respond or cannot trim.
pub(crate) async fn on_demand(host: &Host, reference: &str) -> Result<Trimmed, ServiceError> {
    let (record, machine) = host.vms.find_with_machine(reference)?;
    let name = record.name;
    let (VmStatus::Running, Some(machine)) = (record.status, machine) else {
        return Err(ServiceError::WrongState(format!(
            "VM {name} is {}: only a running guest can be trimmed",
            record.status
        )));
    };
    if !machine.supports_discard() {
        return Err(ServiceError::WrongState(format!(
            "cannot trim VM {name}: its hypervisor does not support discard, so blocks are freed only when the VM is deleted"
        )));
    }
    let trimmed = trim(host, &machine).await.map_err(|why| {
        let advice = match why.is_missing() {
            true => "; if the guest has no agent, run `fstrim /` in it",
            false => "",
        };
        ServiceError::WrongState(format!("cannot trim VM {name}: {why}{advice}"))
    })?;
    Ok(Trimmed {
        trimmed_bytes: trimmed.as_u64(),
    })
}

/// Trims a guest through its agent, and requests a trim of the pool.
///
/// # Errors
/// If the agent cannot be reached or refuses.
pub(crate) async fn trim(host: &Host, machine: &Arc<dyn Machine>) -> Result<Bytes, GuestAgentError> {
    let trimmed = GuestAgent::reach(host, machine).await?.trim().await?;
    host.reclaim.freed();
    tracing::info!(vm = %machine.id(), trimmed_bytes = trimmed.as_u64(), "guest trimmed");
    Ok(trimmed)
}
