//! Recovery at start, from the state file alone.
//!
//! Everything that was reported to a client exists: the record, the disk, and the machine if it
//! still runs. Machines, taps, forwards, disks and folders without a record are orphaned and
//! removed. Files and interfaces whose names do not match our format are never touched.
//!
//! A VM that cannot be recovered is reported as failed, with the reason. It does not affect the
//! other VMs.
//!
//! For each VM, [`observe`] finds its remains, the pure function [`decide`](decide::decide) decides
//! its status, and [`apply`] makes the changes.

mod apply;
mod decide;
mod kernels;
mod observe;
mod orphans;
mod reboot;

pub(crate) use reboot::{record_host_down, start_after_reboot};

use crate::host::error::ServiceError;
use crate::host::{Host, blocking};
use crate::pool::kernels::remove_unused;
use crate::state::Record;
use crate::templates;
use crate::vm::lifecycle;
use crate::vm::spec::endpoint;
use decide::{Found, Observed, Verdict, decide};
use orphans::{kill_orphans, sweep_jails, vms_with_process};
use reboot::is_another_boot;
use scalebox_units::VmId;
use std::collections::HashSet;
use std::sync::Arc;

/// The result of a recovery, for the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// VMs in the state file.
    pub vms: usize,
    /// Machines that kept running and were adopted.
    pub adopted: usize,
    /// Machines without a record that were killed.
    pub orphans_killed: usize,
    /// Orphaned files in the pool that were removed.
    pub files_removed: usize,
    /// VMs that were running when the host went down, for [`start_after_reboot`].
    pub to_start: Vec<VmId>,
    /// VMs whose stop was interrupted by a crash, for [`complete_stops`].
    pub to_stop: Vec<VmId>,
    /// Running VMs without a network connection, for [`network_watch`](crate::watch::network).
    pub unconnected: Vec<VmId>,
}

/// Fills the table of VMs from the state file and removes leftovers. Call it once, before the
/// first request.
///
/// # Errors
/// If the state, the pool or the network as a whole cannot be read or repaired.
pub(crate) async fn recover(host: &Host) -> Result<Recovered, ServiceError> {
    let state = Arc::clone(&host.state);
    let records = blocking(move || state.vms()).await?;
    let records = kernels::assign(host, records).await?;
    let known: HashSet<VmId> = records.iter().map(|record| record.id.clone()).collect();

    // Orphaned machines are killed first, because they may have an orphaned disk open.
    let mut recovered = Recovered {
        vms: records.len(),
        orphans_killed: kill_orphans(host, &known).await?,
        ..Recovered::default()
    };
    let pool = Arc::clone(&host.pool);
    let swept = blocking(move || pool.sweep(&known)).await?;
    recovered.files_removed = swept.removed.len();
    for path in &swept.removed {
        tracing::info!(path = %path.display(), "removed an orphaned file");
    }
    // They take space, and nothing else: the next pull or build tries again.
    if let Err(error) = templates::remove_abandoned(host).await {
        tracing::warn!(%error, "cannot remove what an interrupted pull or build left");
    }

    let rebooted = is_another_boot(host).await?;
    let with_process = blocking(vms_with_process).await?;
    sweep_jails(host, &with_process).await?;
    let mut attached = Vec::new();
    for record in records {
        let disk_missing = swept.missing.contains(&record.id);
        let (endpoint, id) = (endpoint(&record)?, record.id.clone());
        match restore(host, record, disk_missing, rebooted, &with_process).await? {
            Verdict::Run => {
                recovered.adopted += 1;
                attached.push((endpoint, id));
            }
            Verdict::CompleteStop => {
                recovered.to_stop.push(id.clone());
                attached.push((endpoint, id));
            }
            // The guest may still be running normally.
            Verdict::Unreachable { .. } => attached.push((endpoint, id)),
            Verdict::StartAfterReboot => recovered.to_start.push(id),
            Verdict::Stop { .. } | Verdict::Fail { .. } | Verdict::Keep => {}
        }
    }
    let (endpoints, ids): (Vec<_>, Vec<_>) = attached.into_iter().unzip();
    let reconciled = host.network.reconcile(&endpoints).await?;
    for (tap, error) in reconciled.failed {
        tracing::error!(tap, error, "cannot connect a machine to the network; retrying");
        let found = endpoints.iter().position(|endpoint| endpoint.tap() == tap);
        recovered.unconnected.extend(found.and_then(|at| ids.get(at).cloned()));
    }
    remove_unused(host).await;
    Ok(recovered)
}

/// Restores one VM: adopts its machine, reconciles its disk and adds it to the table.
async fn restore(
    host: &Host,
    mut record: Record,
    disk_missing: bool,
    rebooted: bool,
    with_process: &HashSet<VmId>,
) -> Result<Verdict, ServiceError> {
    let (found, machine) = observe::find_machine(host, &record, with_process).await?;
    // An unreachable machine may have the disk open, so it is not touched.
    let may_touch_disk = !disk_missing && !matches!(found, Found::Unreachable(_));
    apply::reconcile(host, &mut record, machine.as_ref(), may_touch_disk).await;
    host.pool.restore(record.disk_size.bytes());
    let verdict = decide(&Observed {
        status: record.status,
        stopping: observe::is_stopping(&record),
        machine: found,
        disk_missing,
        rebooted,
        autostart: record.autostart,
    });
    apply::apply(host, record, machine, &verdict).await;
    Ok(verdict)
}

/// Completes the stops that a crash interrupted. The stops run concurrently, because a guest may
/// take a minute.
pub(crate) fn complete_stops(host: &Host, vms: Vec<VmId>) {
    for id in vms {
        let one = host.clone();
        host.tasks.spawn(async move {
            let Ok(operation) = one.vms.begin_when_idle(id.as_str(), "being stopped").await else {
                return;
            };
            let Some(machine) = &operation.machine else { return };
            if let Err(error) = lifecycle::shut_down(&one, &operation.record, machine).await {
                tracing::error!(vm = %id, %error, "cannot complete the stop of the VM that a crash interrupted");
            }
        });
    }
}
