//! Grows the pool automatically, if the settings allow it and the host disk has space.
//!
//! One growth goes up to 80 % of the host disk's current space: the image is sparse, so unwritten
//! blocks cost nothing, and smaller steps would only be more of them. It is attempted when free
//! space falls below the low-water mark, before a request is rejected for lack of space, and before
//! a VM is paused.

use crate::host::{Service, blocking};
use scalebox_client::EventKind;
use scalebox_storage::StorageError;
use scalebox_units::Bytes;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// Pause after a failed growth.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// Retry interval for reconciling the layers of the pool.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(5);

/// The state of automatic growth. The lock makes growths sequential: a waiting caller finds the
/// pool grown.
#[derive(Default)]
pub struct PoolGrowth {
    /// The time of the last growth, if it failed.
    failed: Mutex<Option<Instant>>,
    /// Whether [`reconcile`] is running.
    reconciling: AtomicBool,
}

/// Reconciles the sizes of the pool's image, loop device and file system, with retries.
///
/// btrfs resizes one file system at a time, so a resize that a previous daemon began may still be
/// running; or a failed resize could not be reverted. The pool stays in use meanwhile.
pub async fn reconcile(service: Service) {
    if service.inner().growth.reconciling.swap(true, Ordering::AcqRel) {
        return;
    }
    let mut logged = String::new();
    loop {
        let pool = Arc::clone(&service.inner().pool);
        match service
            .detached(async move { blocking(move || pool.reconcile()).await })
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
    service.inner().growth.reconciling.store(false, Ordering::Release);
}

impl Service {
    /// Returns the free space below which the pool grows automatically; `None` if it must not grow.
    pub(crate) fn low_water(&self) -> Option<Bytes> {
        let settings = &self.inner().settings;
        settings.pool_auto_grow.then(|| settings.pool_low_water.bytes())
    }

    /// Grows the pool if allowed. Returns whether it has grown. A failure is logged, and otherwise
    /// treated like a lack of space on the host disk.
    pub(crate) async fn extend_pool(&self) -> bool {
        if self.low_water().is_none() {
            return false;
        }
        let service = self.clone();
        // Detached, so that the growth completes even if the caller stops waiting.
        let grown = self.detached(async move { Ok(service.extend_now().await) }).await;
        grown.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot grow the pool automatically");
            false
        })
    }

    async fn extend_now(&self) -> bool {
        let mut failed = self.inner().growth.failed.lock().await;
        if failed.is_some_and(|at| at.elapsed() < RETRY_INTERVAL) {
            return false;
        }
        let pool = Arc::clone(&self.inner().pool);
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
                self.inner().events.publish(EventKind::PoolGrown, None, details);
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
                tokio::spawn(reconcile(self.clone()));
                *failed = Some(Instant::now());
                false
            }
        }
    }
}
