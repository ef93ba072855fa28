//! Finds the QEMU binary and builds its command. No other module names it.

use crate::error::{Error, Result};
use crate::program::{Version, on_path, query_version};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program's name in Debian.
const PROGRAM: &str = "qemu-system-x86_64";

/// The error of a host without QEMU.
pub(crate) const NOT_INSTALLED: Error = Error::NotInstalled {
    program: PROGRAM,
    package: "qemu-system-x86",
};

/// Minimum version of QEMU: the driver uses features of `microvm` that older versions lack.
const MIN_VERSION: Version = (7, 2);

/// The QEMU installed on this host.
#[derive(Debug, Clone)]
pub(crate) struct Qemu {
    program: PathBuf,
    version: String,
}

impl Qemu {
    /// Finds QEMU on the `PATH` and queries its version.
    pub(crate) fn find() -> Result<Qemu> {
        let program = on_path(PROGRAM).ok_or(NOT_INSTALLED)?;
        let (version, _) = query_version(&program, MIN_VERSION, version)?;
        Ok(Qemu { program, version })
    }

    /// Returns the path of the binary.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Returns the version, such as `7.2.22`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Returns the full argument vector, including the program, of a process that runs
    /// [`command`](Qemu::command).
    pub(crate) fn argv(&self, arguments: &[String]) -> Vec<String> {
        std::iter::once(self.program.to_string_lossy().into_owned())
            .chain(arguments.iter().cloned())
            .collect()
    }

    /// Returns the command of a machine's process.
    pub(crate) fn command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        command
    }
}

/// Finds the version in a line such as `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)`.
fn version(text: &str) -> Option<&str> {
    text.split_whitespace().skip_while(|word| *word != "version").nth(1)
}
