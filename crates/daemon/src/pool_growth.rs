//! A pool that grows by itself, where the settings allow it and the host disk has room.
//!
//! One growth goes all the way to what the 80 % rule gives on today's host disk: the image is
//! sparse, so what is not written costs nothing, and smaller steps would only be more of them. It
//! is tried when free space passes the low-water mark, before a request is refused for lack of
//! space, and before a VM is paused.

use crate::service::{Service, blocking};
use scalebox_client::EventKind;
use scalebox_storage::StorageError;
use scalebox_units::Bytes;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long nothing is tried after a growth that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(60);

/// How long to wait before the layers of the pool are reconciled again.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(5);

/// Who grows the pool by itself does so one after the other: whoever waited finds it grown.
#[derive(Default)]
pub struct Growth {
    /// When the last one failed.
    failed: Mutex<Option<Instant>>,
    /// Whether [`reconcile`] is at work.
    reconciling: AtomicBool,
}

/// Reconciles image, loop device and file system of the pool, and tries again until they are of one
/// size: a change that an earlier daemon began may still be under way in btrfs, which takes one at
/// a time, or a change that failed could not be undone. Meanwhile the pool is in use as it is.
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
                    "the pool and its image are not of one size yet; trying again"
                );
            }
        }
        tokio::time::sleep(RECONCILE_INTERVAL).await;
    }
    service.inner().growth.reconciling.store(false, Ordering::Release);
}

impl Service {
    /// With less free than this, the pool grows by itself; `None` where it must not.
    pub(crate) fn low_water(&self) -> Option<Bytes> {
        let settings = &self.inner().settings;
        settings.pool_auto_grow.then(|| settings.pool_low_water.bytes())
    }

    /// Grows the pool if it may; returns whether it did. A failure is logged, and is for whoever
    /// asked as if there were no room to grow.
    pub(crate) async fn extend_pool(&self) -> bool {
        if self.low_water().is_none() {
            return false;
        }
        let service = self.clone();
        // Once begun it is carried through, whoever stops waiting for it.
        let grown = self.detached(async move { Ok(service.extend_now().await) }).await;
        grown.unwrap_or_else(|error| {
            tracing::warn!(%error, "the pool did not grow by itself");
            false
        })
    }

    async fn extend_now(&self) -> bool {
        let mut failed = self.inner().growth.failed.lock().await;
        if failed.is_some_and(|at| at.elapsed() < AFTER_FAILURE) {
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
                    "the pool has grown by itself"
                );
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(%error, seconds = AFTER_FAILURE.as_secs(), "the pool did not grow by itself; trying again later");
                tokio::spawn(reconcile(self.clone()));
                *failed = Some(Instant::now());
                false
            }
        }
    }
}
