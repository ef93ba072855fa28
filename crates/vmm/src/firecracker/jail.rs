//! The folder to which Firecracker's jailer confines a machine's process: its content and removal.
//!
//! ```text
//! BASE/firecracker/vm-0123456789ab/root   the process' `/`, owned by its account
//!     kernel initrd modules  hard links to files shared by all machines; read-only
//!     seed                   a copy, owned by the process' account
//!     disk                   a hard link to the root disk, owned by the process' account
//!     messages.pipe          stderr
//!     api.sock agent.sock    created by the process
//!     firecracker dev/       created by the jailer
//! ```
//!
//! The jailer defines the layout below BASE (docs/jailer.md of Firecracker). Hard links cost no
//! memory and no time, which is why BASE is on the file system of the disks. The process can create
//! any file under any name in its folder: nothing in it is opened through a symbolic link.

use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::spec::{MachineSpec, RunAs};
use rustix::fs::{FileType, Mode, OFlags, StatVfsMountFlags, fstat, open, statvfs};
use scalebox_units::VmId;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;

/// Paths of the files, as seen by the process.
pub(crate) const KERNEL: &str = "/kernel";
pub(crate) const INITRD: &str = "/initrd";
pub(crate) const MODULES: &str = "/modules";
pub(crate) const ROOT: &str = "/disk";
pub(crate) const SEED: &str = "/seed";
pub(crate) const API: &str = "/api.sock";
pub(crate) const VSOCK: &str = "/agent.sock";
pub(crate) const STDERR_PIPE: &str = "/messages.pipe";

/// The jails of all machines.
#[derive(Debug, Clone)]
pub(crate) struct Jails {
    base: PathBuf,
    /// Name of the program's file, after which the jailer names a folder.
    program: OsString,
}

/// The jail of one machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Jail(PathBuf);

/// Removes the jails below `base` of machines that are not in `running`, which remain after a host
/// crash.
///
/// # Errors
/// [`Error::Io`] if the jails cannot be listed. A jail that cannot be removed is logged.
pub fn sweep_jails(base: &Path, running: &[VmId]) -> Result<()> {
    for (id, jail) in jails(base)? {
        if !running.contains(&id) {
            tracing::info!(machine = %id, "removing the jail of a machine that is gone");
            jail.remove();
        }
    }
    Ok(())
}

/// Lists all jails, whatever the name of their program. Folders whose name is not a machine id are
/// ignored.
fn jails(base: &Path) -> Result<Vec<(VmId, Jail)>> {
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

    /// Returns the jail of a machine, if it exists.
    pub(crate) fn of(&self, id: &VmId) -> Result<Option<Jail>> {
        Ok(jails(&self.base)?
            .into_iter()
            .find_map(|(found, jail)| (found == *id).then_some(jail)))
    }

    /// Removes the jail of a machine whose process is gone.
    pub(crate) fn remove(&self, id: &VmId) {
        match jails(&self.base) {
            Ok(jails) => jails
                .iter()
                .filter(|(found, _)| found == id)
                .for_each(|(_, jail)| jail.remove()),
            Err(error) => {
                tracing::warn!(machine = %id, %error, "cannot list jails; the next start removes the jail of this machine")
            }
        }
    }

    /// Creates the jail of a machine, with its files owned by `account`. Replaces a leftover jail.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Jails::remove`] then removes the partial jail.
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
        change_owner(&jail.path(ROOT), account)?;
        link_or_copy(&spec.kernel, &jail.path(KERNEL), account)?;
        if let Some(initrd) = &spec.initrd {
            link_or_copy(initrd, &jail.path(INITRD), account)?;
        }
        if let Some(modules) = &spec.modules {
            link_or_copy(modules, &jail.path(MODULES), account)?;
        }
        copy(&spec.seed, &jail.path(SEED), account)?;
        Ok(jail)
    }

    /// Checks the mount options: the jailer creates device files and a program in the jail.
    fn check_mount(&self) -> Result<()> {
        let flags = statvfs(&self.base)
            .map_err(io::Error::from)
            .map_err(Error::io("read the metadata of", &self.base))?
            .f_flag;
        if flags.intersects(StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC) {
            return Err(Error::UnfitJails(self.base.clone()));
        }
        Ok(())
    }
}

impl Jail {
    /// Returns the process' `/`.
    fn root(&self) -> PathBuf {
        self.0.join("root")
    }

    /// Returns the path of one of the jail's files in the host's file system.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name.trim_start_matches('/'))
    }

    /// Removes the jail and all files that the process created in it, without following links. Logs
    /// files that cannot be removed; a later start tries again.
    pub(crate) fn remove(&self) {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(folder = %self.0.display(), %error, "cannot remove a machine's jail");
            }
            _ => {}
        }
    }
}

/// Connects to a socket in a jail. Does not follow a symbolic link in its place, and accepts a path
/// of any length.
pub(crate) async fn connect(path: &Path) -> io::Result<UnixStream> {
    let path = path.to_owned();
    let socket = blocking(move || open_socket(&path)).await?;
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}

fn open_socket(path: &Path) -> io::Result<OwnedFd> {
    let socket = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    match FileType::from_raw_mode(fstat(&socket)?.st_mode) {
        FileType::Socket => Ok(socket),
        _ => Err(io::Error::other(format!("{} is not a socket", path.display()))),
    }
}

fn link(file: &Path, at: &Path) -> Result<()> {
    fs::hard_link(file, at).map_err(Error::io("hard-link into the jail", file))
}

/// Makes a host file readable in the jail. Uses a hard link if other users may read the file,
/// otherwise a copy.
fn link_or_copy(file: &Path, at: &Path, account: RunAs) -> Result<()> {
    let meta = file.metadata().map_err(Error::io("read the metadata of", file))?;
    let world_readable = meta.mode() & 0o004 != 0 && meta.uid() != account.uid;
    match world_readable.then(|| fs::hard_link(file, at)) {
        Some(Ok(())) => Ok(()),
        Some(Err(error)) if error.kind() != io::ErrorKind::CrossesDevices => {
            Err(Error::io("hard-link into the jail", file)(error))
        }
        _ => copy(file, at, account),
    }
}

/// Copies a file into the jail, owned by the process' account. The copy is a reflink where the file
/// system supports it.
fn copy(file: &Path, at: &Path, account: RunAs) -> Result<()> {
    fs::copy(file, at).map_err(Error::io("copy into the jail", file))?;
    fs::set_permissions(at, Permissions::from_mode(0o400)).map_err(Error::io("set the mode of", at))?;
    change_owner(at, account)
}

pub(crate) fn change_owner(file: &Path, account: RunAs) -> Result<()> {
    let opened = open(
        file,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    );
    let file_of = |opened: OwnedFd| fchown(File::from(opened), Some(account.uid), Some(account.gid));
    opened
        .map_err(io::Error::from)
        .and_then(file_of)
        .map_err(Error::io("change the owner of", file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_units::DiskLocation;

    const ACCOUNT: RunAs = RunAs {
        uid: 1_900_000_001,
        gid: 1_900_000_001,
    };

    fn spec(folder: &Path) -> MachineSpec {
        let files = [
            ("kernel", 0o644),
            ("modules", 0o644),
            ("initrd", 0o600),
            ("seed", 0o600),
            ("disk", 0o600),
        ];
        for (name, mode) in files {
            fs::write(folder.join(name), name).unwrap();
            fs::set_permissions(folder.join(name), Permissions::from_mode(mode)).unwrap();
        }
        MachineSpec {
            id: "vm-0123456789ab".parse().unwrap(),
            vcpus: 1,
            memory_mib: 64,
            kernel: folder.join("kernel"),
            initrd: Some(folder.join("initrd")),
            modules: Some(folder.join("modules")),
            cmdline: String::new(),
            root: DiskLocation::File(folder.join("disk")),
            root_limits: crate::spec::DiskLimits::default(),
            seed: folder.join("seed"),
            nic: crate::spec::Nic {
                tap: "tap0".into(),
                mac: "52:54:00:12:34:56".parse().unwrap(),
            },
            run_dir: folder.join("run"),
            console_log: folder.join("console"),
            run_as: Some(ACCOUNT),
        }
    }

    fn jails_in(folder: &Path) -> Jails {
        Jails::new(&folder.join("jails"), "firecracker-v1.16".into())
    }

    #[test]
    fn a_jail_contains_the_machine_s_files_and_only_the_disk_is_writable() {
        let folder = tempfile::tempdir().unwrap();
        let (spec, jails) = (spec(folder.path()), jails_in(folder.path()));
        let jail = jails.make(&spec, &folder.path().join("disk"), ACCOUNT).unwrap();
        let metadata = |name: &str| fs::symlink_metadata(jail.path(name)).unwrap();
        let inode = |name: &str| folder.path().join(name).metadata().unwrap().ino();

        // World-readable: shared, and cached only once.
        assert_eq!((metadata(KERNEL).ino(), metadata(KERNEL).uid()), (inode("kernel"), 0));
        assert_eq!(
            (metadata(MODULES).ino(), metadata(MODULES).uid()),
            (inode("modules"), 0)
        );
        // Readable by root only: a copy.
        assert_ne!(metadata(INITRD).ino(), inode("initrd"));
        assert_eq!(
            (metadata(INITRD).uid(), metadata(INITRD).mode() & 0o777),
            (ACCOUNT.uid, 0o400)
        );
        assert_eq!(
            (metadata(SEED).uid(), metadata(SEED).mode() & 0o777),
            (ACCOUNT.uid, 0o400)
        );
        assert_eq!(
            (metadata(ROOT).ino(), metadata(ROOT).uid()),
            (inode("disk"), ACCOUNT.uid)
        );
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
    fn the_sweep_removes_leftover_jails_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (spec, jails) = (spec(folder.path()), jails_in(folder.path()));
        let disk = folder.path().join("disk");
        jails.make(&spec, &disk, ACCOUNT).unwrap();
        // A jail of an older program, and a folder of another origin.
        let older = jails.base().join("firecracker-v1.15/vm-aaaaaaaaaaaa/root");
        let foreign = jails.base().join("firecracker-v1.15/other/root");
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
    fn a_disk_on_another_file_system_is_rejected_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let (spec, jails) = (spec(folder.path()), jails_in(folder.path()));
        let elsewhere = Path::new("/proc/self/status");
        let error = jails.make(&spec, elsewhere, ACCOUNT).unwrap_err().to_string();
        assert!(error.contains("hard-link into the jail /proc/self/status"), "{error}");
    }

    #[tokio::test]
    async fn connecting_does_not_follow_symbolic_links() {
        let folder = tempfile::tempdir().unwrap();
        // The path is longer than the limit for a socket's path.
        let deep = folder.path().join("x".repeat(120));
        fs::create_dir(&deep).unwrap();
        let (other, link) = (folder.path().join("other.sock"), deep.join("api.sock"));
        let _listener = tokio::net::UnixListener::bind(&other).unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        let error = connect(&link).await.unwrap_err().to_string();
        assert!(error.contains("is not a socket"), "{error}");
        fs::remove_file(&link).unwrap();
        fs::hard_link(&other, &link).unwrap();
        connect(&link).await.unwrap();
    }
}
