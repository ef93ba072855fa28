//! `scaleboxd down`: shuts every machine down, as before a reboot of the host; what ran is started
//! again by the next `serve`.
//!
//! It is also what the host's own shutdown runs (packaging/scalebox-guests.service). The state
//! keeps the VMs as running and remembers that the host went down, which is how it looks after a
//! power cut too: recovery knows one case, not two.

use crate::commands::CommandFailed;
use crate::error::ServiceError;
use crate::lifecycle::{STOP_GRACE, remove_dir};
use crate::recovery::{self, Recovered};
use crate::service::{Service, blocking};
use scalebox_client::VmStatus;
use std::sync::Arc;

/// Shuts down every machine, then removes the network. VMs and their disks stay.
///
/// # Errors
/// The first machine that could not be ended, after all were tried; the network stays then.
pub async fn shut_all_down(service: &Service, recovered: &Recovered) -> Result<(), CommandFailed> {
    // First: after a crash on the way, the machines that are down already are started again too.
    let state = Arc::clone(&service.inner().state);
    blocking(move || recovery::note_host_down(&state)).await?;
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
                tracing::error!(%error, "a machine is not shut down");
                first_error = first_error.or(Some(error));
            }
        }
    }
    tracing::info!(
        shut_down = ended,
        waiting = recovered.to_start.len(),
        "machines are down"
    );
    match first_error {
        Some(error) => Err(error.into()),
        None => Ok(service.inner().network.teardown().await?),
    }
}

/// Shuts one machine down, without a word of it in the state.
async fn shut_down(service: Service, id: String) -> Result<(), ServiceError> {
    let operation = service.inner().vms.begin(&id, "being stopped")?;
    let Some(machine) = &operation.machine else {
        return Ok(());
    };
    let outcome = machine.stop(STOP_GRACE).await?;
    service.inner().vms.set(&id, VmStatus::Stopped, None, None);
    tracing::info!(
        vm = id,
        name = operation.record.name,
        ?outcome,
        "shut down with the host"
    );
    let run_dir = service.run_dir(&id);
    blocking(move || remove_dir(&run_dir)).await
}
