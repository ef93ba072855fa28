//! A pool that grows by itself, where the settings allow it and the host disk has room.
//!
//! One growth goes all the way to what the 80 % rule gives on today's host disk: the image is sparse, so what is not written costs
//! nothing, and smaller steps would only be more of them. It is tried when free space passes the low-water mark, before a request is refused for lack of
//! space, and before a VM is paused.

use crate::service::{Service, blocking};
use scalebox_client::EventKind;
use scalebox_storage::{Bytes, StorageError};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long nothing is tried after a growth that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(60);

/// How long to wait before the pool is made to agree with its image again.
const BETWEEN_ATTEMPTS: Duration = Duration::from_secs(5);

/// Who grows the pool by itself does so one after the other: whoever waited finds it grown.
#[derive(Default)]
pub struct Growth {
    /// When the last one failed.
    failed: Mutex<Option<Instant>>,
}

/// Tries, until it is, to have the pool as large as its image: a change that an earlier daemon began may still be under way in btrfs, which takes
/// one at a time. Meanwhile the pool is in use as it is.
pub async fn agree(service: Service) {
    let mut told = String::new();
    loop {
        let pool = Arc::clone(&service.inner().pool);
        match service
            .detached(async move { blocking(move || pool.agree()).await })
            .await
        {
            Ok(()) => return,
            Err(error) if error.to_string() == told => {}
            Err(error) => {
                told = error.to_string();
                tracing::warn!(
                    error = told,
                    "the pool is not as large as its image yet; it is tried again"
                );
            }
        }
        tokio::time::sleep(BETWEEN_ATTEMPTS).await;
    }
}

impl Service {
    /// With less free than this, the pool grows by itself; `None` where it must not.
    pub(crate) fn low_water(&self) -> Option<Bytes> {
        let settings = &self.inner().settings;
        settings.pool_auto_grow.then(|| settings.pool_low_water.bytes())
    }

    /// Grows the pool if it may; returns whether it did. A failure is logged, and is for whoever asked as if there were no room to grow.
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
                *failed = Some(Instant::now());
                false
            }
        }
    }
}
