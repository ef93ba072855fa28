//! Runs the QEMU binary. No other module does.

use crate::confine::Confined;
use crate::{Error, Result};
use std::env;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The program's name in Debian.
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// Minimum version of QEMU: the driver uses features of `microvm` that older versions lack.
const MIN_VERSION: (u32, u32) = (7, 2);

/// The QEMU installed on this host.
#[derive(Debug, Clone)]
pub(crate) struct Qemu {
    program: PathBuf,
    version: String,
}

impl Qemu {
    /// Finds QEMU on the `PATH` and queries its version.
    pub(crate) fn find() -> Result<Qemu> {
        let program = on_path(PROGRAM).ok_or(Error::NotInstalled { program: PROGRAM })?;
        let version = query_version(&program)?;
        Ok(Qemu { program, version })
    }

    /// Path of the binary.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Such as `7.2.22`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Returns the full argument vector, including the program, of a process started with
    /// [`spawn`](Qemu::spawn).
    pub(crate) fn argv(&self, arguments: &[String]) -> Vec<String> {
        std::iter::once(self.program.to_string_lossy().into_owned())
            .chain(arguments.iter().cloned())
            .collect()
    }

    /// Starts the process of a machine, detached from this process' terminal. It has no environment
    /// and no open file except `stderr`, which receives stdout and stderr. It is not waited for,
    /// and survives the end of this process.
    pub(crate) fn spawn(&self, arguments: &[String], mut confined: Confined, stderr: File) -> std::io::Result<Child> {
        let stdout = stderr.try_clone()?;
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        // SAFETY: between fork and exec the closure makes system calls only: it allocates nothing
        // and takes no lock.
        unsafe { command.pre_exec(move || confined.enter()) };
        command.spawn()
    }
}

/// Returns the first executable of that name on the `PATH`.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|candidate| is_executable(candidate))
}

pub(crate) fn is_executable(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn query_version(program: &Path) -> Result<String> {
    let unusable = |why| Error::Unusable {
        program: program.display().to_string(),
        why,
    };
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| unusable(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1);
    let (Some(version), true) = (version, output.status.success()) else {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(unusable(format!("--version: {}: {text}{errors}", output.status)));
    };
    if major_minor(version).is_none_or(|found| found < MIN_VERSION) {
        let (major, minor) = MIN_VERSION;
        return Err(unusable(format!(
            "version {version} is too old; {major}.{minor} or later is required"
        )));
    }
    Ok(version.to_owned())
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
