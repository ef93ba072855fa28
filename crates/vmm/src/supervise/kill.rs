//! Kills a machine's process and waits until it is gone.

use crate::error::{Error, Result};
use crate::process::Process;
use scalebox_units::VmId;
use std::time::Duration;
use tokio::time::timeout;

/// Timeout from SIGKILL to the exit of a process. In between the kernel frees its memory and
/// completes its disk requests.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Kills a process that is known to be the machine's, and waits until it exits. Returns its exit
/// status, if available.
///
/// # Errors
/// [`Error::Unkillable`].
pub(crate) async fn kill_and_wait(id: &VmId, process: &Process) -> Result<Option<String>> {
    let pid = process.pid();
    process.kill().map_err(Error::io("kill", format!("/proc/{pid}")))?;
    within_exit_timeout(id, pid, process.exited()).await?;
    Ok(process.reap())
}

/// Waits until a process that was killed has exited.
///
/// # Errors
/// [`Error::Unkillable`].
pub(crate) async fn within_exit_timeout<T>(id: &VmId, pid: i32, exit: impl Future<Output = T>) -> Result<T> {
    let after = EXIT_TIMEOUT;
    timeout(after, exit).await.map_err(|_| Error::Unkillable {
        id: id.clone(),
        pid,
        after,
    })
}
