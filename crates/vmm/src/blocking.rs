//! Runs blocking work off the runtime's threads.

use std::panic::resume_unwind;
use tokio::task::spawn_blocking;

/// Runs `work` on one of the runtime's blocking threads, and returns its result.
///
/// Cancellation: the work still runs to its end, and its result is dropped.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // Happens only when the runtime shuts down, which drops this future.
            Err(_) => std::future::pending().await,
        },
    }
}
