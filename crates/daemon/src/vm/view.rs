//! VMs as the API describes them.

use crate::host::error::ServiceError;
use crate::host::{Host, usage_tracker};
use crate::state::Record;
use scalebox_api::Vm;
use scalebox_storage::PoolUsage;

/// Lists all VMs, oldest first.
pub(crate) fn list(host: &Host) -> Vec<Vm> {
    let accounts = host.usage.latest();
    let records = host.vms.all();
    records
        .iter()
        .map(|record| describe_by(host, record, accounts.as_deref()))
        .collect()
}

/// Finds a VM by id or name.
///
/// # Errors
/// 404.
pub(crate) fn get(host: &Host, reference: &str) -> Result<Vm, ServiceError> {
    host.vms.find(reference).map(|record| describe(host, &record))
}

/// Describes a VM, with the latest measurement of its disk.
pub(crate) fn describe(host: &Host, record: &Record) -> Vm {
    describe_by(host, record, host.usage.latest().as_deref())
}

fn describe_by(host: &Host, record: &Record, accounts: Option<&PoolUsage>) -> Vm {
    let ip = host.host_ip;
    Vm {
        id: record.id.to_string(),
        name: record.name.clone(),
        template: record.template.clone(),
        ip: ip.to_string(),
        ssh_port: record.ssh_port,
        ssh: format!("ssh -p {} user@{ip}", record.ssh_port),
        url: None,
        status: record.status,
        status_reason: record.status_reason.clone(),
        created_at: record.created_at.clone(),
        vcpu_count: record.vcpu_count,
        mem_size_mib: record.mem_size_mib,
        disk_size_gib: record.disk_size.as_u64(),
        disk_auto_extend: record.auto_extend,
        disk_iops: record.limits.disk_iops,
        disk_mbps: record.limits.disk_mbps,
        net_mbps: record.limits.net_mbps,
        autostart: record.autostart,
        init: record.guest.as_ref().and_then(|guest| guest.init),
        main: record.guest.as_ref().and_then(|guest| guest.main.clone()),
        disk: None,
        storage: accounts.and_then(|accounts| usage_tracker::disk_usage(accounts, record)),
    }
}
