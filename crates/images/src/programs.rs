//! The outside programs of a build: mmdebstrap, e2fsprogs, coreutils and apt.
//!
//! The duration of a build depends on the network, so these programs have no time limit. They stay
//! in the process group of the command that builds, so that Ctrl-C ends all of them.

use crate::error::Error;
use scalebox_programs::{Program, Run};

/// Lists the package sources of this host.
pub(crate) const APT_GET: Program = Program::new("apt-get", "apt");
/// Runs a program of the new root, inside it.
pub(crate) const CHROOT: Program = Program::new("chroot", "coreutils");
/// Fills an image with files, in user space.
pub(crate) const DEBUGFS: Program = Program::new("debugfs", "e2fsprogs");
/// Checks the finished image.
pub(crate) const E2FSCK: Program = Program::new("e2fsck", "e2fsprogs");
/// Creates the image from a directory, in user space.
pub(crate) const MKE2FS: Program = Program::new("mke2fs", "e2fsprogs");
/// Installs Debian into a directory.
pub(crate) const MMDEBSTRAP: Program = Program::new("mmdebstrap", "mmdebstrap");
/// Converts disk images.
pub(crate) const QEMU_IMG: Program = Program::new("qemu-img", "qemu-utils");
/// Removes a tree without crossing into other file systems.
pub(crate) const RM: Program = Program::new("rm", "coreutils");
/// Reads partition tables.
pub(crate) const SFDISK: Program = Program::new("sfdisk", "fdisk");
/// Sets options that `mke2fs` lacks.
pub(crate) const TUNE2FS: Program = Program::new("tune2fs", "e2fsprogs");
/// Runs another program in a mount namespace of its own.
pub(crate) const UNSHARE: Program = Program::new("unshare", "util-linux");

/// The programs that a build requires.
const REQUIRED: [Program; 7] = [CHROOT, E2FSCK, MKE2FS, MMDEBSTRAP, RM, TUNE2FS, UNSHARE];

/// Checks that all programs of a build are installed.
///
/// # Errors
/// [`Error::Program`] for the first missing one.
pub(crate) fn require_programs() -> Result<(), Error> {
    Ok(scalebox_programs::require(&REQUIRED)?)
}

/// Returns a run of a program of a build. Names in a guest are UTF-8.
pub(crate) fn run(program: Program) -> Run {
    Run::of(program).env("LC_ALL", "C.UTF-8").in_callers_group()
}
