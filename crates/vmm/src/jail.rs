//! The folder that Firecracker's jailer locks a machine's process into: what lies in it, and how it
//! goes.
//!
//! ```text
//! BASE/firecracker/vm-0123456789ab/root     the process' `/`, its own
//!     kernel initrd                         links to the files that all machines boot, which it can only read
//!     seed                                  a copy of its own
//!     disk                                  a link to its root disk, its own
//!     messages.pipe                         what it says
//!     api.sock agent.sock                   made by the process
//!     firecracker dev/                      made by the jailer
//! ```
//!
//! The layout below BASE is the jailer's (docs/jailer.md of Firecracker). Links cost no memory and
//! no time, which is why BASE lies on the disks' file system. The process may put whatever it likes
//! under any name in its folder: nothing in there is opened through a symbolic link.

use crate::machine::{MachineId, MachineSpec, RunAs};
use crate::{Error, Result};
use rustix::fs::{FileType, Mode, OFlags, StatVfsMountFlags, fstat, open, statvfs};
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;

/// The names of the files, as the process sees them.
pub(crate) const KERNEL: &str = "/kernel";
pub(crate) const INITRD: &str = "/initrd";
pub(crate) const ROOT: &str = "/disk";
pub(crate) const SEED: &str = "/seed";
pub(crate) const API: &str = "/api.sock";
pub(crate) const AGENT: &str = "/agent.sock";
pub(crate) const MESSAGES: &str = "/messages.pipe";

/// Where the jails of all machines are.
#[derive(Debug, Clone)]
pub(crate) struct Jails {
    base: PathBuf,
    /// The name of the program's file, which the jailer makes a folder of.
    program: OsString,
}

/// One machine's.
#[derive(Debug, Clone)]
pub(crate) struct Jail(PathBuf);

/// Removes the jails below `base` of machines that are not among `running`: what a host's crash
/// leaves.
///
/// # Errors
/// [`Error::Io`] when they cannot be listed. One that cannot be removed is logged.
pub fn sweep_jails(base: &Path, running: &[MachineId]) -> Result<()> {
    for (id, jail) in jails(base)? {
        if !running.contains(&id) {
            tracing::info!(machine = %id, "removed the jail of a machine that is gone");
            jail.remove();
        }
    }
    Ok(())
}

/// All that are there, whatever the name of their program. What does not have our form is not ours.
fn jails(base: &Path) -> Result<Vec<(MachineId, Jail)>> {
    let mut found = Vec::new();
    for program in folders(base)? {
        for folder in folders(&program)? {
            let name = folder.file_name().and_then(|name| name.to_str());
            if let Some(id) = name.and_then(|name| name.parse().ok()) {
                found.push((id, Jail(folder)));
            }
        }
    }
    Ok(found)
}

fn folders(of: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(of) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.and_then(Iterator::collect::<io::Result<Vec<_>>>),
    };
    let entries = entries.map_err(Error::io("list", of))?;
    let folders = entries
        .iter()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(folders.map(fs::DirEntry::path).collect())
}

impl Jails {
    pub(crate) fn new(base: &Path, program: OsString) -> Jails {
        Jails {
            base: base.to_owned(),
            program,
        }
    }

    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    /// The machine's, if there is one.
    pub(crate) fn of(&self, id: &MachineId) -> Result<Option<Jail>> {
        Ok(jails(&self.base)?
            .into_iter()
            .find_map(|(found, jail)| (found == *id).then_some(jail)))
    }

    /// Removes what there is of the machine, whose process is gone.
    pub(crate) fn remove(&self, id: &MachineId) {
        match jails(&self.base) {
            Ok(jails) => jails
                .iter()
                .filter(|(found, _)| found == id)
                .for_each(|(_, jail)| jail.remove()),
            Err(error) => tracing::warn!(machine = %id, %error, "its jail may be left; the next start removes it"),
        }
    }

    /// Makes the machine's, with its files in it, which belong to `account` from then on. What an
    /// earlier one of its name left gives way.
    ///
    /// # Errors
    /// [`Error::Io`]; what was made by then is for [`Jails::remove`].
    pub(crate) fn make(&self, spec: &MachineSpec, disk: &Path, account: RunAs) -> Result<Jail> {
        self.remove(&spec.id);
        let jail = Jail(self.base.join(&self.program).join(spec.id.as_str()));
        let root = jail.root();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .map_err(Error::io("create", &root))?;
        self.check_mount()?;
        link(disk, &jail.path(ROOT))?;
        give(&jail.path(ROOT), account)?;
        lend(&spec.kernel, &jail.path(KERNEL), account)?;
        if let Some(initrd) = &spec.initrd {
            lend(initrd, &jail.path(INITRD), account)?;
        }
        copy(&spec.seed, &jail.path(SEED), account)?;
        Ok(jail)
    }

    /// The jailer makes device files and a program in it.
    fn check_mount(&self) -> Result<()> {
        let flags = statvfs(&self.base)
            .map_err(io::Error::from)
            .map_err(Error::io("look at", &self.base))?
            .f_flag;
        if flags.intersects(StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC) {
            return Err(Error::Unusable {
                program: "jailer".to_owned(),
                why: format!(
                    "{} is mounted nodev or noexec: mount it without, or set VMM=qemu",
                    self.base.display()
                ),
            });
        }
        Ok(())
    }
}

impl Jail {
    /// The process' `/`.
    fn root(&self) -> PathBuf {
        self.0.join("root")
    }

    /// One of its files, as this process sees it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name.trim_start_matches('/'))
    }

    /// Removes it, and whatever the process has made in it; a link is not followed. What cannot be
    /// removed is logged: a later start tries again.
    pub(crate) fn remove(&self) {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(folder = %self.0.display(), %error, "jail of a machine not removed");
            }
            _ => {}
        }
    }
}

/// Connects to a socket in a jail: to that file, not to what a link in its place may point to, and
/// however long its path is.
pub(crate) async fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&socket)?.st_mode) != FileType::Socket {
        return Err(io::Error::other(format!("{} is no socket", path.display())));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}

fn link(file: &Path, at: &Path) -> Result<()> {
    fs::hard_link(file, at).map_err(Error::io("link to its jail", file))
}

/// Lets the process read a file that stays the host's: a link where others may read it, else a
/// copy.
fn lend(file: &Path, at: &Path, account: RunAs) -> Result<()> {
    let meta = file.metadata().map_err(Error::io("look at", file))?;
    let for_all = meta.mode() & 0o004 != 0 && meta.uid() != account.uid;
    match for_all.then(|| fs::hard_link(file, at)) {
        Some(Ok(())) => Ok(()),
        Some(Err(error)) if error.kind() != io::ErrorKind::CrossesDevices => {
            Err(Error::io("link to its jail", file)(error))
        }
        _ => copy(file, at, account),
    }
}

/// A copy that belongs to the process; shared with the file where the file system can.
fn copy(file: &Path, at: &Path, account: RunAs) -> Result<()> {
    fs::copy(file, at).map_err(Error::io("copy to its jail", file))?;
    fs::set_permissions(at, Permissions::from_mode(0o400)).map_err(Error::io("set the mode of", at))?;
    give(at, account)
}

pub(crate) fn give(file: &Path, account: RunAs) -> Result<()> {
    let opened = open(
        file,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    );
    let file_of = |opened: OwnedFd| fchown(File::from(opened), Some(account.uid), Some(account.gid));
    opened
        .map_err(io::Error::from)
        .and_then(file_of)
        .map_err(Error::io("give away", file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_units::DiskLocation;

    const SOMEBODY: RunAs = RunAs {
        uid: 1_900_000_001,
        gid: 1_900_000_001,
    };

    fn spec(folder: &Path) -> MachineSpec {
        for (name, mode) in [("kernel", 0o644), ("initrd", 0o600), ("seed", 0o600), ("disk", 0o600)] {
            fs::write(folder.join(name), name).unwrap();
            fs::set_permissions(folder.join(name), Permissions::from_mode(mode)).unwrap();
        }
        MachineSpec {
            id: "vm-0123456789ab".parse().unwrap(),
            vcpus: 1,
            memory_mib: 64,
            kernel: folder.join("kernel"),
            initrd: Some(folder.join("initrd")),
            cmdline: String::new(),
            root: DiskLocation::File(folder.join("disk")),
            root_limits: crate::DiskLimits::default(),
            seed: folder.join("seed"),
            nic: crate::Nic {
                tap: "tap0".into(),
                mac: "52:54:00:12:34:56".into(),
            },
            run_dir: folder.join("run"),
            console_log: folder.join("console"),
            run_as: Some(SOMEBODY),
        }
    }

    fn jails_in(folder: &Path) -> Jails {
        Jails::new(&folder.join("jails"), "firecracker-v1.16".into())
    }

    #[test]
    fn a_jail_has_the_machine_s_files_and_its_process_can_write_its_disk_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (spec, jails) = (spec(folder.path()), jails_in(folder.path()));
        let jail = jails.make(&spec, &folder.path().join("disk"), SOMEBODY).unwrap();
        let about = |name: &str| fs::symlink_metadata(jail.path(name)).unwrap();
        let inode = |name: &str| folder.path().join(name).metadata().unwrap().ino();

        // Everybody's, shared: the page cache holds it once.
        assert_eq!((about(KERNEL).ino(), about(KERNEL).uid()), (inode("kernel"), 0));
        // Root's alone: a copy.
        assert_ne!(about(INITRD).ino(), inode("initrd"));
        assert_eq!(
            (about(INITRD).uid(), about(INITRD).mode() & 0o777),
            (SOMEBODY.uid, 0o400)
        );
        assert_eq!((about(SEED).uid(), about(SEED).mode() & 0o777), (SOMEBODY.uid, 0o400));
        assert_eq!((about(ROOT).ino(), about(ROOT).uid()), (inode("disk"), SOMEBODY.uid));
        for (name, text) in [(KERNEL, "kernel"), (INITRD, "initrd"), (SEED, "seed"), (ROOT, "disk")] {
            assert_eq!(fs::read_to_string(jail.path(name)).unwrap(), text);
        }
        assert!(jails.of(&spec.id).unwrap().is_some());

        jails.remove(&spec.id);
        assert!(jails.of(&spec.id).unwrap().is_none());
        for name in ["kernel", "initrd", "seed", "disk"] {
            assert_eq!(
                fs::read_to_string(folder.path().join(name)).unwrap(),
                name,
                "the original stays"
            );
        }
    }

    #[test]
    fn what_a_crash_left_is_swept_and_what_runs_or_is_not_ours_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (spec, jails) = (spec(folder.path()), jails_in(folder.path()));
        let disk = folder.path().join("disk");
        jails.make(&spec, &disk, SOMEBODY).unwrap();
        // An older program's, and somebody else's.
        let older = jails.base().join("firecracker-v1.15/vm-aaaaaaaaaaaa/root");
        let foreign = jails.base().join("firecracker-v1.15/somebody/root");
        for folder in [&older, &foreign] {
            fs::create_dir_all(folder).unwrap();
        }
        sweep_jails(jails.base(), std::slice::from_ref(&spec.id)).unwrap();
        assert!(jails.of(&spec.id).unwrap().is_some());
        assert!(!older.exists() && foreign.exists());
        sweep_jails(jails.base(), &[]).unwrap();
        assert!(jails.of(&spec.id).unwrap().is_none());
        assert!(disk.exists() && foreign.exists());
        sweep_jails(&folder.path().join("missing"), &[]).unwrap();
    }

    #[test]
    fn a_disk_on_another_file_system_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let (spec, jails) = (spec(folder.path()), jails_in(folder.path()));
        let elsewhere = Path::new("/proc/self/status");
        let error = jails.make(&spec, elsewhere, SOMEBODY).unwrap_err().to_string();
        assert!(error.contains("link to its jail /proc/self/status"), "{error}");
    }

    #[tokio::test]
    async fn a_link_in_the_place_of_a_socket_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let deep = folder.path().join("x".repeat(120));
        fs::create_dir(&deep).unwrap();
        let (other, link) = (folder.path().join("other.sock"), deep.join("api.sock"));
        let _listener = tokio::net::UnixListener::bind(&other).unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        let refused = connect(&link).await.unwrap_err().to_string();
        assert!(refused.contains("is no socket"), "{refused}");
        fs::remove_file(&link).unwrap();
        fs::hard_link(&other, &link).unwrap();
        connect(&link).await.unwrap();
    }
}
