//! Threads for operations that block.
//!
//! Operations on files share a few threads, and never wait for the host on them: a stalled stream
//! must not occupy a thread. Operations that may wait for long get a thread of their own: archives,
//! and operations on whole file systems, because a thaw must work while all others hang.

use crate::server::Failure;
use scalebox_agent_api::FailureCode;
use std::thread;
use tokio::sync::{Semaphore, oneshot};

/// Maximum number of operations on files at the same time.
const MAX_OPERATIONS: usize = 4;
/// Size of a thread's stack, in bytes.
const STACK: usize = 256 << 10;

static OPERATIONS: Semaphore = Semaphore::const_new(MAX_OPERATIONS);

/// Runs a short operation on a shared thread.
///
/// # Errors
/// Those of the operation; [`FailureCode::Other`] if it panicked.
pub(crate) async fn run<T, F>(operation: F) -> Result<T, Failure>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Failure> + Send + 'static,
{
    let permit = OPERATIONS.acquire().await.map_err(|_| panicked())?;
    let running = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        operation()
    });
    running.await.map_err(|_| panicked())?
}

/// Runs an operation on a thread of its own.
///
/// # Errors
/// Those of the operation; [`FailureCode::Other`] if it panicked; [`FailureCode::Busy`] if there is
/// no memory for a thread.
pub(crate) async fn run_apart<T, F>(operation: F) -> Result<T, Failure>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Failure> + Send + 'static,
{
    let (sender, receiver) = oneshot::channel();
    spawn(move || {
        // The receiver is gone if the host cancelled the request.
        let _ = sender.send(operation());
    })?;
    receiver.await.map_err(|_| panicked())?
}

/// Starts a thread.
///
/// # Errors
/// [`FailureCode::Busy`] if there is no memory for it.
pub(crate) fn spawn(operation: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let started = thread::Builder::new().stack_size(STACK).spawn(operation);
    started.map(drop).map_err(Failure::io("start a thread"))
}

fn panicked() -> Failure {
    Failure::new(FailureCode::Other, "an operation of the agent panicked")
}
