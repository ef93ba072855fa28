//! Admission of new and growing disks, with retries while space becomes free.

use crate::host::error::ServiceError;
use crate::host::{Host, blocking};
use crate::pool::growth;
use scalebox_storage::Reservation;
use scalebox_units::Bytes;
use std::sync::Arc;

/// Admits `size` bytes, waiting for deleted disks and growing the pool where that helps.
///
/// # Errors
/// [`ServiceError::Insufficient`].
pub(crate) async fn admit(host: &Host, size: Bytes) -> Result<Reservation, ServiceError> {
    let admit = || {
        let pool = Arc::clone(&host.pool);
        blocking(move || pool.admit(size))
    };
    until_admitted(host, admit).await
}

/// Retries a rejected admission while deleted disks are being freed, and once more after trying
/// to grow the pool.
pub(crate) async fn until_admitted<T, F>(host: &Host, attempt: impl Fn() -> F) -> Result<T, ServiceError>
where
    F: Future<Output = Result<T, ServiceError>>,
{
    let result = host
        .reclaim
        .retry_while_freeing(ServiceError::is_insufficient, &attempt)
        .await;
    if result.as_ref().is_err_and(ServiceError::is_insufficient) && growth::low_water(host).is_some() {
        // Retries regardless of the outcome: another request may have grown the pool in the
        // meantime.
        growth::extend_pool(host).await;
        return attempt().await;
    }
    result
}
