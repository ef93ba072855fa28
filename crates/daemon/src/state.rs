//! The state file: what the daemon must know after a crash, in SQLite under `STATE_DIR`.
//!
//! It lies outside the pool, so that a full pool does not stop the daemon. A change has two
//! outcomes: it succeeded and survives a power cut, or it failed and was not made, now and after a
//! restart. All methods block.

mod commits;
mod renewal;
mod reserve;

use crate::idempotency::Once;
use commits::Commits;
use reserve::Reserve;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Row, params};
use rustix::fs::{StatVfsMountFlags, statvfs};
use scalebox_client::{AutoExtend, IdempotencyKey, VmStatus};
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A VM as it stands in the state file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// `vm-` and twelve hex digits.
    pub id: String,
    /// Unique.
    pub name: String,
    /// The template its disk was cloned from.
    pub template: String,
    /// The key its account accepts.
    pub ssh_public_key: String,
    /// RFC 3339, UTC.
    pub created_at: String,
    /// Processors.
    pub vcpu_count: u32,
    /// Memory in MiB.
    pub mem_size_mib: u64,
    /// Provisioned size of its disk in GiB.
    pub disk_size_gib: u64,
    /// How its disk extends itself, if it does.
    pub auto_extend: Option<AutoExtend>,
    /// What it may take of disk and network.
    pub limits: VmLimits,
    /// Whether it is started again after a reboot of the host.
    pub autostart: bool,
    /// The driver of its machine, as in the setting `VMM`; releases before this column recorded
    /// none.
    pub vmm: Option<String>,
    /// Its address in `SUBNET`; unique.
    pub guest_ip: Ipv4Addr,
    /// The host's port that leads to its port 22; unique.
    pub ssh_port: u16,
    /// What it was last known to do.
    pub status: VmStatus,
    /// Why, where that needs saying.
    pub status_reason: Option<String>,
}

/// What a VM may take of disk and network; no limit where there is `None`. Units as in the API.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VmLimits {
    /// Requests a second.
    pub disk_iops: Option<u64>,
    /// Megabytes a second.
    pub disk_mbps: Option<u64>,
    /// Megabits a second.
    pub net_mbps: Option<u64>,
}

/// What the state knows of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fact {
    /// The mark on the pool whose disks these are.
    PoolOwner,
    /// The boot of the host (`/proc/sys/kernel/random/boot_id`) in which the VMs were last seen to.
    BootId,
    /// How many times a daemon was started on it.
    Starts,
}

impl Fact {
    fn key(self) -> &'static str {
        match self {
            Fact::PoolOwner => "pool_owner",
            Fact::BootId => "boot_id",
            Fact::Starts => "starts",
        }
    }
}

/// Why the state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// SQLite failed, or the disk under it.
    #[error("the state file {}: {source}", path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// What SQLite reports.
        source: Arc<rusqlite::Error>,
    },
    /// One failure of several changes that were to be committed together.
    #[error(transparent)]
    Shared(Arc<StateError>),
    /// A thread that worked on the state file panicked.
    #[error("a change of the state file was broken off by an error inside scaleboxd")]
    Panicked,
    /// The disk of `STATE_DIR` is full.
    #[error("the disk of STATE_DIR ({}) is full: free space there, then try again", .0.display())]
    Full(PathBuf),
    /// The file system of `STATE_DIR` was read-only when the daemon started.
    #[error(
        "STATE_DIR ({}) was read-only when scaleboxd started: nothing can be changed until it is writable and scaleboxd is restarted",
        .0.display()
    )]
    ReadOnly(PathBuf),
    /// A change was to be made to a VM that the state file does not have.
    #[error("the state file {} has no VM {id}: nothing was changed", path.display())]
    NoSuchVm {
        /// The file.
        path: PathBuf,
        /// The VM.
        id: String,
    },
    /// The folder or the lock.
    #[error("cannot use the state folder {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another daemon has it.
    #[error("another scaleboxd uses {}: stop it first, or set STATE_DIR to another folder", .0.display())]
    Locked(PathBuf),
    /// A later release wrote it.
    #[error("{} was written by a later release (schema {found}, this one knows {known}): install that release again", path.display())]
    FromTheFuture {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: usize,
        /// The last one known.
        known: usize,
    },
}

impl StateError {
    /// The error itself, where it is shared.
    pub fn root(&self) -> &StateError {
        match self {
            StateError::Shared(shared) => shared.root(),
            other => other,
        }
    }
}

/// What brings a state file from the schema before to this one; the schema's number is the count of
/// steps done, in `PRAGMA user_version`. Steps are only ever appended.
const MIGRATIONS: [&str; 6] = [
    "CREATE TABLE vms (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        template TEXT NOT NULL,
        ssh_public_key TEXT NOT NULL,
        created_at TEXT NOT NULL,
        vcpu_count INTEGER NOT NULL,
        mem_size_mib INTEGER NOT NULL,
        disk_size_gib INTEGER NOT NULL,
        guest_ip TEXT NOT NULL UNIQUE,
        ssh_port INTEGER NOT NULL UNIQUE,
        status TEXT NOT NULL,
        status_reason TEXT
    ) STRICT;
    CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "CREATE TABLE idempotency_keys (key TEXT PRIMARY KEY, digest TEXT NOT NULL, vm TEXT NOT NULL) STRICT;
    CREATE TRIGGER forget_key AFTER DELETE ON vms BEGIN DELETE FROM idempotency_keys WHERE vm = OLD.id; END",
    // All three or none of them.
    "ALTER TABLE vms ADD COLUMN extend_threshold_percent INTEGER;
    ALTER TABLE vms ADD COLUMN extend_increment_gib INTEGER;
    ALTER TABLE vms ADD COLUMN extend_limit_gib INTEGER",
    "ALTER TABLE vms ADD COLUMN disk_iops INTEGER;
    ALTER TABLE vms ADD COLUMN disk_mbps INTEGER;
    ALTER TABLE vms ADD COLUMN net_mbps INTEGER;
    ALTER TABLE vms ADD COLUMN autostart INTEGER NOT NULL DEFAULT 1",
    // Keys were written before their VM was; a crash in between left some that belong to none.
    "DELETE FROM idempotency_keys WHERE vm NOT IN (SELECT id FROM vms)",
    "ALTER TABLE vms ADD COLUMN vmm TEXT",
];

/// The open state file. One process has it at a time.
#[derive(Debug)]
pub struct State {
    folder: PathBuf,
    path: PathBuf,
    commits: Commits,
    is_read_only: bool,
    _lock: File,
}

impl State {
    /// Opens the state in `folder`, making it when it is not there, and brings it to this release's
    /// schema.
    ///
    /// On a read-only file system a copy in `scratch`, which must be writable, is read instead, and
    /// every change fails.
    ///
    /// # Errors
    /// [`StateError::Locked`] while another process has it.
    pub fn open(folder: &Path, scratch: &Path) -> Result<State, StateError> {
        let in_folder = |source| StateError::Folder {
            path: folder.to_owned(),
            source,
        };
        let make = |dir: &Path| fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        make(folder).map_err(in_folder)?;
        let lock = lock_file(folder).map_err(in_folder)?;
        if !scalebox_storage::try_lock_exclusive(&lock).map_err(in_folder)? {
            return Err(StateError::Locked(folder.to_owned()));
        }
        let is_read_only = is_on_read_only_file_system(folder).map_err(in_folder)?;
        let reserve = Reserve::at(folder);
        let path = folder.join("state.db");
        let opened = if is_read_only {
            let copy = make(scratch)
                .and_then(|()| copy_to(folder, scratch))
                .map_err(in_folder)?;
            connect(&copy)
        } else {
            match renewal::open(folder) {
                Err(StateError::Full(_)) if reserve.release() => renewal::open(folder),
                other => other,
            }
        };
        if !is_read_only {
            reserve.ensure();
            // The file's own name must survive a power cut too.
            File::open(folder)
                .and_then(|folder| folder.sync_all())
                .map_err(in_folder)?;
        }
        Ok(State {
            folder: folder.to_owned(),
            path,
            commits: Commits::new(folder, opened?, reserve),
            is_read_only,
            _lock: lock,
        })
    }

    /// Whether every change fails because `STATE_DIR` was read-only at the start.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Reads a fact without taking the state, also while a daemon has it; `None` also when there is
    /// no state yet.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn peek(folder: &Path, fact: Fact) -> Result<Option<String>, StateError> {
        State::peek_with(folder, |connection| {
            let query = "SELECT value FROM facts WHERE key = ?";
            connection.query_row(query, [fact.key()], |row| row.get(0)).optional()
        })
    }

    /// How many VMs a state knows, read as by [`State::peek`]; 0 where there is no state.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn peek_vms(folder: &Path) -> Result<u64, StateError> {
        let count = State::peek_with(folder, |connection| {
            connection
                .query_row("SELECT count(*) FROM vms", [], |row| row.get(0))
                .map(Some)
        });
        count.map(Option::unwrap_or_default)
    }

    fn peek_with<T>(
        folder: &Path,
        read: impl FnOnce(&Connection) -> rusqlite::Result<Option<T>>,
    ) -> Result<Option<T>, StateError> {
        let path = folder.join("state.db");
        if !path.exists() {
            return Ok(None);
        }
        let connection = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY);
        connection
            .and_then(|connection| read(&connection))
            .map_err(|error| failed(&path, Arc::new(error)))
    }

    /// Counts the VMs of each driver without taking the state; none also when there is no state
    /// yet.
    ///
    /// # Errors
    /// [`StateError::Database`], also for a state of a release that recorded no drivers.
    pub fn peek_drivers(folder: &Path) -> Result<Vec<(String, u64)>, StateError> {
        let query = "SELECT vmm, count(*) FROM vms WHERE vmm IS NOT NULL GROUP BY vmm ORDER BY vmm";
        let counts = State::peek_with(folder, |state| {
            let mut query = state.prepare(query)?;
            let counts = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            counts.collect::<rusqlite::Result<_>>().map(Some)
        })?;
        Ok(counts.unwrap_or_default())
    }

    /// All VMs, oldest first.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn vms(&self) -> Result<Vec<Record>, StateError> {
        self.read(|connection| {
            let mut query = connection.prepare("SELECT * FROM vms ORDER BY created_at, id")?;
            query.query_map([], record)?.collect()
        })
    }

    /// Adds a VM, together with the request that asked for it if that has an idempotency key.
    ///
    /// # Errors
    /// [`StateError::Database`], also when its id, name, address or port is taken.
    pub fn insert(&self, vm: &Record, once: Option<&Once>) -> Result<(), StateError> {
        let (vm, once) = (vm.clone(), once.cloned());
        self.commit(move |connection| {
            if let Some(once) = &once {
                connection
                    .prepare_cached("INSERT OR REPLACE INTO idempotency_keys VALUES (?, ?, ?)")?
                    .execute(params![once.key.as_str(), once.digest, vm.id])?;
            }
            insert(connection, &vm)
        })
        .map(drop)
    }

    /// The id of the VM that the key's request has made, and the digest of that request.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn made_by(&self, key: &IdempotencyKey) -> Result<Option<(String, String)>, StateError> {
        self.read(|connection| {
            let query = "SELECT vm, digest FROM idempotency_keys WHERE key = ? AND vm IN (SELECT id FROM vms)";
            connection
                .query_row(query, [key.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()
        })
    }

    /// Changes what a VM is known to do.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NoSuchVm`].
    pub fn set_status(&self, id: &str, status: VmStatus, reason: Option<&str>) -> Result<(), StateError> {
        let (vm, reason) = (id.to_owned(), reason.map(str::to_owned));
        self.change(id, move |connection| {
            connection
                .prepare_cached("UPDATE vms SET status = ?2, status_reason = ?3 WHERE id = ?1")?
                .execute(params![vm, status.as_str(), reason])
        })
    }

    /// Changes the size a VM's disk has, or is about to have.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NoSuchVm`].
    pub fn set_disk_size(&self, id: &str, disk_size_gib: u64) -> Result<(), StateError> {
        let vm = id.to_owned();
        self.change(id, move |connection| {
            connection
                .prepare_cached("UPDATE vms SET disk_size_gib = ?2 WHERE id = ?1")?
                .execute(params![vm, disk_size_gib])
        })
    }

    /// Changes a VM's settings: how its disk extends itself, its limits, whether it is started
    /// again.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NoSuchVm`].
    pub fn set_keeping(
        &self,
        id: &str,
        extend: Option<AutoExtend>,
        limits: VmLimits,
        autostart: bool,
    ) -> Result<(), StateError> {
        let vm = id.to_owned();
        self.change(id, move |connection| {
            connection
                .prepare_cached(
                    "UPDATE vms SET extend_threshold_percent = ?2, extend_increment_gib = ?3, extend_limit_gib = ?4,
                        disk_iops = ?5, disk_mbps = ?6, net_mbps = ?7, autostart = ?8
                    WHERE id = ?1",
                )?
                .execute(params![
                    vm,
                    extend.map(|extend| extend.threshold_percent),
                    extend.map(|extend| extend.increment_gib),
                    extend.map(|extend| extend.limit_gib),
                    limits.disk_iops,
                    limits.disk_mbps,
                    limits.net_mbps,
                    autostart,
                ])
        })
    }

    /// Changes the driver of a VM's machine.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NoSuchVm`].
    pub fn set_vmm(&self, id: &str, vmm: &str) -> Result<(), StateError> {
        let (vm, vmm) = (id.to_owned(), vmm.to_owned());
        self.change(id, move |connection| {
            connection
                .prepare_cached("UPDATE vms SET vmm = ?2 WHERE id = ?1")?
                .execute(params![vm, vmm])
        })
    }

    /// A fact about the host that the state belongs to; `None` when it was never noted.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn fact(&self, fact: Fact) -> Result<Option<String>, StateError> {
        self.read(|connection| {
            let query = "SELECT value FROM facts WHERE key = ?";
            connection.query_row(query, [fact.key()], |row| row.get(0)).optional()
        })
    }

    /// Notes a fact.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn set_fact(&self, fact: Fact, value: &str) -> Result<(), StateError> {
        let value = value.to_owned();
        self.commit(move |connection| {
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", [fact.key(), &value])
        })
        .map(drop)
    }

    /// Removes a VM.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NoSuchVm`].
    pub fn delete(&self, id: &str) -> Result<(), StateError> {
        let vm = id.to_owned();
        self.change(id, move |connection| {
            connection
                .prepare_cached("DELETE FROM vms WHERE id = ?")?
                .execute([&vm])
        })
    }

    /// Makes a change to one VM's row.
    fn change(
        &self,
        id: &str,
        change: impl Fn(&Connection) -> rusqlite::Result<usize> + Send + 'static,
    ) -> Result<(), StateError> {
        match self.commit(change)? {
            0 => Err(StateError::NoSuchVm {
                path: self.path.clone(),
                id: id.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn commit(
        &self,
        change: impl Fn(&Connection) -> rusqlite::Result<usize> + Send + 'static,
    ) -> Result<usize, StateError> {
        if self.is_read_only {
            return Err(StateError::ReadOnly(self.folder.clone()));
        }
        self.commits.commit(Box::new(change)).map_err(StateError::Shared)
    }

    fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StateError> {
        self.commits.read(query)
    }
}

fn failed(path: &Path, source: Arc<rusqlite::Error>) -> StateError {
    if source.sqlite_error_code() == Some(ErrorCode::DiskFull) {
        return StateError::Full(path.parent().unwrap_or(path).to_owned());
    }
    StateError::Database {
        path: path.to_owned(),
        source,
    }
}

/// Opens the file's lock, making it where it is not there; on a read-only or full file system the
/// folder serves.
fn lock_file(folder: &Path) -> io::Result<File> {
    let path = folder.join("lock");
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .or_else(|_| File::open(&path))
        .or_else(|_| File::open(folder))
}

fn is_on_read_only_file_system(folder: &Path) -> io::Result<bool> {
    Ok(statvfs(folder)?.f_flag.contains(StatVfsMountFlags::RDONLY))
}

/// Copies the state file and its log; SQLite cannot read a log beside which it can write nothing.
fn copy_to(folder: &Path, scratch: &Path) -> io::Result<PathBuf> {
    let copy = scratch.join("state-copy.db");
    for suffix in ["", "-wal"] {
        let (from, to) = (format!("state.db{suffix}"), format!("state-copy.db{suffix}"));
        match fs::copy(folder.join(from), scratch.join(&to)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // That of an earlier start belongs to another state.
                let _absent = fs::remove_file(scratch.join(to));
            }
            other => drop(other?),
        }
    }
    Ok(copy)
}

fn connect(path: &Path) -> Result<Connection, StateError> {
    let database = |error| failed(path, Arc::new(error));
    let mut connection = Connection::open(path).map_err(database)?;
    connection
        .execute_batch(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0; PRAGMA temp_store=MEMORY;",
        )
        .map_err(database)?;
    migrate(&mut connection, path)?;
    Ok(connection)
}

fn insert(connection: &Connection, vm: &Record) -> rusqlite::Result<usize> {
    connection
        .prepare_cached(
            "INSERT INTO vms (id, name, template, ssh_public_key, created_at, vcpu_count, mem_size_mib, disk_size_gib,
                guest_ip, ssh_port, status, status_reason,
                extend_threshold_percent, extend_increment_gib, extend_limit_gib,
                disk_iops, disk_mbps, net_mbps, autostart, vmm)
            VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        )?
        .execute(params![
            vm.id,
            vm.name,
            vm.template,
            vm.ssh_public_key,
            vm.created_at,
            vm.vcpu_count,
            vm.mem_size_mib,
            vm.disk_size_gib,
            vm.guest_ip.to_string(),
            vm.ssh_port,
            vm.status.as_str(),
            vm.status_reason,
            vm.auto_extend.map(|extend| extend.threshold_percent),
            vm.auto_extend.map(|extend| extend.increment_gib),
            vm.auto_extend.map(|extend| extend.limit_gib),
            vm.limits.disk_iops,
            vm.limits.disk_mbps,
            vm.limits.net_mbps,
            vm.autostart,
            vm.vmm,
        ])
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StateError> {
    let database = |error| failed(path, Arc::new(error));
    let done: usize = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(database)?;
    if done > MIGRATIONS.len() {
        return Err(StateError::FromTheFuture {
            path: path.to_owned(),
            found: done,
            known: MIGRATIONS.len(),
        });
    }
    for (step, sql) in MIGRATIONS.iter().enumerate().skip(done) {
        let transaction = connection.transaction().map_err(database)?;
        transaction.execute_batch(sql).map_err(database)?;
        transaction
            .pragma_update(None, "user_version", step + 1)
            .map_err(database)?;
        transaction.commit().map_err(database)?;
    }
    Ok(())
}

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let ip: String = row.get("guest_ip")?;
    let status: String = row.get("status")?;
    Ok(Record {
        id: row.get("id")?,
        name: row.get("name")?,
        template: row.get("template")?,
        ssh_public_key: row.get("ssh_public_key")?,
        created_at: row.get("created_at")?,
        vcpu_count: row.get("vcpu_count")?,
        mem_size_mib: row.get("mem_size_mib")?,
        disk_size_gib: row.get("disk_size_gib")?,
        auto_extend: auto_extend(row)?,
        limits: VmLimits {
            disk_iops: row.get("disk_iops")?,
            disk_mbps: row.get("disk_mbps")?,
            net_mbps: row.get("net_mbps")?,
        },
        autostart: row.get("autostart")?,
        vmm: row.get("vmm")?,
        guest_ip: ip.parse().map_err(|_| malformed("guest_ip", &ip))?,
        ssh_port: row.get("ssh_port")?,
        status: status_of(&status).ok_or_else(|| malformed("status", &status))?,
        status_reason: row.get("status_reason")?,
    })
}

fn auto_extend(row: &Row<'_>) -> rusqlite::Result<Option<AutoExtend>> {
    let Some(threshold_percent) = row.get("extend_threshold_percent")? else {
        return Ok(None);
    };
    Ok(Some(AutoExtend {
        threshold_percent,
        increment_gib: row.get("extend_increment_gib")?,
        limit_gib: row.get("extend_limit_gib")?,
    }))
}

fn status_of(word: &str) -> Option<VmStatus> {
    [VmStatus::Running, VmStatus::Stopped, VmStatus::Paused, VmStatus::Failed]
        .into_iter()
        .find(|status| status.as_str() == word)
}

fn malformed(column: &str, value: &str) -> rusqlite::Error {
    let problem = format!("{value:?} in column {column} was not written by this program");
    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, problem.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(n: u16) -> Record {
        Record {
            id: format!("vm-{n:012x}"),
            name: format!("vm-{n}"),
            template: "debian-base".into(),
            ssh_public_key: "ssh-ed25519 AAAA".into(),
            created_at: format!("2026-01-02T03:04:{n:02}Z"),
            vcpu_count: 1,
            mem_size_mib: 512,
            disk_size_gib: 10,
            auto_extend: None,
            limits: VmLimits::default(),
            autostart: true,
            vmm: None,
            guest_ip: Ipv4Addr::new(172, 16, 0, 2 + n as u8),
            ssh_port: 22001 + n,
            status: VmStatus::Running,
            status_reason: None,
        }
    }

    #[test]
    fn what_was_written_is_there_after_a_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path(), folder.path()).unwrap();
        let extend = Some(AutoExtend {
            threshold_percent: 80,
            increment_gib: 5,
            limit_gib: 50,
        });
        let limits = VmLimits {
            disk_iops: Some(500),
            disk_mbps: None,
            net_mbps: Some(100),
        };
        let extending = Record {
            auto_extend: extend,
            limits,
            autostart: false,
            vmm: Some("firecracker".into()),
            ..vm(3)
        };
        state.insert(&vm(1), None).unwrap();
        state.insert(&vm(2), None).unwrap();
        state.insert(&extending, None).unwrap();
        state
            .set_status(&vm(2).id, VmStatus::Failed, Some("its process ended"))
            .unwrap();
        state.delete(&vm(1).id).unwrap();
        drop(state);

        let failed = Record {
            status: VmStatus::Failed,
            status_reason: Some("its process ended".into()),
            ..vm(2)
        };
        let state = State::open(folder.path(), folder.path()).unwrap();
        assert_eq!(state.vms().unwrap(), [failed, extending]);
        state.set_vmm(&vm(2).id, "qemu").unwrap();
        let drivers = State::peek_drivers(folder.path()).unwrap();
        assert_eq!(drivers, [("firecracker".to_owned(), 1), ("qemu".to_owned(), 1)]);
        state.set_keeping(&vm(2).id, extend, limits, false).unwrap();
        state.set_keeping(&vm(3).id, None, VmLimits::default(), true).unwrap();
        drop(state);
        let vms = State::open(folder.path(), folder.path()).unwrap().vms().unwrap();
        let kept = |vm: &Record| (vm.auto_extend, vm.limits, vm.autostart);
        assert_eq!(kept(&vms[0]), (extend, limits, false));
        assert_eq!(kept(&vms[1]), (None, VmLimits::default(), true));
    }

    #[test]
    fn names_addresses_and_ports_are_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path(), folder.path()).unwrap();
        state.insert(&vm(1), None).unwrap();
        for twin in [
            Record {
                name: vm(1).name,
                ..vm(2)
            },
            Record {
                guest_ip: vm(1).guest_ip,
                ..vm(2)
            },
            Record {
                ssh_port: vm(1).ssh_port,
                ..vm(2)
            },
            Record { id: vm(1).id, ..vm(2) },
        ] {
            assert!(state.insert(&twin, None).is_err());
        }
    }

    #[test]
    fn one_process_has_the_state_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let _first = State::open(folder.path(), folder.path()).unwrap();
        assert!(matches!(
            State::open(folder.path(), folder.path()),
            Err(StateError::Locked(_))
        ));
    }

    #[test]
    fn a_state_of_the_first_release_is_read_with_all_its_vms() {
        let folder = tempfile::tempdir().unwrap();
        // As that release left it, to the letter: the first step of the migrations must never
        // change.
        let written = Connection::open(folder.path().join("state.db")).unwrap();
        written
            .execute_batch(include_str!("../tests/data/state-schema-1.sql"))
            .unwrap();
        drop(written);
        let vms = State::open(folder.path(), folder.path()).unwrap().vms().unwrap();
        let failed = Record {
            status: VmStatus::Failed,
            status_reason: Some("its process ended".into()),
            ..vm(2)
        };
        assert_eq!(vms, [vm(1), failed]);
        let state = State::open(folder.path(), folder.path()).unwrap();
        assert_eq!(
            state.fact(Fact::PoolOwner).unwrap().as_deref(),
            Some("0123456789abcdef")
        );
        state.insert(&vm(3), None).unwrap();
        state.delete(&vm(1).id).unwrap();
        assert_eq!(state.vms().unwrap().len(), 2);
    }

    #[test]
    fn a_state_of_a_later_release_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        drop(State::open(folder.path(), folder.path()).unwrap());
        let connection = Connection::open(folder.path().join("state.db")).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);
        assert!(matches!(
            State::open(folder.path(), folder.path()),
            Err(StateError::FromTheFuture { found: 99, .. })
        ));
    }
}
