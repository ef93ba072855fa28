//! Running the work of operations: blocking work, and steps at which tests inject errors.

use crate::host::error::ServiceError;

/// Marks a step at which tests inject an error.
pub(crate) fn fault_point(step: &'static str) -> Result<(), ServiceError> {
    scalebox_fault_points::fault_point(step).map_err(|error| ServiceError::Internal(error.to_string()))
}

/// Runs blocking work on a thread for such work, within the caller's log span.
pub(crate) async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ServiceError>
where
    T: Send + 'static,
    E: Into<ServiceError> + Send + 'static,
{
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => Err(task_failed(&error)),
    }
}

/// Logs a panicked task. The panic message goes only to the log, not to the client.
pub(crate) fn task_failed(error: &tokio::task::JoinError) -> ServiceError {
    tracing::error!(%error, "a task panicked");
    ServiceError::Internal("internal error; see the scaleboxd log for this request id".to_owned())
}
