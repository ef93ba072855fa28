//! `GET /info`: the host, its VMs and its limits.

use crate::host::error::ServiceError;
use crate::host::{Host, blocking, system};
use crate::{pool, templates};
use scalebox_api::{Cpu, HostInfo, HostLimits, Memory, VmCounts};

/// Describes the host, its VMs and its limits.
///
/// # Errors
/// 500 if the kernel's figures cannot be read.
pub(crate) async fn info(host: &Host) -> Result<HostInfo, ServiceError> {
    let (memory, cpu) = blocking(move || {
        let cpu = Cpu {
            count: system::cpu_count(),
            model: system::cpu_model(),
        };
        match system::memory() {
            Ok(memory) => Ok((memory, cpu)),
            Err(error) => Err(ServiceError::Internal(format!(
                "cannot read the host's memory: {error}"
            ))),
        }
    })
    .await?;
    let (settings, limits) = (&host.settings, &host.limits);
    Ok(HostInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        hostname: system::hostname(),
        host_ip: host.host_ip.to_string(),
        uptime_seconds: host.started.elapsed().as_secs(),
        vmm: host.vmm.for_new().name().to_owned(),
        accel: host.accel.clone(),
        storage: pool::figures(host).await?,
        memory: Memory {
            total_bytes: memory.total,
            available_bytes: memory.available,
        },
        cpu,
        vms: VmCounts::from_iter(host.vms.statuses()),
        templates: templates::list(host).await?.len() as u64,
        limits: HostLimits {
            default_disk_size_gib: settings.default_disk_size.as_u64(),
            max_disk_size_gib: limits.max_disk_size_gib,
            default_vcpu_count: settings.default_vcpu_count.min(limits.max_vcpus),
            max_vcpu_count: limits.max_vcpus,
            default_mem_size_mib: settings.default_mem_size_mib,
            min_mem_size_mib: limits.min_mem_mib,
            max_mem_size_mib: limits.max_mem_mib,
        },
    })
}
