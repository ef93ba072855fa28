//! The only door to the QEMU binary.

use crate::confinement::Confined;
use crate::{Error, Result};
use std::env;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The program, as Debian names it.
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// The oldest QEMU whose `microvm` has what the driver uses.
const OLDEST: (u32, u32) = (7, 2);

/// QEMU, as found on this host.
#[derive(Debug, Clone)]
pub(crate) struct Qemu {
    program: PathBuf,
    version: String,
}

impl Qemu {
    /// Looks for QEMU on the `PATH` and asks it for its version.
    pub(crate) fn find() -> Result<Qemu> {
        let program = on_path(PROGRAM).ok_or(Error::NotInstalled { program: PROGRAM })?;
        let version = ask_version(&program)?;
        Ok(Qemu { program, version })
    }

    /// The binary.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Such as `7.2.22`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// The argument vector of a process started with [`spawn`](Qemu::spawn), the program included.
    pub(crate) fn argv(&self, arguments: &[String]) -> Vec<String> {
        std::iter::once(self.program.to_string_lossy().into_owned())
            .chain(arguments.iter().cloned())
            .collect()
    }

    /// Starts a machine's process: out of reach of this process' terminal, with no environment and
    /// no open file but `messages`, to which stdout and stderr go. It is not waited for, and lives
    /// on when this process ends.
    pub(crate) fn spawn(&self, arguments: &[String], mut confined: Confined, messages: File) -> std::io::Result<Child> {
        let stdout = messages.try_clone()?;
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(messages);
        // SAFETY: between fork and exec only system calls are made: nothing is allocated and no
        // lock is taken.
        unsafe { command.pre_exec(move || confined.enter()) };
        command.spawn()
    }
}

/// The first of that name on the `PATH`.
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

fn ask_version(program: &Path) -> Result<String> {
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
    if major_minor(version).is_none_or(|found| found < OLDEST) {
        let (major, minor) = OLDEST;
        return Err(unusable(format!(
            "its version is {version}, at least {major}.{minor} is needed"
        )));
    }
    Ok(version.to_owned())
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
