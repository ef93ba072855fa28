//! `scaleboxd down`: shuts all machines down, as before a reboot of the host. The next `serve`
//! starts them again.
//!
//! The host's own shutdown runs it too (packaging/scalebox-guests.service). The state keeps the VMs
//! as running and records that the host went down. That is the same as after a power cut, so
//! recovery handles one case, not two.

use crate::commands::failed::CommandFailed;
use crate::commands::open::{open_host, runtime};
use crate::host::drivers::Drivers;
use crate::host::error::ServiceError;
use crate::host::files::{self, remove_dir};
use crate::host::{Host, blocking};
use crate::settings::Settings;
use crate::state::State;
use crate::vm::lifecycle::STOP_TIMEOUT;
use crate::vm::recovery::{self, Recovered};
use crate::vm::transition::{Transition, transition};
use scalebox_api::VmStatus;
use scalebox_net::Network;
use scalebox_storage::StorageError;
use scalebox_units::VmId;
use std::sync::Arc;

/// Runs `scaleboxd down`.
pub(crate) fn down(settings: Settings) -> Result<(), CommandFailed> {
    let (data_dir, backing) = (settings.data_dir.clone(), settings.backing.clone());
    runtime()?.block_on(async {
        match open_host(settings.clone(), State::open(&settings.state_dir, &settings.run_dir)?).await {
            Ok((host, recovered)) => shut_all_down(&host, &recovered).await,
            // Machines and network may exist without the pool.
            Err(CommandFailed::Storage(StorageError::NotMounted(_)) | CommandFailed::PoolMissing { .. }) => {
                down_without_pool(&settings).await
            }
            Err(error) => Err(error),
        }
    })?;
    if scalebox_storage::unmount(&data_dir, &backing)? {
        println!("Unmounted {}.", data_dir.display());
    }
    println!(
        "Everything is stopped; VMs and their disks are kept. `scaleboxd pool init` and `scaleboxd serve` start them again."
    );
    Ok(())
}

async fn down_without_pool(settings: &Settings) -> Result<(), CommandFailed> {
    recovery::record_host_down(&State::open(&settings.state_dir, &settings.run_dir)?)?;
    let (vmm, _) = Drivers::find(settings)?;
    let machines = settings.run_dir.join("vms");
    for id in files::vm_folders(&machines)? {
        vmm.force_stop(&id, &machines.join(id.as_str())).await?;
    }
    Ok(Network::ensure(settings.net.clone()).await?.teardown().await?)
}

/// Shuts down all machines, then removes the network. VMs and their disks are kept.
///
/// # Errors
/// The error of the first machine that did not stop, after all were tried. The network is kept
/// then.
pub(crate) async fn shut_all_down(host: &Host, recovered: &Recovered) -> Result<(), CommandFailed> {
    // The host's shutdown is recorded first: after a crash in the middle, the machines already shut
    // down are started again too.
    let state = Arc::clone(&host.state);
    blocking(move || recovery::record_host_down(&state)).await?;
    let running = host.vms.all().into_iter();
    let stops: Vec<_> = running
        .filter(|vm| matches!(vm.status, VmStatus::Running | VmStatus::Paused))
        .map(|vm| tokio::spawn(shut_down(host.clone(), vm.id)))
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
        None => Ok(host.network.teardown().await?),
    }
}

/// Shuts one machine down without changing the VM's recorded status.
async fn shut_down(host: Host, id: VmId) -> Result<(), ServiceError> {
    let operation = host.vms.begin(id.as_str(), "being stopped")?;
    let Some(machine) = &operation.machine else {
        return Ok(());
    };
    let outcome = machine.stop(STOP_TIMEOUT).await?;
    transition(&host, &operation.record, Transition::ShutDownWithHost).await?;
    tracing::info!(
        vm = %id,
        name = operation.record.name,
        ?outcome,
        "VM shut down with the host"
    );
    let run_dir = host.run_dir(&id);
    blocking(move || remove_dir(&run_dir)).await
}
