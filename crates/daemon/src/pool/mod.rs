//! The pool's figures, and changes of its size by request.

pub(crate) mod admission;
pub(crate) mod growth;
pub(crate) mod kernels;
pub(crate) mod reclaim;

use crate::host::error::ServiceError;
use crate::host::{Host, blocking, usage_tracker};
use scalebox_api::{EventKind, PoolInfo, Trimmed};
use scalebox_storage::{Pool, PoolUsage, StorageError};
use scalebox_units::{Bytes, Gib};
use serde_json::json;
use std::sync::Arc;

/// Returns the pool's figures.
///
/// # Errors
/// 500 if the kernel's figures cannot be read.
pub(crate) async fn figures(host: &Host) -> Result<PoolInfo, ServiceError> {
    let pool = Arc::clone(&host.pool);
    let space = blocking(move || pool.space()).await?;
    let pool = &host.pool;
    let commitments = pool.commitments();
    let accounts = host.usage.latest();
    let measured = |sum: fn(&PoolUsage) -> Bytes| accounts.as_deref().map(|accounts| sum(accounts).as_u64());
    Ok(PoolInfo {
        path: pool.path().display().to_string(),
        file_system: pool.file_system().to_owned(),
        image: pool.image().map(|image| image.display().to_string()),
        device: pool.device().display().to_string(),
        capacity_bytes: space.capacity.as_u64(),
        free_bytes: space.free.as_u64(),
        used_bytes: space.used.as_u64(),
        committed_bytes: commitments.committed.as_u64(),
        commitment_limit_bytes: pool.commitment_limit(space.capacity).as_u64(),
        overcommit_ratio: pool.bounds().overcommit_ratio,
        reserved_bytes: commitments.reserved.as_u64(),
        buffer_bytes: Bytes::from(pool.bounds().buffer).as_u64(),
        pool_free_bytes: space.pool_free.as_u64(),
        host_free_bytes: space.host_free.map(Bytes::as_u64),
        unallocated_bytes: space.unallocated.as_u64(),
        metadata_bytes: space.metadata_total.as_u64(),
        metadata_used_bytes: space.metadata_used.as_u64(),
        vms_exclusive_bytes: measured(|accounts| accounts.disks_exclusive),
        templates_exclusive_bytes: measured(|accounts| accounts.templates_exclusive),
        shared_bytes: measured(|accounts| accounts.shared),
        other_bytes: measured(|accounts| accounts.other),
        measured_at: accounts
            .as_deref()
            .map(|accounts| usage_tracker::rfc3339(accounts.measured_at)),
        days_left: host.usage.days_left(space.free),
        cleanups_pending: host.cleanups.pending() as u64,
    })
}

/// Grows the pool while it is in use, to `size` or by the 80 % rule.
///
/// # Errors
/// 400 if `size` is not larger than the pool or too large; 409 if the pool is already being
/// resized.
pub(crate) async fn grow(host: &Host, size: Option<Gib>) -> Result<PoolInfo, ServiceError> {
    change(host, EventKind::PoolGrown, move |pool| pool.grow(size)).await
}

/// Shrinks the pool while it is in use.
///
/// # Errors
/// 400 if `size` is not smaller than the pool, or too small for the used, committed or reserved
/// space; 409 if the pool is already being resized.
pub(crate) async fn shrink(host: &Host, size: Gib) -> Result<PoolInfo, ServiceError> {
    host.reclaim.wait_until_freed().await;
    change(host, EventKind::PoolShrunk, move |pool| pool.shrink(size)).await
}

async fn change(
    host: &Host,
    kind: EventKind,
    change: impl FnOnce(&Pool) -> Result<(), StorageError> + Send + 'static,
) -> Result<PoolInfo, ServiceError> {
    host.detached(|host| async move {
        let pool = Arc::clone(&host.pool);
        if let Err(error) = blocking(move || change(&pool)).await {
            // Reverts in the background the steps that the operation could not revert itself.
            tokio::spawn(growth::reconcile(host.clone()));
            return Err(error);
        }
        // The size has changed: a transient read error must not turn that into a failure.
        let pool = match figures(&host).await {
            Err(_) => figures(&host).await?,
            Ok(pool) => pool,
        };
        tracing::info!(
            capacity_bytes = pool.capacity_bytes,
            free_bytes = pool.free_bytes,
            "pool resized"
        );
        host.events.publish(
            kind,
            None,
            json!({ "capacity_bytes": pool.capacity_bytes, "free_bytes": pool.free_bytes }),
        );
        Ok(pool)
    })
    .await
}

/// Discards the pool's free blocks, which returns their space to the host disk.
///
/// # Errors
/// 500 if the host disk does not accept discards.
pub(crate) async fn trim(host: &Host) -> Result<Trimmed, ServiceError> {
    let pool = Arc::clone(&host.pool);
    host.detached(|_host| async move {
        let trimmed = blocking(move || pool.trim()).await?;
        Ok(Trimmed {
            trimmed_bytes: trimmed.as_u64(),
        })
    })
    .await
}
