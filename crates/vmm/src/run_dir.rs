//! The files of a running machine: their ownership and removal.
//!
//! Each machine has one folder with mode 0700: access to it is control of the machine. The process
//! that holds the machine locks the folder (flock(2)), so that neither a second daemon nor a second
//! handle can interfere. The kernel releases the lock when the holder dies, however it dies.

use crate::confine::cgroup;
use crate::error::{Error, Result};
use crate::machine::Channel;
use crate::process::Identity;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open, stat};
use rustix::io::Errno;
use scalebox_units::VmId;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The folder of one machine, and the names of its files.
#[derive(Debug, Clone)]
pub(crate) struct RunDir(PathBuf);

/// The lock on a machine's folder; released on drop.
#[derive(Debug)]
pub(crate) struct Lock(OwnedFd);

impl Drop for Lock {
    /// Unlocks explicitly. Closing is not enough: a child that is being spawned has a copy of the
    /// descriptor, and with it the lock, until it executes its program.
    fn drop(&mut self) {
        if let Err(error) = flock(&self.0, FlockOperation::Unlock) {
            tracing::warn!(%error, "cannot unlock a machine's run folder");
        }
    }
}

/// The facts by which another process adopts the machine.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub id: VmId,
    pub process: Identity,
    pub root: PathBuf,
    pub console_log: PathBuf,
}

impl RunDir {
    pub(crate) fn at(path: &Path) -> RunDir {
        RunDir(path.to_owned())
    }

    /// Returns the path of QEMU's control socket.
    pub(crate) fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// Returns the path of the socket of the guest's serial console.
    pub(crate) fn console(&self) -> PathBuf {
        self.0.join("console.sock")
    }

    /// Returns the path of the pipe to which Firecracker writes the guest's serial console.
    pub(crate) fn console_pipe(&self) -> PathBuf {
        self.0.join("console.pipe")
    }

    /// Returns the path of the socket of a channel's port.
    pub(crate) fn channel(&self, channel: Channel) -> PathBuf {
        self.0.join(match channel {
            Channel::Qga => "agent.sock",
            Channel::Agent => "scalebox.sock",
        })
    }

    /// Returns the path of the pipe that receives QEMU's stderr.
    pub(crate) fn stderr_pipe(&self) -> PathBuf {
        self.0.join("messages.pipe")
    }

    /// Returns the path of the list of the machine's control groups, one per line.
    fn groups(&self) -> PathBuf {
        self.0.join("groups")
    }

    fn record(&self) -> PathBuf {
        self.0.join("machine.json")
    }

    fn part(&self) -> PathBuf {
        self.0.join("machine.json.part")
    }

    /// Creates the folder if it is missing. Its parent must exist.
    fn create(&self) -> Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::set_permissions(&self.0, Permissions::from_mode(0o700))
            }
            other => other,
        }
        .map_err(Error::io("create", &self.0))
    }

    /// Locks the folder, creating it if it is missing. Fails if another process holds the lock.
    pub(crate) fn create_locked(&self, id: &VmId) -> Result<Lock> {
        loop {
            self.create()?;
            // `None`: the last holder removed the folder in between.
            if let Some(lock) = self.lock(id)? {
                return Ok(lock);
            }
        }
    }

    /// Locks the folder. Fails if another process holds the lock; returns `None` if there is no
    /// folder.
    pub(crate) fn lock(&self, id: &VmId) -> Result<Option<Lock>> {
        loop {
            let folder = match open(&self.0, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
                Ok(folder) => folder,
                Err(Errno::NOENT) => return Ok(None),
                Err(error) => return Err(Error::io("open", &self.0)(error.into())),
            };
            match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if self.is_current(&folder) => return Ok(Some(Lock(folder))),
                // The last holder removed the folder between opening and locking: try again.
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let pid = self.read(id).ok().flatten().map(|record| record.process.pid);
                    return Err(Error::Running { id: id.clone(), pid });
                }
                Err(error) => return Err(Error::io("lock", &self.0)(error.into())),
            }
        }
    }

    fn is_current(&self, folder: &OwnedFd) -> bool {
        matches!((fstat(folder), stat(&self.0)), (Ok(open), Ok(named)) if open.st_ino == named.st_ino)
    }

    /// Writes the record atomically.
    pub(crate) fn write(&self, record: &Record) -> Result<()> {
        let part = self.part();
        let text = serde_json::to_vec(record)
            .map_err(io::Error::from)
            .map_err(Error::io("write", &part))?;
        fs::write(&part, text).map_err(Error::io("write", &part))?;
        fs::rename(&part, self.record()).map_err(Error::io("rename", &part))
    }

    /// Reads the record, if a launch wrote one. A record that cannot be parsed counts as none. A
    /// record of another machine is an error, because its files must not be removed.
    pub(crate) fn read(&self, id: &VmId) -> Result<Option<Record>> {
        let text = match fs::read(self.record()) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", self.record())(error)),
        };
        match serde_json::from_slice::<Record>(&text) {
            Ok(record) if record.id == *id => Ok(Some(record)),
            Ok(record) => {
                let why = format!("{} belongs to {}", self.0.display(), record.id);
                Err(Error::Spec {
                    id: id.clone(),
                    what: "run_dir",
                    why,
                })
            }
            Err(error) => {
                tracing::warn!(file = %self.record().display(), %error, "ignoring an invalid machine record");
                Ok(None)
            }
        }
    }

    /// Records the control groups that are about to be created, so that they are removed with the
    /// folder.
    pub(crate) fn record_groups(&self, folders: &[PathBuf]) -> Result<()> {
        let lines: Vec<_> = folders.iter().map(|folder| folder.to_string_lossy()).collect();
        fs::write(self.groups(), lines.join("\n")).map_err(Error::io("write", self.groups()))
    }

    /// Returns whether the kernel killed the machine's process because its control group ran out of
    /// memory.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        cgroup::ran_out_of_memory(&self.recorded_groups())
    }

    fn recorded_groups(&self) -> Vec<PathBuf> {
        let recorded = fs::read_to_string(self.groups()).unwrap_or_default();
        recorded.lines().map(PathBuf::from).collect()
    }

    /// Removes all files of the machine, and the folder if nothing else is in it. Logs files that
    /// cannot be removed; the next launch tries again.
    pub(crate) fn clear(&self) {
        self.clear_files();
        match fs::remove_dir(&self.0) {
            Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
                tracing::warn!(folder = %self.0.display(), %error, "cannot remove a machine's run folder");
            }
            _ => {}
        }
    }

    /// Removes the files like [`clear`](RunDir::clear), but keeps the folder.
    pub(crate) fn clear_files(&self) {
        cgroup::remove(&self.recorded_groups());
        for file in [
            self.groups(),
            self.control(),
            self.console(),
            self.console_pipe(),
            self.channel(Channel::Qga),
            self.channel(Channel::Agent),
            self.stderr_pipe(),
            self.part(),
            self.record(),
        ] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(file = %file.display(), %error, "cannot remove a leftover file of a machine");
                }
                _ => {}
            }
        }
    }
}
