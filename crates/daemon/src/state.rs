//! The state file: what the daemon must know after a crash, in SQLite under `STATE_DIR`.
//!
//! It lies outside the pool, so that a full pool does not stop the daemon. A method returns when what it wrote survives a
//! power cut. All methods block.
//!
//! SQLite commits each statement to its write-ahead log (WAL) without flushing it (`synchronous=NORMAL`: the database is whole after a power
//! cut, and what the log holds of flushed commits is there, see <https://www.sqlite.org/pragma.html#pragma_synchronous>). The flush is ours: one
//! `fdatasync` of the log, shared by all who wrote at the same time. SQLite's own would be one for each commit, under its lock, and an `fsync`,
//! which on ext4 also commits the journal for the log's new time of change.

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};
use scalebox_client::{AutoExtend, VmStatus};
use scalebox_storage::GroupSync;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

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
    /// The driver of its machine, as in the setting `VMM`; releases before this column recorded none.
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
    /// SQLite said no.
    #[error("the state file {}: {source}", path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The log could not be flushed: whether what was written survives a power cut is not known.
    #[error("the state file {} could not be flushed: {source}; see the kernel's log for what is wrong with its disk", path.display())]
    Flush {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
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

/// What brings a state file from the schema before to this one; the schema's number is the count of steps done, in
/// `PRAGMA user_version`. Steps are only ever appended.
const MIGRATIONS: [&str; 5] = [
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
    "ALTER TABLE vms ADD COLUMN vmm TEXT",
];

/// The open state file. One process has it at a time.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    connection: Mutex<Connection>,
    /// SQLite's log, open as long as the connection, which keeps the file. No lock of SQLite's lies on it that closing it would drop.
    log: File,
    flushes: GroupSync,
    _lock: File,
}

impl State {
    /// Opens the state in `folder`, making it when it is not there, and brings it to this release's schema.
    ///
    /// # Errors
    /// [`StateError::Locked`] while another process has it.
    pub fn open(folder: &Path) -> Result<State, StateError> {
        let in_folder = |source| StateError::Folder {
            path: folder.to_owned(),
            source,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(in_folder)?;
        let lock = File::create(folder.join("lock")).map_err(in_folder)?;
        if !scalebox_storage::lock_for_one_program(&lock).map_err(in_folder)? {
            return Err(StateError::Locked(folder.to_owned()));
        }
        let path = folder.join("state.db");
        let database = |source| StateError::Database {
            path: path.clone(),
            source,
        };
        let mut connection = Connection::open(&path).map_err(database)?;
        connection
            .execute_batch("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;")
            .map_err(database)?;
        migrate(&mut connection, &path)?;
        // Makes the log if there was nothing to migrate: SQLite makes it with the first statement that looks at the data.
        connection
            .query_row("SELECT count(*) FROM facts", [], |row| row.get::<_, i64>(0))
            .map_err(database)?;
        let log = File::open(folder.join("state.db-wal")).map_err(in_folder)?;
        let state = State {
            path: path.clone(),
            connection: Mutex::new(connection),
            log,
            flushes: GroupSync::default(),
            _lock: lock,
        };
        state.flush()?;
        // The file's own name must survive a power cut too.
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(in_folder)?;
        Ok(state)
    }

    /// Reads a fact without taking the state, also while a daemon has it; `None` also when there is no state yet.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn peek(folder: &Path, fact: Fact) -> Result<Option<String>, StateError> {
        let query = "SELECT value FROM facts WHERE key = ?";
        let value = peek(folder, |state| {
            state.query_row(query, [fact.key()], |row| row.get(0)).optional()
        })?;
        Ok(value.flatten())
    }

    /// Counts the VMs of each driver without taking the state; none also when there is no state yet.
    ///
    /// # Errors
    /// [`StateError::Database`], also for a state of a release that recorded no drivers.
    pub fn peek_drivers(folder: &Path) -> Result<Vec<(String, u64)>, StateError> {
        let query = "SELECT vmm, count(*) FROM vms WHERE vmm IS NOT NULL GROUP BY vmm ORDER BY vmm";
        let counts = peek(folder, |state| {
            let mut query = state.prepare(query)?;
            let counts = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            counts.collect()
        })?;
        Ok(counts.unwrap_or_default())
    }

    /// All VMs, oldest first.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn vms(&self) -> Result<Vec<Record>, StateError> {
        self.run(|connection| {
            let mut query = connection.prepare("SELECT * FROM vms ORDER BY created_at, id")?;
            query.query_map([], record)?.collect()
        })
    }

    /// Adds a VM.
    ///
    /// # Errors
    /// [`StateError::Database`], also when its id, name, address or port is taken.
    pub fn insert(&self, vm: &Record) -> Result<(), StateError> {
        self.run(|connection| {
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
                .map(drop)
        })?;
        // A VM that nobody is told of must not be there either.
        self.flush().inspect_err(|_| {
            if let Err(error) = self.delete(&vm.id) {
                tracing::error!(vm = vm.id, %error, "its record could not be taken back");
            }
        })
    }

    /// Changes what a VM is known to do. One that is gone is not made anew.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn set_status(&self, id: &str, status: VmStatus, reason: Option<&str>) -> Result<(), StateError> {
        self.with(|connection| {
            connection
                .prepare_cached("UPDATE vms SET status = ?2, status_reason = ?3 WHERE id = ?1")?
                .execute(params![id, status.as_str(), reason])
                .map(drop)
        })
    }

    /// Changes the size a VM's disk has, or is about to have.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn set_disk_size(&self, id: &str, disk_size_gib: u64) -> Result<(), StateError> {
        self.with(|connection| {
            connection
                .prepare_cached("UPDATE vms SET disk_size_gib = ?2 WHERE id = ?1")?
                .execute(params![id, disk_size_gib])
                .map(drop)
        })
    }

    /// Changes how a VM is kept: how its disk extends itself, what it may take, whether it is started again.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn set_keeping(
        &self,
        id: &str,
        extend: Option<AutoExtend>,
        limits: VmLimits,
        autostart: bool,
    ) -> Result<(), StateError> {
        self.with(|connection| {
            connection
                .prepare_cached(
                    "UPDATE vms SET extend_threshold_percent = ?2, extend_increment_gib = ?3, extend_limit_gib = ?4,
                        disk_iops = ?5, disk_mbps = ?6, net_mbps = ?7, autostart = ?8
                    WHERE id = ?1",
                )?
                .execute(params![
                    id,
                    extend.map(|extend| extend.threshold_percent),
                    extend.map(|extend| extend.increment_gib),
                    extend.map(|extend| extend.limit_gib),
                    limits.disk_iops,
                    limits.disk_mbps,
                    limits.net_mbps,
                    autostart,
                ])
                .map(drop)
        })
    }

    /// Changes the driver of a VM's machine.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn set_vmm(&self, id: &str, vmm: &str) -> Result<(), StateError> {
        self.with(|connection| {
            connection
                .prepare_cached("UPDATE vms SET vmm = ?2 WHERE id = ?1")?
                .execute(params![id, vmm])
                .map(drop)
        })
    }

    /// A fact about the host that the state belongs to; `None` when it was never noted.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn fact(&self, fact: Fact) -> Result<Option<String>, StateError> {
        self.run(|connection| {
            let query = "SELECT value FROM facts WHERE key = ?";
            connection.query_row(query, [fact.key()], |row| row.get(0)).optional()
        })
    }

    /// Notes a fact.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn set_fact(&self, fact: Fact, value: &str) -> Result<(), StateError> {
        self.with(|connection| {
            connection
                .execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", [fact.key(), value])
                .map(drop)
        })
    }

    /// Removes a VM. Returns whether it was there.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn delete(&self, id: &str) -> Result<bool, StateError> {
        self.with(|connection| {
            let there: Option<String> = connection
                .query_row("DELETE FROM vms WHERE id = ? RETURNING id", [id], |row| row.get(0))
                .optional()?;
            Ok(there.is_some())
        })
    }

    /// Runs statements, and returns when what they wrote is flushed.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StateError> {
        let done = self.run(work)?;
        self.flush().map(|()| done)
    }

    fn run<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StateError> {
        work(&self.lock()).map_err(|source| StateError::Database {
            path: self.path.clone(),
            source,
        })
    }

    /// Makes what was committed until now survive a power cut.
    fn flush(&self) -> Result<(), StateError> {
        self.flushes
            .sync(|| self.log.sync_data())
            .map_err(|source| StateError::Flush {
                path: self.path.clone(),
                source,
            })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A statement that panicked was rolled back by SQLite; the connection is whole.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks a state that a daemon may have open; `None` when there is none.
fn peek<T>(folder: &Path, ask: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<Option<T>, StateError> {
    let path = folder.join("state.db");
    if !path.exists() {
        return Ok(None);
    }
    let asked = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY).and_then(|state| ask(&state));
    asked.map(Some).map_err(|source| StateError::Database {
        path: path.clone(),
        source,
    })
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StateError> {
    let database = |source| StateError::Database {
        path: path.to_owned(),
        source,
    };
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
        let state = State::open(folder.path()).unwrap();
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
        state.insert(&vm(1)).unwrap();
        state.insert(&vm(2)).unwrap();
        state.insert(&extending).unwrap();
        state
            .set_status(&vm(2).id, VmStatus::Failed, Some("its process ended"))
            .unwrap();
        assert!(state.delete(&vm(1).id).unwrap());
        assert!(!state.delete(&vm(1).id).unwrap());
        drop(state);

        let failed = Record {
            status: VmStatus::Failed,
            status_reason: Some("its process ended".into()),
            ..vm(2)
        };
        let state = State::open(folder.path()).unwrap();
        assert_eq!(state.vms().unwrap(), [failed, extending]);
        state.set_vmm(&vm(2).id, "qemu").unwrap();
        let drivers = State::peek_drivers(folder.path()).unwrap();
        assert_eq!(drivers, [("firecracker".to_owned(), 1), ("qemu".to_owned(), 1)]);
        state.set_keeping(&vm(2).id, extend, limits, false).unwrap();
        state.set_keeping(&vm(3).id, None, VmLimits::default(), true).unwrap();
        drop(state);
        let vms = State::open(folder.path()).unwrap().vms().unwrap();
        let kept = |vm: &Record| (vm.auto_extend, vm.limits, vm.autostart);
        assert_eq!(kept(&vms[0]), (extend, limits, false));
        assert_eq!(kept(&vms[1]), (None, VmLimits::default(), true));
    }

    #[test]
    fn names_addresses_and_ports_are_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        state.insert(&vm(1)).unwrap();
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
            assert!(state.insert(&twin).is_err());
        }
    }

    #[test]
    fn one_process_has_the_state_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let _first = State::open(folder.path()).unwrap();
        assert!(matches!(State::open(folder.path()), Err(StateError::Locked(_))));
    }

    #[test]
    fn a_state_of_the_first_release_is_read_with_all_its_vms() {
        let folder = tempfile::tempdir().unwrap();
        // As that release left it, to the letter: the first step of the migrations must never change.
        let written = Connection::open(folder.path().join("state.db")).unwrap();
        written
            .execute_batch(include_str!("../tests/data/state-schema-1.sql"))
            .unwrap();
        drop(written);
        let vms = State::open(folder.path()).unwrap().vms().unwrap();
        let failed = Record {
            status: VmStatus::Failed,
            status_reason: Some("its process ended".into()),
            ..vm(2)
        };
        assert_eq!(vms, [vm(1), failed]);
        let state = State::open(folder.path()).unwrap();
        assert_eq!(
            state.fact(Fact::PoolOwner).unwrap().as_deref(),
            Some("0123456789abcdef")
        );
        state.insert(&vm(3)).unwrap();
        assert!(state.delete(&vm(1).id).unwrap());
        assert_eq!(state.vms().unwrap().len(), 2);
    }

    #[test]
    fn a_state_of_a_later_release_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        drop(State::open(folder.path()).unwrap());
        let connection = Connection::open(folder.path().join("state.db")).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);
        assert!(matches!(
            State::open(folder.path()),
            Err(StateError::FromTheFuture { found: 99, .. })
        ));
    }
}
