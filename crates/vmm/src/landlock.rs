//! Which files a machine's process may reach: its own, those that any program of this host needs,
//! and no others.
//!
//! By Landlock (Documentation/userspace-api/landlock.rst of the kernel), which no account and no
//! capability lifts: a guest that breaks into its hypervisor finds no other VM's disk and no file
//! of the host's that it could read or fill, opens no TCP connection, and signals nobody. A kernel
//! older than a part of it does without that part; one without Landlock (before 5.13, or turned
//! off) does without all of it.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The latest that is asked for.
const LATEST: ABI = ABI::V6;

/// What every program needs to be started: libraries, and the list of where they are.
const SYSTEM: [&str; 5] = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.preload"];
/// What is asked of the kernel about the host: how many processors there are, and whether memory
/// may be promised twice.
const ABOUT_THE_HOST: [&str; 2] = ["/sys/devices/system/cpu", "/proc/sys/vm"];
/// What gives random bytes, or none.
const SOURCES: [&str; 3] = ["/dev/urandom", "/dev/random", "/dev/zero"];
/// What a machine talks to; it is in its account's power which of them.
const DEVICES: [&str; 3] = ["/dev/null", "/dev/net/tun", "/dev/kvm"];

/// The files of one machine.
#[derive(Debug, Default)]
pub(crate) struct Needed {
    /// The hypervisor.
    pub(crate) program: PathBuf,
    pub(crate) read: Vec<PathBuf>,
    pub(crate) write: Vec<PathBuf>,
    /// Where it makes its sockets.
    pub(crate) sockets: PathBuf,
}

/// What a process puts on, once, before it becomes the hypervisor.
#[derive(Debug)]
pub(crate) struct Sandbox(Option<RulesetCreated>);

impl Sandbox {
    /// Prepares it: opens what is allowed, so that it is these files and none that come to have
    /// their names.
    pub(crate) fn new(needed: &Needed) -> io::Result<Sandbox> {
        ruleset(needed)
            .map(|ruleset| Sandbox(Some(ruleset)))
            .map_err(|error| io::Error::other(format!("its files cannot be fenced in: {error}")))
    }

    /// For a child between fork and exec, as its last step: two system calls. Later calls do
    /// nothing.
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

/// Whether this kernel has Landlock.
pub(crate) fn is_there() -> bool {
    let asked = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::ReadFile)
        .and_then(Ruleset::create);
    asked.is_ok_and(|ruleset| Option::<OwnedFd>::from(ruleset).is_some())
}

fn ruleset(needed: &Needed) -> Result<RulesetCreated, RulesetError> {
    let read = AccessFs::from_read(LATEST);
    let talk = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let sockets = AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LATEST))?
        .handle_access(AccessNet::from_all(LATEST))?
        .scope(Scope::from_all(LATEST))?
        .create()?;
    for path in SYSTEM.iter().map(Path::new).chain(prefix(&needed.program).as_deref()) {
        ruleset = allow(ruleset, path, read)?;
    }
    for path in ABOUT_THE_HOST {
        ruleset = allow(ruleset, Path::new(path), AccessFs::ReadFile | AccessFs::ReadDir)?;
    }
    for path in SOURCES {
        ruleset = allow(ruleset, Path::new(path), AccessFs::ReadFile.into())?;
    }
    for path in DEVICES {
        ruleset = allow(ruleset, Path::new(path), talk)?;
    }
    for path in &needed.read {
        ruleset = allow(ruleset, path, AccessFs::ReadFile.into())?;
    }
    for path in &needed.write {
        ruleset = allow(ruleset, path, write)?;
    }
    allow(ruleset, &needed.sockets, sockets)
}

/// What is not there is not allowed either.
fn allow(ruleset: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(fd) => ruleset.add_rule(PathBeneath::new(fd, access)),
        Err(_) => Ok(ruleset),
    }
}

/// The folder that a program was installed to, with its libraries and its data: `/opt/qemu` of
/// `/opt/qemu/bin/qemu-system-x86_64`.
fn prefix(program: &Path) -> Option<PathBuf> {
    let folder = program.canonicalize().ok()?.parent()?.to_owned();
    match folder.file_name().is_some_and(|name| name == "bin" || name == "sbin") {
        true => folder
            .parent()
            .filter(|prefix| prefix.parent().is_some())
            .map(Path::to_owned),
        // One that lies about among other things: the program alone.
        false => Some(program.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Output};

    fn inside(needed: &Needed, script: &str) -> Output {
        let mut sandbox = Sandbox::new(needed).unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        // SAFETY: system calls alone.
        unsafe { command.pre_exec(move || sandbox.enter()) };
        command.output().unwrap()
    }

    #[test]
    fn a_process_reaches_its_own_files_and_no_others_though_it_is_root() {
        if !is_there() {
            println!("not run: this kernel has no Landlock");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["kernel", "disk", "other"] {
            std::fs::write(path(name), name).unwrap();
        }
        std::fs::create_dir(path("run")).unwrap();
        let needed = Needed {
            program: "/bin/sh".into(),
            read: vec![path("kernel")],
            write: vec![path("disk")],
            sockets: path("run"),
        };
        let run = |script: &str| {
            let at = folder.path().display();
            inside(&needed, &format!("cd {at}; {script}"))
        };
        let works = |script: &str| {
            let output = run(script);
            assert!(output.status.success(), "{script}: {output:?}");
        };
        let refused = |script: &str| {
            let output = run(script);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                !output.status.success() && said.to_lowercase().contains("denied"),
                "{script}: {output:?}"
            );
        };
        works("read line < kernel; [ \"$line\" = kernel ]");
        works("echo more >> disk && read line < disk");
        refused("echo x >> kernel");
        refused("read line < other");
        refused("read line < /etc/passwd");
        refused("ls .");
        refused("echo x > new");
        refused("echo x > run/new");
        refused("read line < /proc/1/cmdline");
        assert_eq!(std::fs::read(path("other")).unwrap(), b"other");
    }

    #[test]
    fn a_program_s_prefix_is_what_it_was_installed_to() {
        assert_eq!(prefix(Path::new("/usr/bin/env")).as_deref(), Some(Path::new("/usr")));
        assert_eq!(prefix(Path::new("/nonexistent/bin/x")), None);
    }
}
