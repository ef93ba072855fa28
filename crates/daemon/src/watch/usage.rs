//! Measures disk usage in the background, and estimates how many days the pool's free space lasts.
//!
//! A measurement walks every extent, so it is rare. It is made every `ACCOUNTING_SECONDS`, and
//! earlier after a template was created or deleted, because admission assumes less space until
//! then. Measuring takes at most a twentieth of the time. Responses contain the latest measurement.

use crate::host::{Host, blocking};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Idle time after a measurement, as a multiple of its duration. At most 1/20 of the time is spent
/// on measuring.
const IDLE_FACTOR: u32 = 19;
/// Interval of checks for a measurement that is due.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Measures repeatedly for as long as it is polled.
pub(crate) async fn run(host: Host) -> Infallible {
    let (started, interval) = (Instant::now(), host.settings.accounting_interval);
    loop {
        let begun = Instant::now();
        let pool = Arc::clone(&host.pool);
        match blocking(move || pool.measure()).await {
            Ok(accounts) => {
                tracing::debug!(
                    took_ms = accounts.took.as_millis() as u64,
                    disks = accounts.disks.len(),
                    total_bytes = accounts.total().as_u64(),
                    "disk usage measured"
                );
                host.usage.add(accounts, started.elapsed());
            }
            Err(error) => tracing::warn!(%error, "cannot measure disk usage; reporting the previous measurement"),
        }
        let took = begun.elapsed();
        let (earliest, due) = (
            Instant::now() + took * IDLE_FACTOR,
            Instant::now() + interval.max(took * IDLE_FACTOR),
        );
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            let now = Instant::now();
            if now >= due || (now >= earliest && host.pool.needs_measuring()) {
                break;
            }
        }
    }
}
