//! `scaleboxd down`: shuts all machines down, as before a reboot of the host. The next `serve`
//! starts them again.
//!
//! The host's own shutdown runs it too (packaging/scalebox-guests.service). The state keeps the VMs
//! as running and records that the host went down. That is the same as after a power cut, so
//! recovery handles one case, not two.

use crate::commands::CommandFailed;
use crate::host::error::ServiceError;
use crate::host::{Service, blocking};
use crate::vm::lifecycle::{STOP_TIMEOUT, remove_dir};
use crate::vm::recovery::{self, Recovered};
use scalebox_client::VmStatus;
use std::sync::Arc;

/// Shuts down all machines, then removes the network. VMs and their disks are kept.
///
/// # Errors
/// The error of the first machine that did not stop, after all were tried. The network is kept
/// then.
pub async fn shut_all_down(service: &Service, recovered: &Recovered) -> Result<(), CommandFailed> {
    // Recorded first: after a crash in the middle, the machines already shut down are started again
    // too.
    let state = Arc::clone(&service.inner().state);
    blocking(move || recovery::record_host_down(&state)).await?;
    let running = service.inner().vms.all().into_iter();
    let stops: Vec<_> = running
        .filter(|vm| matches!(vm.status, VmStatus::Running | VmStatus::Paused))
        .map(|vm| tokio::spawn(shut_down(service.clone(), vm.id)))
        .collect();
    let (mut ended, mut first_error) = (0, None);
    for stop in stops {
        match stop
            .await
            .unwrap_or_else(|error| Err(ServiceError::Internal(error.to_string())))
        {
            Ok(()) => ended += 1,
            Err(error) => {
                tracing::error!(%error, "cannot shut down a machine");
                first_error = first_error.or(Some(error));
            }
        }
    }
    tracing::info!(
        shut_down = ended,
        waiting = recovered.to_start.len(),
        "machines shut down"
    );
    match first_error {
        Some(error) => Err(error.into()),
        None => Ok(service.inner().network.teardown().await?),
    }
}

/// Shuts one machine down without changing the VM's recorded status.
async fn shut_down(service: Service, id: String) -> Result<(), ServiceError> {
    let operation = service.inner().vms.begin(&id, "being stopped")?;
    let Some(machine) = &operation.machine else {
        return Ok(());
    };
    let outcome = machine.stop(STOP_TIMEOUT).await?;
    service.inner().vms.set(&id, VmStatus::Stopped, None, None);
    tracing::info!(
        vm = id,
        name = operation.record.name,
        ?outcome,
        "VM shut down with the host"
    );
    let run_dir = service.run_dir(&id);
    blocking(move || remove_dir(&run_dir)).await
}
