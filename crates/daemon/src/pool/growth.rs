//! Grows the pool automatically, if the settings allow it and the host disk has space.
//!
//! One growth goes up to 80 % of the host disk's current space: the image is sparse, so unwritten
//! blocks cost nothing, and smaller steps would only be more of them. It is attempted when free
//! space falls below the low-water mark, before a request is rejected for lack of space, and before
//! a VM is paused.

use crate::host::{Host, blocking};
use scalebox_api::EventKind;
use scalebox_storage::StorageError;
use scalebox_units::Bytes;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// Pause after a failed growth.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// Retry interval for reconciling the layers of the pool.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(5);

/// Reconciles the sizes of the pool's image, loop device and file system, with retries.
///
/// btrfs resizes one file system at a time, so a resize that a previous daemon began may still be
/// running; or a failed resize could not be reverted. The pool stays in use meanwhile.
pub(crate) async fn reconcile(host: Host) {
    if host.growth.reconciling.swap(true, Ordering::AcqRel) {
        return;
    }
    let mut logged = String::new();
    loop {
        let pool = Arc::clone(&host.pool);
        match host
            .detached(|_| async move { blocking(move || pool.reconcile()).await })
            .await
        {
            Ok(()) => break,
            Err(error) if error.to_string() == logged => {}
            Err(error) => {
                logged = error.to_string();
                tracing::warn!(
                    error = logged,
                    "cannot reconcile the size of the pool with its image yet; retrying"
                );
            }
        }
        tokio::time::sleep(RECONCILE_INTERVAL).await;
    }
    host.growth.reconciling.store(false, Ordering::Release);
}

/// Returns the free space below which the pool grows automatically; `None` if it must not grow.
pub(crate) fn low_water(host: &Host) -> Option<Bytes> {
    let settings = &host.settings;
    settings.pool_auto_grow.then(|| settings.pool_low_water.bytes())
}

/// Grows the pool if allowed. Returns whether it has grown. A failure is logged, and otherwise
/// treated like a lack of space on the host disk.
pub(crate) async fn extend_pool(host: &Host) -> bool {
    if low_water(host).is_none() {
        return false;
    }
    // The growth is detached, so that it completes even if the caller stops waiting.
    let grown = host.detached(|host| async move { Ok(extend_now(&host).await) }).await;
    grown.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot grow the pool automatically");
        false
    })
}

async fn extend_now(host: &Host) -> bool {
    let mut failed = host.growth.failed.lock().await;
    if failed.is_some_and(|at| at.elapsed() < RETRY_INTERVAL) {
        return false;
    }
    let pool = Arc::clone(&host.pool);
    let grown = blocking(move || {
        let grown = pool.extend()?;
        Ok::<_, StorageError>(if grown { Some(pool.space()?) } else { None })
    });
    let grown = grown.await;
    *failed = None;
    match grown {
        Ok(Some(space)) => {
            let details = json!({
                "capacity_bytes": space.capacity.as_u64(),
                "free_bytes": space.free.as_u64(),
            });
            host.events.publish(EventKind::PoolGrown, None, details);
            tracing::info!(
                capacity_bytes = space.capacity.as_u64(),
                free_bytes = space.free.as_u64(),
                "pool grown automatically"
            );
            true
        }
        Ok(None) => false,
        Err(error) => {
            tracing::warn!(%error, seconds = RETRY_INTERVAL.as_secs(), "cannot grow the pool automatically; retrying later");
            tokio::spawn(reconcile(host.clone()));
            *failed = Some(Instant::now());
            false
        }
    }
}
