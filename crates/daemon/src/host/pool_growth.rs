//! The state of automatic growth of the pool.

use std::sync::atomic::AtomicBool;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// The state of automatic growth. The lock makes growths sequential: a waiting caller finds the
/// pool grown.
#[derive(Default)]
pub(crate) struct PoolGrowth {
    /// The time of the last growth, if it failed.
    pub failed: Mutex<Option<Instant>>,
    /// `true` while `pool::growth::reconcile` is running.
    pub reconciling: AtomicBool,
}
