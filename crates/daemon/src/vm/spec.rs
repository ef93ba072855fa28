//! Converts a VM's record to the specifications of its machine and its network endpoint.

use crate::host::error::ServiceError;
use crate::state::{Record, VmLimits};
use scalebox_net::{Endpoint, Mbps};
use scalebox_vmm::{DiskLimits, RunAs};

pub(crate) fn disk_limits(limits: VmLimits) -> DiskLimits {
    DiskLimits {
        iops: limits.disk_iops.map(|iops| iops.try_into().unwrap_or(u32::MAX)),
        bytes_per_second: limits.disk_mbps.map(|megabytes| megabytes.saturating_mul(1_000_000)),
    }
}

/// Returns the user that a VM's machine runs as.
///
/// Each machine has its own user, so that a guest that escapes its hypervisor cannot access another
/// VM's files. The range of ids is listed as unused in <https://systemd.io/UIDS-GIDS/> (1879048192
/// to 2147352575).
pub(crate) fn vmm_user(record: &Record) -> RunAs {
    let uid = 1_900_000_000 + u32::from(record.ssh_port);
    RunAs { uid, gid: uid }
}

pub(crate) fn endpoint(record: &Record) -> Result<Endpoint, ServiceError> {
    let endpoint = Endpoint::new(&record.id, record.guest_ip, record.ssh_port);
    let rate = record.limits.net_mbps;
    Ok(endpoint
        .with_owner(vmm_user(record).uid)
        .with_rate(rate.map(|rate| Mbps::new(rate.try_into().unwrap_or(u32::MAX)))))
}
