//! Frees space: deleted disks return their blocks to the pool, and the pool returns them to the
//! host.
//!
//! `DELETE` responds once the VM's record and its disk's name are gone; the blocks are freed
//! afterwards. Until then the deleted disk stays committed, so that no block is committed twice; a
//! request that would be rejected in the meantime waits instead.

use crate::host::{Host, blocking};
use scalebox_fault_points::crash_point;
use scalebox_storage::UnlinkedDisk;
use scalebox_units::{Gib, VmId};
use std::sync::Arc;

/// Frees the blocks of a deleted VM's disk, then its commitment. Runs in a task that a shutdown
/// waits for.
pub(crate) fn free_blocks(host: &Host, id: VmId, disk: Option<UnlinkedDisk>, committed: Gib) {
    let (freeing, host) = (host.reclaim.begin(), host.clone());
    let tasks = host.tasks.clone();
    tasks.spawn(async move {
        let _freeing = freeing;
        if let Some(disk) = disk {
            let pool = Arc::clone(&host.pool);
            if let Err(error) = blocking(move || pool.reclaim(disk)).await {
                tracing::warn!(vm = %id, %error, "cannot free the blocks of the deleted VM's disk yet; they are freed later");
            }
        }
        crash_point("delete: blocks free");
        host.pool.release(committed.bytes());
        host.reclaim.freed();
        tracing::debug!(vm = %id, "the blocks of the deleted VM's disk are freed");
    });
}
