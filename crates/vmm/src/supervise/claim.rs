//! Claims a machine: by its lock, its record and its process.

use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::process::Process;
use crate::run_dir::{Lock, Record, RunDir};
use crate::stderr::StderrPipe;
use crate::supervise::driver::Driver;
use crate::supervise::kill::kill_and_wait;
use scalebox_units::VmId;
use std::io;
use std::path::{Path, PathBuf};

/// A process whose machine this process holds; not connected yet.
pub(crate) struct ClaimedProcess {
    pub(crate) id: VmId,
    pub(crate) dir: RunDir,
    pub(crate) lock: Lock,
    pub(crate) process: Process,
    pub(crate) stderr: StderrPipe,
    pub(crate) root: PathBuf,
    pub(crate) console_log: PathBuf,
}

impl ClaimedProcess {
    /// Writes the record from which another process can adopt the machine. Blocks.
    pub(crate) fn write_record(&self, argv: Vec<String>) -> io::Result<()> {
        let process = self.process.identity(argv)?;
        let (id, root, console_log) = (self.id.clone(), self.root.clone(), self.console_log.clone());
        self.dir
            .write(&Record {
                id,
                process,
                root,
                console_log,
            })
            .map_err(io::Error::other)
    }

    /// Removes the files of the machine, whose process is gone.
    pub(crate) async fn remove_files(self, driver: &impl Driver) {
        remove_files(driver, &self.id, self.dir, self.lock).await;
    }
}

/// The result of [`find`] for a machine that has no holder.
enum Found {
    /// No process; leftover files are removed.
    Nothing,
    /// The process of an interrupted launch.
    Unrecorded(Process, RunDir, Lock),
    Recorded(ClaimedProcess),
}

/// Claims a machine that an earlier process launched.
///
/// Returns `None` if it is gone; its leftovers are removed. A process without a record belongs to
/// an interrupted launch and is killed.
///
/// # Errors
/// [`Error::Running`] if the machine has a holder, [`Error::Foreign`] if it belongs to another
/// driver, [`Error::Unkillable`].
pub(crate) async fn claim(driver: &impl Driver, id: &VmId, run_dir: &Path) -> Result<Option<ClaimedProcess>> {
    let (finder, machine, dir) = (driver.clone(), id.clone(), RunDir::at(run_dir));
    match blocking(move || find(&finder, &machine, dir)).await? {
        Found::Nothing => Ok(None),
        Found::Recorded(claimed) => Ok(Some(claimed)),
        Found::Unrecorded(process, dir, lock) => {
            tracing::info!(machine = %id, pid = process.pid(), "killing a machine whose launch was interrupted");
            kill_and_wait(id, &process).await?;
            remove_files(driver, id, dir, lock).await;
            Ok(None)
        }
    }
}

fn find(driver: &impl Driver, id: &VmId, dir: RunDir) -> Result<Found> {
    let Some(lock) = dir.lock(id)? else {
        return Ok(Found::Nothing);
    };
    let arguments = driver.identifying_arguments(id, &dir)?;
    let Some(process) = find_process(id, &dir, &arguments)? else {
        driver.remove_other_files(id);
        dir.clear();
        return Ok(Found::Nothing);
    };
    let Some(record) = dir.read(id)? else {
        return Ok(Found::Unrecorded(process, dir, lock));
    };
    // `VMM` was changed while the machine ran: a machine of another driver must neither be adopted
    // nor count as dead.
    if !arguments.iter().all(|argument| record.process.argv.contains(argument)) {
        return Err(Error::Foreign {
            id: id.clone(),
            program: record.process.argv.into_iter().next().unwrap_or_default(),
        });
    }
    let stderr = StderrPipe::open(&driver.stderr_pipe(id, &dir)?)?;
    Ok(Found::Recorded(ClaimedProcess {
        id: record.id,
        dir,
        lock,
        process,
        stderr,
        root: record.root,
        console_log: record.console_log,
    }))
}

/// Returns the machine's process, recorded or not, if it is alive. Blocks.
pub(crate) fn find_process(id: &VmId, dir: &RunDir, arguments: &[String]) -> Result<Option<Process>> {
    let recorded = match dir.read(id)? {
        Some(record) => Process::find(&record.process),
        None => Process::search(arguments),
    };
    recorded.map_err(Error::io("read", "/proc"))
}

/// Removes all files of a machine whose process is gone, then releases its lock.
pub(crate) async fn remove_files(driver: &impl Driver, id: &VmId, dir: RunDir, lock: Lock) {
    let (driver, id) = (driver.clone(), id.clone());
    let remove = move || {
        driver.remove_other_files(&id);
        dir.clear();
        drop(lock);
    };
    blocking(remove).await;
}
