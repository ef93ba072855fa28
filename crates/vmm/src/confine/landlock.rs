//! Restricts the files of a machine's process to its own and those that any program needs.
//!
//! Uses Landlock (Documentation/userspace-api/landlock.rst in the kernel source), which no account
//! and no capability can lift. A guest that breaks into its hypervisor can reach no other VM's disk
//! and no other file of the host, cannot open TCP connections, and cannot signal other processes.
//! Older kernels lack some of these restrictions; a kernel without Landlock (before 5.13, or
//! disabled) lacks all of them.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The newest ABI whose restrictions are requested.
const MAX_ABI: ABI = ABI::V6;

/// Libraries and the loader's configuration, which every program needs to start.
const SYSTEM_FILES: [&str; 5] = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.preload"];
/// Host information that the hypervisor reads: the number of processors, and the overcommit policy.
const HOST_INFO: [&str; 2] = ["/sys/devices/system/cpu", "/proc/sys/vm"];
/// Sources of random bytes and zeros.
const RANDOM_DEVICES: [&str; 3] = ["/dev/urandom", "/dev/random", "/dev/zero"];
/// Devices of a machine; file permissions decide which of them its account may open.
const DEVICES: [&str; 3] = ["/dev/null", "/dev/net/tun", "/dev/kvm"];

/// The files that one machine may use.
#[derive(Debug, Default)]
pub(crate) struct AllowedFiles {
    /// The hypervisor.
    pub(crate) program: PathBuf,
    pub(crate) read: Vec<PathBuf>,
    pub(crate) write: Vec<PathBuf>,
    /// The folder in which the hypervisor creates sockets.
    pub(crate) sockets: PathBuf,
}

/// The prepared rules, which a process applies to itself once, before it executes the hypervisor.
#[derive(Debug)]
pub(crate) struct Sandbox(Option<RulesetCreated>);

impl Sandbox {
    /// Prepares the rules. The allowed files are opened here, so that a file that takes their name
    /// later is not allowed.
    pub(crate) fn new(allowed: &AllowedFiles) -> io::Result<Sandbox> {
        ruleset(allowed)
            .map(|ruleset| Sandbox(Some(ruleset)))
            .map_err(|error| io::Error::other(format!("cannot prepare Landlock rules: {error}")))
    }

    /// Runs in a child between fork and exec, as its last step: makes two system calls. Later calls
    /// do nothing.
    pub(crate) fn enter(&mut self) -> io::Result<()> {
        match self.0.take() {
            Some(ruleset) => ruleset
                .restrict_self()
                .map(drop)
                .map_err(|_| io::Error::last_os_error()),
            None => Ok(()),
        }
    }
}

/// Returns whether this kernel has Landlock.
pub(crate) fn is_available() -> bool {
    let probe = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::ReadFile)
        .and_then(Ruleset::create);
    probe.is_ok_and(|ruleset| Option::<OwnedFd>::from(ruleset).is_some())
}

fn ruleset(allowed: &AllowedFiles) -> Result<RulesetCreated, RulesetError> {
    let read = AccessFs::from_read(MAX_ABI);
    let use_device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let sockets = AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(MAX_ABI))?
        .handle_access(AccessNet::from_all(MAX_ABI))?
        .scope(Scope::from_all(MAX_ABI))?
        .create()?;
    for path in SYSTEM_FILES
        .iter()
        .map(Path::new)
        .chain(prefix(&allowed.program).as_deref())
    {
        ruleset = allow(ruleset, path, read)?;
    }
    for path in HOST_INFO {
        ruleset = allow(ruleset, Path::new(path), AccessFs::ReadFile | AccessFs::ReadDir)?;
    }
    for path in RANDOM_DEVICES {
        ruleset = allow(ruleset, Path::new(path), AccessFs::ReadFile.into())?;
    }
    for path in DEVICES {
        ruleset = allow(ruleset, Path::new(path), use_device)?;
    }
    for path in &allowed.read {
        ruleset = allow(ruleset, path, AccessFs::ReadFile.into())?;
    }
    for path in &allowed.write {
        ruleset = allow(ruleset, path, write)?;
    }
    allow(ruleset, &allowed.sockets, sockets)
}

/// Allows `access` to a path; a missing path is skipped.
fn allow(ruleset: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(fd) => ruleset.add_rule(PathBeneath::new(fd, access)),
        Err(_) => Ok(ruleset),
    }
}

/// Returns the prefix that a program was installed to, with its libraries and data: `/opt/qemu` for
/// `/opt/qemu/bin/qemu-system-x86_64`.
fn prefix(program: &Path) -> Option<PathBuf> {
    let folder = program.canonicalize().ok()?.parent()?.to_owned();
    match folder.file_name().is_some_and(|name| name == "bin" || name == "sbin") {
        true => folder
            .parent()
            .filter(|prefix| prefix.parent().is_some())
            .map(Path::to_owned),
        // The program is not in a `bin` folder, so it is allowed alone.
        false => Some(program.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Output};

    fn inside(allowed: &AllowedFiles, script: &str) -> Output {
        let mut sandbox = Sandbox::new(allowed).unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(move || sandbox.enter()) };
        command.output().unwrap()
    }

    #[test]
    fn a_root_process_can_access_only_its_own_files() {
        if !is_available() {
            println!("not run: this kernel has no Landlock");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["kernel", "disk", "other"] {
            std::fs::write(path(name), name).unwrap();
        }
        std::fs::create_dir(path("run")).unwrap();
        let allowed = AllowedFiles {
            program: "/bin/sh".into(),
            read: vec![path("kernel")],
            write: vec![path("disk")],
            sockets: path("run"),
        };
        let run = |script: &str| {
            let at = folder.path().display();
            inside(&allowed, &format!("cd {at}; {script}"))
        };
        let allowed = |script: &str| {
            let output = run(script);
            assert!(output.status.success(), "{script}: {output:?}");
        };
        let denied = |script: &str| {
            let output = run(script);
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                !output.status.success() && stderr.to_lowercase().contains("denied"),
                "{script}: {output:?}"
            );
        };
        allowed("read line < kernel; [ \"$line\" = kernel ]");
        allowed("echo more >> disk && read line < disk");
        denied("echo x >> kernel");
        denied("read line < other");
        denied("read line < /etc/passwd");
        denied("ls .");
        denied("echo x > new");
        denied("echo x > run/new");
        denied("read line < /proc/1/cmdline");
        assert_eq!(std::fs::read(path("other")).unwrap(), b"other");
    }

    #[test]
    fn the_prefix_of_a_program_is_its_installation_folder() {
        assert_eq!(prefix(Path::new("/usr/bin/env")).as_deref(), Some(Path::new("/usr")));
        assert_eq!(prefix(Path::new("/nonexistent/bin/x")), None);
    }
}
