//! Runs the Firecracker binary and its jailer. No other module does.

use crate::confine::Confined;
use crate::firecracker::jail::{self, Jails};
use crate::machine::{MachineSpec, RunAs};
use crate::process::MAX_OPEN_FILES;
use crate::qemu::binary::{is_executable, on_path};
use crate::{Error, Result};
use elf::ElfStream;
use elf::abi::PT_INTERP;
use elf::endian::AnyEndian;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Names of the programs in a Firecracker release.
pub(crate) const PROGRAM: &str = "firecracker";
const JAILER: &str = "jailer";
/// The first version that describes devices to guests by ACPI, on which Debian's kernel depends.
const MIN_VERSION: (u32, u32) = (1, 8);
/// The first version that boots a bzImage.
const MIN_BZIMAGE_VERSION: (u32, u32) = (1, 17);

/// The Firecracker installed on this host.
#[derive(Debug, Clone)]
pub(crate) struct Firecracker {
    /// The file itself, not a link to it: the jailer names a folder after it.
    program: PathBuf,
    jailer: PathBuf,
    version: String,
    numbers: (u32, u32),
}

impl Firecracker {
    /// Finds Firecracker and its jailer on the `PATH`, and queries the version.
    pub(crate) fn find() -> Result<Firecracker> {
        let named = on_path(PROGRAM).ok_or(Error::NoFirecracker(PROGRAM))?;
        let program = named.canonicalize().map_err(Error::io("resolve", &named))?;
        let jailer = find_jailer(&named).or_else(|_| find_jailer(&program))?;
        let unusable = |why| Error::Unusable {
            program: program.display().to_string(),
            why,
        };
        let output = Command::new(&program)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| unusable(error.to_string()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let found = version(&text).filter(|_| output.status.success());
        let Some((version, numbers)) = found else {
            let errors = String::from_utf8_lossy(&output.stderr);
            return Err(unusable(format!("--version: {}: {text}{errors}", output.status)));
        };
        if numbers < MIN_VERSION {
            let (major, minor) = MIN_VERSION;
            return Err(unusable(format!(
                "version {version} is too old; {major}.{minor} or later is required"
            )));
        }
        if is_dynamic(&program).map_err(|error| unusable(error.to_string()))? {
            return Err(unusable(
                "it is dynamically linked, and its jail has no libraries; install a static release build".to_owned(),
            ));
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

    /// Such as `1.16.1`.
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
        Err(Error::Spec {
            id: spec.id.clone(),
            what: "kernel",
            why: format!(
                "{} is not an ELF image, and Firecracker {} boots no other format ({major}.{minor} and later do); build the \
                 template with a kernel that is compressed with LZ4",
                spec.kernel.display(),
                self.version
            ),
        })
    }

    /// Starts the process of a machine through the jailer, which replaces itself with Firecracker
    /// and so keeps its pid. The process has no environment and no open file except `console`
    /// (stdout) and `stderr`. It is not waited for, and survives the end of this process.
    pub(crate) fn spawn(
        &self,
        id: &str,
        jails: &Jails,
        account: RunAs,
        mut confined: Confined,
        console: File,
        stderr: File,
    ) -> std::io::Result<Child> {
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
            .args(["--log-path", jail::STDERR_PIPE, "--level", "Info"])
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(console)
            .stderr(stderr);
        // SAFETY: between fork and exec the closure makes system calls only: it allocates nothing
        // and takes no lock.
        unsafe { command.pre_exec(move || confined.enter()) };
        command.spawn()
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

/// Parses the version from the first line of `firecracker --version`: `Firecracker v1.16.1`.
fn version(text: &str) -> Option<(String, (u32, u32))> {
    let version = text.lines().next()?.strip_prefix("Firecracker v")?.trim();
    let mut parts = version.split('.');
    let numbers = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some((version.to_owned(), numbers))
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
    fn the_version_is_parsed_from_the_first_line() {
        let output = "Firecracker v1.16.1\n\n2026-11-24T06:20:00.000 [anonymous-instance:main] exit_code=0\n";
        assert_eq!(version(output), Some(("1.16.1".to_owned(), (1, 16))));
        assert_eq!(version("Firecracker v1.17.0-dev\n").unwrap().1, (1, 17));
        assert_eq!(version("QEMU emulator version 7.2.22"), None);
    }
}
