//! Kills the process of a machine that has no holder.

use crate::blocking::blocking;
use crate::error::Result;
use crate::run_dir::RunDir;
use crate::supervise::claim::{find_process, remove_files};
use crate::supervise::driver::Driver;
use crate::supervise::kill::kill_and_wait;
use scalebox_units::VmId;
use std::path::Path;

/// Implements [`Vmm::force_stop`](crate::Vmm::force_stop).
pub(crate) async fn force_stop(driver: &impl Driver, id: &VmId, run_dir: &Path) -> Result<bool> {
    let (finder, machine, dir) = (driver.clone(), id.clone(), RunDir::at(run_dir));
    let find = move || {
        // The folder is created if it is missing: a process may still exist, and the lock prevents
        // a launch meanwhile.
        let lock = dir.create_locked(&machine)?;
        let process = find_process(&machine, &dir, &finder.identifying_arguments(&machine, &dir)?)?;
        Ok((process, dir, lock))
    };
    let (process, dir, lock) = blocking(find).await?;
    if let Some(process) = &process {
        kill_and_wait(id, process).await?;
        tracing::info!(machine = %id, pid = process.pid(), "killed the process of a machine without a holder");
    }
    remove_files(driver, id, dir, lock).await;
    Ok(process.is_some())
}
