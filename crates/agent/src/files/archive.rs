//! Archives of files and directories, in the format of GNU tar.

pub(crate) mod pack;
mod path;
pub(crate) mod unpack;

use crate::server::Failure;
use scalebox_agent_api::FailureCode;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Maximum number of archives that are packed or unpacked at the same time: each has a thread. The
/// next ones wait.
const MAX_ARCHIVES: usize = 4;

static ARCHIVES: Semaphore = Semaphore::const_new(MAX_ARCHIVES);

/// Waits until one of the threads is free.
async fn turn() -> Result<SemaphorePermit<'static>, Failure> {
    let closed = |_| Failure::new(FailureCode::Other, "the agent ends");
    ARCHIVES.acquire().await.map_err(closed)
}
