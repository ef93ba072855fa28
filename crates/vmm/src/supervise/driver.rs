//! The differences between drivers, for the parts of [`Vmm`](crate::Vmm) that they share.

use crate::error::Result;
use crate::run_dir::RunDir;
use scalebox_units::VmId;
use std::path::PathBuf;

/// The driver-specific parts of supervision: the machine's process, and its files outside the run
/// folder.
pub(crate) trait Driver: Clone + Send + Sync + 'static {
    /// Returns the arguments by which a machine's process is recognized. No other process has all
    /// of them.
    fn identifying_arguments(&self, id: &VmId, dir: &RunDir) -> Result<Vec<String>>;

    /// Returns the path of the pipe that receives the hypervisor's stderr. Blocks.
    fn stderr_pipe(&self, id: &VmId, dir: &RunDir) -> Result<PathBuf>;

    /// Removes the files of a machine without a process that are not in its run folder. Blocks.
    fn remove_other_files(&self, _id: &VmId) {}
}
