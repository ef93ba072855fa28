//! Returns freed blocks to the host disk.

use crate::host::{Host, blocking};
use scalebox_units::Bytes;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Minimum interval between two trims of the pool, so that many small deletions share one.
const MIN_TRIM_INTERVAL: Duration = Duration::from_secs(10);

/// Returns freed blocks to the host disk, for as long as it is polled.
///
/// btrfs does this by itself, but two minutes later (`discard=async`). A pool on its own device
/// relies on that: nothing else needs its blocks.
pub(crate) async fn run(host: Host) -> Infallible {
    loop {
        host.reclaim.trim_requested().await;
        let pool = Arc::clone(&host.pool);
        if pool.image().is_none() {
            continue;
        }
        let begun = Instant::now();
        match blocking(move || pool.discard_free_blocks()).await {
            Ok(Bytes::ZERO) => {}
            Ok(freed) => tracing::info!(
                host_bytes = freed.as_u64(),
                took_ms = begun.elapsed().as_millis() as u64,
                "returned freed blocks to the host disk"
            ),
            Err(error) => {
                tracing::warn!(%error, "cannot return freed blocks to the host disk; btrfs discards them later")
            }
        }
        tokio::time::sleep(MIN_TRIM_INTERVAL).await;
    }
}
