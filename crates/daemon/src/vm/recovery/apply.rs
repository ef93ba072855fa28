//! Applies the decision about a VM.

use crate::host::advice::advised;
use crate::host::error::ServiceError;
use crate::host::{Host, blocking};
use crate::state::Record;
use crate::vm::change;
use crate::vm::lifecycle;
use crate::vm::recovery::decide::Verdict;
use crate::vm::recovery::reboot::WAITING;
use crate::vm::spec::disk_limits;
use crate::vm::transition::{Transition, transition};
use scalebox_api::VmStatus;
use scalebox_vmm::Machine;
use std::sync::Arc;

/// Adds the VM to the table, and sets its status as decided.
pub(super) async fn apply(host: &Host, record: Record, machine: Option<Arc<dyn Machine>>, verdict: &Verdict) {
    if *verdict == Verdict::StartAfterReboot {
        tracing::info!(
            vm = %record.id,
            name = record.name,
            "VM was running when the host went down"
        );
        // Only the table shows the VM as stopped; the state file still has it as running. If the
        // daemon crashes here, its next start boots the VM.
        let waiting = Record {
            status: VmStatus::Stopped,
            status_reason: Some(WAITING.to_owned()),
            ..record
        };
        host.vms.restore(waiting, None);
        return;
    }
    host.vms.restore(record.clone(), machine.clone());
    if let Some(to) = transition_to(verdict, machine.as_ref()) {
        let effect = to.effect(&record);
        if (effect.status, &effect.reason) != (record.status, &record.status_reason) {
            let (from, to) = (record.status.as_str(), effect.status.as_str());
            tracing::info!(vm = %record.id, name = record.name, from, to, reason = effect.reason);
        }
        if let Err(error) = transition(host, &record, to).await {
            tracing::error!(vm = %record.id, %error, "cannot record the VM's status; the next start records it");
        }
    }
    if let Some(machine) = machine {
        lifecycle::watch(host, record.id, machine);
    }
}

fn transition_to(verdict: &Verdict, machine: Option<&Arc<dyn Machine>>) -> Option<Transition> {
    Some(match verdict {
        Verdict::Run => Transition::Adopted(Arc::clone(machine?)),
        Verdict::CompleteStop => Transition::AdoptedForStop(Arc::clone(machine?)),
        Verdict::Stop { reason } => Transition::FoundEnded {
            reason: reason.map(str::to_owned),
        },
        Verdict::Fail { reason } => Transition::Failed {
            reason: (*reason).to_owned(),
            machine: machine.cloned(),
        },
        Verdict::Unreachable { reason } => Transition::Unreachable { reason: reason.clone() },
        Verdict::Keep | Verdict::StartAfterReboot => return None,
    })
}

/// Applies the recorded limits and size of a VM's disk. A crash may have prevented that before.
pub(super) async fn reconcile(
    host: &Host,
    record: &mut Record,
    machine: Option<&Arc<dyn Machine>>,
    may_touch_disk: bool,
) {
    if let Some(machine) = machine
        && let Err(error) = machine.limit_disk(disk_limits(record.limits)).await
    {
        tracing::warn!(vm = %record.id, error = %advised(&error), "cannot limit the VM's disk as recorded: stop and start the VM");
    }
    if may_touch_disk && let Err(error) = reconcile_disk_size(host, record, machine).await {
        tracing::error!(vm = %record.id, %error, "cannot reconcile the size of the VM's disk with its record");
    }
}

/// Reconciles the size of a VM's disk with its record.
///
/// If a crash interrupted a growth, the disk is smaller than recorded: the growth is completed. If
/// that fails, the growth is rolled back; no client saw it succeed. A growth that failed may leave
/// the disk larger than recorded: the larger size is committed, because the guest may have seen it.
async fn reconcile_disk_size(
    host: &Host,
    record: &mut Record,
    machine: Option<&Arc<dyn Machine>>,
) -> Result<(), ServiceError> {
    let recorded = record.disk_size;
    let disk = record.id.clone();
    let provisioned = || {
        let (pool, disk) = (Arc::clone(&host.pool), disk.clone());
        blocking(move || pool.provisioned(&disk))
    };
    let mut found = provisioned().await?;
    if found < recorded.bytes() {
        tracing::info!(vm = %record.id, %found, to = recorded.as_u64(), "completing an interrupted growth of the VM's disk");
        if let Err(error) = change::grow(host, record, machine, recorded).await {
            tracing::error!(vm = %record.id, %error, "cannot complete the interrupted growth of the VM's disk; rolling it back");
        }
        found = provisioned().await?;
    }
    if found.ceil_gib() != recorded {
        record.disk_size = found.ceil_gib();
        change::persist_disk_size(host, &record.id, found.ceil_gib()).await?;
    }
    Ok(())
}
