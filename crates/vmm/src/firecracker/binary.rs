//! Finds the Firecracker binary and its jailer, and builds their command. No other module names
//! them.

use crate::error::{Error, Result};
use crate::firecracker::jail::{self, Jails};
use crate::process::MAX_OPEN_FILES;
use crate::program::{Version, is_executable, on_path, query_version, unusable};
use crate::spec::{MachineSpec, RunAs};
use elf::ElfStream;
use elf::abi::PT_INTERP;
use elf::endian::AnyEndian;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names of the programs in a Firecracker release.
pub(crate) const PROGRAM: &str = "firecracker";
const JAILER: &str = "jailer";
/// The first version that describes devices to guests by ACPI, on which Debian's kernel depends.
const MIN_VERSION: Version = (1, 8);
/// The first version that boots a bzImage.
const MIN_BZIMAGE_VERSION: Version = (1, 17);

/// The Firecracker installed on this host.
#[derive(Debug, Clone)]
pub(crate) struct Firecracker {
    /// The file itself, not a link to it: the jailer names a folder after it.
    program: PathBuf,
    jailer: PathBuf,
    version: String,
    numbers: Version,
}

impl Firecracker {
    /// Finds Firecracker and its jailer on the `PATH`, and queries the version.
    pub(crate) fn find() -> Result<Firecracker> {
        let named = on_path(PROGRAM).ok_or(Error::NoFirecracker(PROGRAM))?;
        let program = named.canonicalize().map_err(Error::io("resolve", &named))?;
        let jailer = find_jailer(&named).or_else(|_| find_jailer(&program))?;
        let (version, numbers) = query_version(&program, MIN_VERSION, version)?;
        if is_dynamic(&program).map_err(|error| unusable(&program, error))? {
            return Err(Error::DynamicallyLinked(program));
        }
        Ok(Firecracker {
            program,
            jailer,
            version,
            numbers,
        })
    }

    /// Returns the jails of this Firecracker's machines, below `base`.
    pub(crate) fn jails(&self, base: &Path) -> Jails {
        Jails::new(base, self.program.file_name().unwrap_or_default().to_owned())
    }

    /// Returns the version, such as `1.16.1`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Checks that this version can boot the kernel image.
    pub(crate) fn check_kernel(&self, spec: &MachineSpec) -> Result<()> {
        use std::io::Read;
        let mut head = Vec::new();
        File::open(&spec.kernel)
            .and_then(|file| file.take(4).read_to_end(&mut head))
            .map_err(Error::io("read", &spec.kernel))?;
        if head == b"\x7fELF" || self.numbers >= MIN_BZIMAGE_VERSION {
            return Ok(());
        }
        let (major, minor) = MIN_BZIMAGE_VERSION;
        Err(Error::KernelFormat {
            id: spec.id.clone(),
            kernel: spec.kernel.clone(),
            version: self.version.clone(),
            min: format!("{major}.{minor}"),
        })
    }

    /// Returns the command of a machine's process. It is the jailer, which replaces itself with
    /// Firecracker and so keeps its pid.
    pub(crate) fn command(&self, id: &str, jails: &Jails, account: RunAs) -> Command {
        let mut command = Command::new(&self.jailer);
        command
            .args(["--id", id])
            .arg("--exec-file")
            .arg(&self.program)
            .args(["--uid", &account.uid.to_string(), "--gid", &account.gid.to_string()])
            .arg("--chroot-base-dir")
            .arg(jails.base())
            // The jailer's default is above the hard limit of the process.
            .args(["--resource-limit", &format!("no-file={MAX_OPEN_FILES}")])
            .args(["--", "--api-sock", jail::API])
            .args(["--log-path", jail::STDERR_PIPE, "--level", "Info"]);
        command
    }
}

/// Returns the arguments that identify a machine's process: the jailer has them too, and passes
/// them on.
pub(crate) fn identifying_arguments(id: &str) -> [String; 4] {
    ["--id", id, "--api-sock", jail::API].map(str::to_owned)
}

/// Finds the jailer, which releases install next to Firecracker.
fn find_jailer(program: &Path) -> Result<PathBuf> {
    let adjacent = program.parent().map(|folder| folder.join(JAILER));
    let adjacent = adjacent.filter(|jailer| is_executable(jailer));
    adjacent.or_else(|| on_path(JAILER)).ok_or(Error::NoFirecracker(JAILER))
}

/// Returns whether a program needs an interpreter, and therefore libraries, which a jail lacks.
fn is_dynamic(program: &Path) -> std::io::Result<bool> {
    let file = ElfStream::<AnyEndian, _>::open_stream(File::open(program)?).map_err(std::io::Error::other)?;
    Ok(file.segments().iter().any(|segment| segment.p_type == PT_INTERP))
}

/// Finds the version in the first line of `firecracker --version`: `Firecracker v1.16.1`.
fn version(text: &str) -> Option<&str> {
    Some(text.lines().next()?.strip_prefix("Firecracker v")?.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamically_linked_programs_are_detected() {
        assert!(is_dynamic(Path::new("/bin/sh")).unwrap());
        assert!(is_dynamic(Path::new("/etc/passwd")).is_err());
    }

    #[test]
    fn the_version_is_found_in_the_first_line() {
        let output = "Firecracker v1.16.1\n\n2026-11-24T06:20:00.000 [anonymous-instance:main] exit_code=0\n";
        assert_eq!(version(output), Some("1.16.1"));
        assert_eq!(version("Firecracker v1.17.0-dev\n"), Some("1.17.0-dev"));
        assert_eq!(version("QEMU emulator version 7.2.22"), None);
    }
}
