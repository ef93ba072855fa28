//! The only door to the Firecracker binary.

use crate::command::on_path;
use crate::confinement::Confined;
use crate::firecracker_api::Names;
use crate::machine::{MachineSpec, RunAs};
use crate::run_dir::RunDir;
use crate::{Error, Result};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{FdFlags, fcntl_setfd};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The program, as it is released.
pub(crate) const PROGRAM: &str = "firecracker";
/// The oldest that tells guests of their devices by ACPI: Debian's kernel takes them from nowhere else.
const OLDEST: (u32, u32) = (1, 8);
/// The first that boots a bzImage.
const BOOTS_BZIMAGE: (u32, u32) = (1, 17);

/// Firecracker, as found on this host.
#[derive(Debug, Clone)]
pub(crate) struct Firecracker {
    program: PathBuf,
    version: String,
    numbers: (u32, u32),
}

impl Firecracker {
    /// Looks for Firecracker on the `PATH` and asks it for its version.
    pub(crate) fn find() -> Result<Firecracker> {
        let program = on_path(PROGRAM).ok_or(Error::NoFirecracker)?;
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
        Ok(Firecracker {
            program,
            version,
            numbers,
        })
    }

    /// The binary.
    pub(crate) fn program(&self) -> &Path {
        &self.program
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

    /// The argument vector of a machine's process, with what stands for the program: by it and the id the process is found.
    pub(crate) fn argv(spec_id: &str, dir: &RunDir) -> Vec<String> {
        let mut argv = mark(spec_id, dir).to_vec();
        argv.insert(1, "--id".to_owned());
        // Relative to its own folder: nothing above it is the machine's to enter. Its log is opened anew through its stderr.
        argv.extend(
            [
                "--api-sock",
                "api.sock",
                "--log-path",
                "/proc/self/fd/2",
                "--level",
                "Info",
            ]
            .map(str::to_owned),
        );
        argv
    }

    /// Starts a machine's process, as its own user and in its own folder. It has no environment, and no open file but
    /// `console` (stdout), `messages` (stderr) and those of `files`. It is not waited for, and lives on when this process ends.
    pub(crate) fn spawn(
        &self,
        argv: &[String],
        files: Files,
        mut confined: Confined,
        console: File,
        messages: File,
    ) -> std::io::Result<Child> {
        let mut command = Command::new(&self.program);
        command
            .arg0(&argv[0])
            .args(&argv[1..])
            .env_clear()
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(console)
            .stderr(messages);
        if let Some(account) = files.account {
            command.uid(account.uid).gid(account.gid);
        }
        let Files { folder, inherited, .. } = files;
        let prepare = move || {
            rustix::process::fchdir(&folder)?;
            for file in &inherited {
                fcntl_setfd(file, FdFlags::empty())?;
            }
            confined.enter()
        };
        // SAFETY: between fork and exec only system calls are made: nothing is allocated and no lock is taken.
        unsafe { command.pre_exec(prepare) };
        command.spawn()
    }
}

/// The two arguments by which a machine's Firecracker is told from every other process.
pub(crate) fn mark(id: &str, dir: &RunDir) -> [String; 2] {
    [format!("{PROGRAM}:{}", dir.firecracker().display()), id.to_owned()]
}

/// The version in the first line of `firecracker --version`: `Firecracker v1.16.1`.
fn version(text: &str) -> Option<(String, (u32, u32))> {
    let version = text.lines().next()?.strip_prefix("Firecracker v")?.trim();
    let mut parts = version.split('.');
    let numbers = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some((version.to_owned(), numbers))
}

/// What the process gets beside its output: its folder, and the files of its machine.
#[derive(Debug)]
pub(crate) struct Files {
    folder: OwnedFd,
    inherited: Vec<OwnedFd>,
    account: Option<RunAs>,
}

impl Files {
    /// Makes the files ready for the account that the process runs as: it opens them itself, and can enter no folder on the way to
    /// them. So it inherits them and opens them again under `/proc/self/fd`; its disks are made its own for it.
    pub(crate) fn prepare(spec: &MachineSpec, root: &Path, dir: &RunDir, messages: &File) -> Result<(Files, Names)> {
        let folder_path = dir.firecracker();
        match std::fs::create_dir(&folder_path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io("create", &folder_path)(error));
            }
            _ => {}
        }
        std::fs::set_permissions(&folder_path, std::fs::Permissions::from_mode(0o700))
            .map_err(Error::io("set the mode of", &folder_path))?;
        let folder = opened(&folder_path, OFlags::DIRECTORY)?;
        let mut files = Files {
            folder,
            inherited: Vec::new(),
            account: None,
        };
        let Some(account) = spec.run_as else {
            let name = |path: &Path| path.to_string_lossy().into_owned();
            let names = Names {
                kernel: name(&spec.kernel),
                initrd: spec.initrd.as_deref().map(name),
                root: name(root),
                seed: name(&spec.seed),
            };
            return Ok((files, names));
        };
        fchown(&files.folder, Some(account.uid), Some(account.gid)).map_err(Error::io("give away", &folder_path))?;
        fchown(messages, Some(account.uid), Some(account.gid)).map_err(Error::io("give away", dir.messages()))?;
        let mut pass = |path: &Path, flags, own: bool| -> Result<String> {
            let file = opened(path, flags)?;
            if own {
                fchown(&file, Some(account.uid), Some(account.gid)).map_err(Error::io("give away", path))?;
            }
            let name = format!("/proc/self/fd/{}", file.as_raw_fd());
            files.inherited.push(file);
            Ok(name)
        };
        let names = Names {
            kernel: pass(&spec.kernel, OFlags::RDONLY, false)?,
            initrd: match &spec.initrd {
                Some(initrd) => Some(pass(initrd, OFlags::RDONLY, false)?),
                None => None,
            },
            root: pass(root, OFlags::RDWR, true)?,
            seed: pass(&spec.seed, OFlags::RDONLY, true)?,
        };
        files.account = Some(RunAs {
            uid: account.uid,
            gid: kvm_group().unwrap_or(account.gid),
        });
        Ok((files, names))
    }
}

fn opened(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    open(path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(|error| Error::io("open", path)(error.into()))
}

/// The group that may use `/dev/kvm`, as distributions set it up; never root's.
fn kvm_group() -> Option<u32> {
    let device = Path::new("/dev/kvm").metadata().ok()?;
    (device.mode() & 0o060 == 0o060 && device.gid() != 0).then(|| device.gid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_in_the_first_line() {
        let said = "Firecracker v1.16.1\n\n2026-11-24T06:20:00.000 [anonymous-instance:main] exit_code=0\n";
        assert_eq!(version(said), Some(("1.16.1".to_owned(), (1, 16))));
        assert_eq!(version("Firecracker v1.17.0-dev\n").unwrap().1, (1, 17));
        assert_eq!(version("QEMU emulator version 7.2.22"), None);
    }
}
