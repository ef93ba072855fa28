//! The only door to the Firecracker binary and its jailer.

use crate::command::{is_executable, on_path};
use crate::confinement::Confined;
use crate::jail::{self, Jails};
use crate::machine::{MachineSpec, RunAs};
use crate::process::OPEN_FILES;
use crate::{Error, Result};
use elf::ElfStream;
use elf::abi::PT_INTERP;
use elf::endian::AnyEndian;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The programs, as they are installed from a release.
pub(crate) const PROGRAM: &str = "firecracker";
const JAILER: &str = "jailer";
/// The oldest that tells guests of their devices by ACPI: Debian's kernel takes them from nowhere
/// else.
const OLDEST: (u32, u32) = (1, 8);
/// The first that boots a bzImage.
const BOOTS_BZIMAGE: (u32, u32) = (1, 17);

/// Firecracker, as found on this host.
#[derive(Debug, Clone)]
pub(crate) struct Firecracker {
    /// The file itself, not a link to it: the jailer names a folder after it.
    program: PathBuf,
    jailer: PathBuf,
    version: String,
    numbers: (u32, u32),
}

impl Firecracker {
    /// Looks for Firecracker and its jailer on the `PATH`, and asks it for its version.
    pub(crate) fn find() -> Result<Firecracker> {
        let named = on_path(PROGRAM).ok_or(Error::NoFirecracker(PROGRAM))?;
        let program = named.canonicalize().map_err(Error::io("look at", &named))?;
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
        if numbers < OLDEST {
            let (major, minor) = OLDEST;
            return Err(unusable(format!(
                "its version is {version}, at least {major}.{minor} is needed"
            )));
        }
        if is_dynamic(&program).map_err(|error| unusable(error.to_string()))? {
            return Err(unusable(
                "it needs libraries, which its jail does not have: install a release, which does not".to_owned(),
            ));
        }
        Ok(Firecracker {
            program,
            jailer,
            version,
            numbers,
        })
    }

    /// The jails of its machines, below `base`.
    pub(crate) fn jails(&self, base: &Path) -> Jails {
        Jails::new(base, self.program.file_name().unwrap_or_default().to_owned())
    }

    /// Such as `1.16.1`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Whether this version boots the kernel image.
    pub(crate) fn check_kernel(&self, spec: &MachineSpec) -> Result<()> {
        use std::io::Read;
        let mut head = Vec::new();
        File::open(&spec.kernel)
            .and_then(|file| file.take(4).read_to_end(&mut head))
            .map_err(Error::io("read", &spec.kernel))?;
        if head == b"\x7fELF" || self.numbers >= BOOTS_BZIMAGE {
            return Ok(());
        }
        let (major, minor) = BOOTS_BZIMAGE;
        Err(Error::Spec {
            id: spec.id.clone(),
            what: "kernel",
            why: format!(
                "{} is no ELF image, and Firecracker {} boots no other ({major}.{minor} does): build the template with a kernel \
                 that is packed with LZ4",
                spec.kernel.display(),
                self.version
            ),
        })
    }

    /// Starts a machine's process by way of the jailer, which it becomes Firecracker from: the pid
    /// stays. It has no environment, and no open file but `console` (stdout) and `messages`
    /// (stderr). It is not waited for, and lives on when this process ends.
    pub(crate) fn spawn(
        &self,
        id: &str,
        jails: &Jails,
        account: RunAs,
        mut confined: Confined,
        console: File,
        messages: File,
    ) -> std::io::Result<Child> {
        let mut command = Command::new(&self.jailer);
        command
            .args(["--id", id])
            .arg("--exec-file")
            .arg(&self.program)
            .args(["--uid", &account.uid.to_string(), "--gid", &account.gid.to_string()])
            .arg("--chroot-base-dir")
            .arg(jails.base())
            // Its default is more than it may set.
            .args(["--resource-limit", &format!("no-file={OPEN_FILES}")])
            .args(["--", "--api-sock", jail::API])
            .args(["--log-path", jail::MESSAGES, "--level", "Info"])
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(console)
            .stderr(messages);
        // SAFETY: between fork and exec only system calls are made: nothing is allocated and no
        // lock is taken.
        unsafe { command.pre_exec(move || confined.enter()) };
        command.spawn()
    }
}

/// The arguments by which a machine's process is told from every other: the jailer has them, and
/// hands them on.
pub(crate) fn marks(id: &str) -> [String; 4] {
    ["--id", id, "--api-sock", jail::API].map(str::to_owned)
}

/// Where the jailer is: releases have it beside Firecracker.
fn find_jailer(program: &Path) -> Result<PathBuf> {
    let beside = program.parent().map(|folder| folder.join(JAILER));
    let beside = beside.filter(|jailer| is_executable(jailer));
    beside.or_else(|| on_path(JAILER)).ok_or(Error::NoFirecracker(JAILER))
}

/// Whether a program needs an interpreter, and with it libraries that no jail has.
fn is_dynamic(program: &Path) -> std::io::Result<bool> {
    let file = ElfStream::<AnyEndian, _>::open_stream(File::open(program)?).map_err(std::io::Error::other)?;
    Ok(file.segments().iter().any(|segment| segment.p_type == PT_INTERP))
}

/// The version in the first line of `firecracker --version`: `Firecracker v1.16.1`.
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
    fn a_program_that_needs_libraries_is_seen() {
        assert!(is_dynamic(Path::new("/bin/sh")).unwrap());
        assert!(is_dynamic(Path::new("/etc/passwd")).is_err());
    }

    #[test]
    fn the_version_is_in_the_first_line() {
        let said = "Firecracker v1.16.1\n\n2026-11-24T06:20:00.000 [anonymous-instance:main] exit_code=0\n";
        assert_eq!(version(said), Some(("1.16.1".to_owned(), (1, 16))));
        assert_eq!(version("Firecracker v1.17.0-dev\n").unwrap().1, (1, 17));
        assert_eq!(version("QEMU emulator version 7.2.22"), None);
    }
}
