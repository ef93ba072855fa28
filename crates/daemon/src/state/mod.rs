//! The state file: the data that must survive a crash of the daemon, in SQLite under `STATE_DIR`.
//!
//! The state is outside the pool, so that a full pool does not stop the daemon. A change has two
//! outcomes: it succeeded and survives a power cut, or it failed and was not made, now and after a
//! restart. All methods block.

mod commits;
mod connection;
mod error;
mod guest_config;
mod keyed_request;
mod renewal;
mod reserve;

use commits::Commits;
use connection::connect;
pub(crate) use error::StateError;
use error::failed;
pub(crate) use guest_config::GuestConfig;
pub(crate) use keyed_request::KeyedRequest;
use reserve::Reserve;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};
use rustix::fs::{StatVfsMountFlags, statvfs};
use scalebox_api::{AutoExtend, IdempotencyKey, VmStatus};
use scalebox_units::{Gib, KernelId, VmId};
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A VM as recorded in the state file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    /// The id, which is also that of its disk and machine.
    pub id: VmId,
    /// The name; unique.
    pub name: String,
    /// The template that the VM's disk was cloned from.
    pub template: String,
    /// The SSH key of the guest's account, if it has one.
    pub ssh_public_key: Option<String>,
    /// The time of creation: RFC 3339, UTC.
    pub created_at: String,
    /// The number of processors.
    pub vcpu_count: u32,
    /// The memory in MiB.
    pub mem_size_mib: u64,
    /// The provisioned size of the disk.
    pub disk_size: Gib,
    /// The auto-extend policy of the disk, if enabled.
    pub auto_extend: Option<AutoExtend>,
    /// The limits on disk and network.
    pub limits: VmLimits,
    /// `true` if the VM is started again after a reboot of the host.
    pub autostart: bool,
    /// The driver of the VM's machine, as in the setting `VMM`. `None` for VMs of releases that did
    /// not record it.
    pub vmm: Option<String>,
    /// The kernel that the VM boots. `None` while there is none, and for VMs of releases that did
    /// not record it until the next start of the daemon.
    pub kernel: Option<KernelId>,
    /// The settings of the guest's commands. Boxed, because most VMs have none.
    pub guest: Option<Box<GuestConfig>>,
    /// The guest's address in `SUBNET`; unique.
    pub guest_ip: Ipv4Addr,
    /// The host port that is forwarded to port 22 of the guest; unique.
    pub ssh_port: u16,
    /// The last known status.
    pub status: VmStatus,
    /// The reason for the status, if there is one.
    pub status_reason: Option<String>,
}

/// Limits on a VM's disk and network; `None` for no limit. Units as in the API.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct VmLimits {
    /// Requests per second.
    pub disk_iops: Option<u64>,
    /// Megabytes per second.
    pub disk_mbps: Option<u64>,
    /// Megabits per second.
    pub net_mbps: Option<u64>,
}

/// Facts that the state records about its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fact {
    /// The owner mark of the pool that belongs to this state.
    PoolOwner,
    /// The boot of the host (`/proc/sys/kernel/random/boot_id`) in which the VMs were last started.
    BootId,
    /// The number of daemon starts with this state.
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

/// The open state file. Only one process can open it at a time.
#[derive(Debug)]
pub(crate) struct State {
    folder: PathBuf,
    path: PathBuf,
    commits: Commits,
    is_read_only: bool,
    _lock: File,
}

impl State {
    /// Opens the state in `folder`, creates it if missing, and migrates it to the current schema.
    ///
    /// On a read-only file system it reads a copy in `scratch` instead, which must be writable, and
    /// every change fails.
    ///
    /// # Errors
    /// [`StateError::Locked`] while another process uses it.
    pub(crate) fn open(folder: &Path, scratch: &Path) -> Result<State, StateError> {
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
            // The name of the new file must survive a power cut too.
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

    /// Returns whether every change fails because `STATE_DIR` was read-only at start.
    pub(crate) fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Reads a fact without taking the lock, even while a daemon runs; `None` if there is no state
    /// yet.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub(crate) fn peek(folder: &Path, fact: Fact) -> Result<Option<String>, StateError> {
        State::peek_with(folder, |connection| {
            let query = "SELECT value FROM facts WHERE key = ?";
            connection.query_row(query, [fact.key()], |row| row.get(0)).optional()
        })
    }

    /// Counts the VMs without taking the lock; 0 if there is no state.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub(crate) fn peek_vms(folder: &Path) -> Result<u64, StateError> {
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

    /// Counts the VMs of each driver without taking the lock; empty if there is no state.
    ///
    /// # Errors
    /// [`StateError::Database`], also if the state was written before drivers were recorded.
    pub(crate) fn peek_drivers(folder: &Path) -> Result<Vec<(String, u64)>, StateError> {
        let query = "SELECT vmm, count(*) FROM vms WHERE vmm IS NOT NULL GROUP BY vmm ORDER BY vmm";
        let counts = State::peek_with(folder, |state| {
            let mut query = state.prepare(query)?;
            let counts = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            counts.collect::<rusqlite::Result<_>>().map(Some)
        })?;
        Ok(counts.unwrap_or_default())
    }

    /// Lists all VMs, oldest first.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub(crate) fn vms(&self) -> Result<Vec<Record>, StateError> {
        self.read(|connection| {
            let mut query = connection.prepare("SELECT * FROM vms ORDER BY created_at, id")?;
            query.query_map([], record)?.collect()
        })
    }

    /// Adds a VM, together with its idempotency key if it has one.
    ///
    /// # Errors
    /// [`StateError::Database`], also if the id, name, address or port is in use.
    pub(crate) fn insert(&self, vm: &Record, keyed: Option<&KeyedRequest>) -> Result<(), StateError> {
        let (vm, keyed) = (vm.clone(), keyed.cloned());
        self.commit(move |connection| {
            if let Some(keyed) = &keyed {
                connection
                    .prepare_cached("INSERT OR REPLACE INTO idempotency_keys VALUES (?, ?, ?)")?
                    .execute(params![keyed.key.as_str(), keyed.digest, vm.id.as_str()])?;
            }
            insert(connection, &vm)
        })
        .map(drop)
    }

    /// Returns the id of the VM created with a key, and the digest of the request that created it.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub(crate) fn created_by(&self, key: &IdempotencyKey) -> Result<Option<(VmId, String)>, StateError> {
        self.read(|connection| {
            let query = "SELECT vm, digest FROM idempotency_keys WHERE key = ? AND vm IN (SELECT id FROM vms)";
            connection
                .query_row(query, [key.as_str()], |row| Ok((vm_id(row, "vm")?, row.get("digest")?)))
                .optional()
        })
    }

    /// Changes a VM's status.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NoSuchVm`].
    pub(crate) fn set_status(&self, id: &VmId, status: VmStatus, reason: Option<&str>) -> Result<(), StateError> {
        let (vm, reason) = (id.to_owned(), reason.map(str::to_owned));
        self.change(id, move |connection| {
            connection
                .prepare_cached("UPDATE vms SET status = ?2, status_reason = ?3 WHERE id = ?1")?
                .execute(params![vm.as_str(), status.as_str(), reason])
        })
    }

    /// Changes the size of a VM's disk, before or after the disk itself is changed.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NoSuchVm`].
    pub(crate) fn set_disk_size(&self, id: &VmId, size: Gib) -> Result<(), StateError> {
        let vm = id.to_owned();
        self.change(id, move |connection| {
            connection
                .prepare_cached("UPDATE vms SET disk_size_gib = ?2 WHERE id = ?1")?
                .execute(params![vm.as_str(), size.as_u64()])
        })
    }

    /// Changes a VM's settings: auto-extend, limits and autostart.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NoSuchVm`].
    pub(crate) fn set_settings(
        &self,
        id: &VmId,
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
                    vm.as_str(),
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
    pub(crate) fn set_vmm(&self, id: &VmId, vmm: &str) -> Result<(), StateError> {
        let (vm, vmm) = (id.to_owned(), vmm.to_owned());
        self.change(id, move |connection| {
            connection
                .prepare_cached("UPDATE vms SET vmm = ?2 WHERE id = ?1")?
                .execute(params![vm.as_str(), vmm])
        })
    }

    /// Changes the kernel that a VM boots.
    ///
    /// # Errors
    /// [`StateError::Database`], [`StateError::NoSuchVm`].
    pub(crate) fn set_kernel(&self, id: &VmId, kernel: &KernelId) -> Result<(), StateError> {
        let (vm, kernel) = (id.to_owned(), kernel.to_string());
        self.change(id, move |connection| {
            connection
                .prepare_cached("UPDATE vms SET kernel = ?2 WHERE id = ?1")?
                .execute(params![vm.as_str(), kernel])
        })
    }

    /// Returns a recorded fact; `None` if it was never recorded.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub(crate) fn fact(&self, fact: Fact) -> Result<Option<String>, StateError> {
        self.read(|connection| {
            let query = "SELECT value FROM facts WHERE key = ?";
            connection.query_row(query, [fact.key()], |row| row.get(0)).optional()
        })
    }

    /// Records a fact.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub(crate) fn set_fact(&self, fact: Fact, value: &str) -> Result<(), StateError> {
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
    pub(crate) fn delete(&self, id: &VmId) -> Result<(), StateError> {
        let vm = id.to_owned();
        self.change(id, move |connection| {
            connection
                .prepare_cached("DELETE FROM vms WHERE id = ?")?
                .execute([vm.as_str()])
        })
    }

    /// Changes one VM's row.
    fn change(
        &self,
        id: &VmId,
        change: impl Fn(&Connection) -> rusqlite::Result<usize> + Send + 'static,
    ) -> Result<(), StateError> {
        match self.commit(change)? {
            0 => Err(StateError::NoSuchVm {
                path: self.path.clone(),
                id: id.to_string(),
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

/// Opens the lock file, creating it if missing. On a read-only or full file system, opens the
/// folder instead.
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

/// Copies the state file and its log: SQLite cannot read a log in a folder that it cannot write to.
fn copy_to(folder: &Path, scratch: &Path) -> io::Result<PathBuf> {
    let copy = scratch.join("state-copy.db");
    for suffix in ["", "-wal"] {
        let (from, to) = (format!("state.db{suffix}"), format!("state-copy.db{suffix}"));
        match fs::copy(folder.join(from), scratch.join(&to)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // The copy of an earlier start belongs to another state.
                let _absent = fs::remove_file(scratch.join(to));
            }
            other => drop(other?),
        }
    }
    Ok(copy)
}

/// The value of the column `ssh_public_key`, which is not null, for a VM without a key.
const NO_KEY: &str = "";

fn insert(connection: &Connection, vm: &Record) -> rusqlite::Result<usize> {
    connection
        .prepare_cached(
            "INSERT INTO vms (id, name, template, ssh_public_key, created_at, vcpu_count, mem_size_mib, disk_size_gib,
                guest_ip, ssh_port, status, status_reason,
                extend_threshold_percent, extend_increment_gib, extend_limit_gib,
                disk_iops, disk_mbps, net_mbps, autostart, vmm, kernel, guest_config)
            VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        )?
        .execute(params![
            vm.id.as_str(),
            vm.name,
            vm.template,
            vm.ssh_public_key.as_deref().unwrap_or(NO_KEY),
            vm.created_at,
            vm.vcpu_count,
            vm.mem_size_mib,
            vm.disk_size.as_u64(),
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
            vm.kernel.as_ref().map(KernelId::as_str),
            guest_json(vm)?,
        ])
}

fn guest_json(vm: &Record) -> rusqlite::Result<Option<String>> {
    let json = vm.guest.as_ref().map(serde_json::to_string).transpose();
    json.map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let ip: String = row.get("guest_ip")?;
    let status: String = row.get("status")?;
    let kernel: Option<String> = row.get("kernel")?;
    let guest: Option<String> = row.get("guest_config")?;
    Ok(Record {
        id: vm_id(row, "id")?,
        name: row.get("name")?,
        template: row.get("template")?,
        ssh_public_key: Some(row.get("ssh_public_key")?).filter(|key| key != NO_KEY),
        created_at: row.get("created_at")?,
        vcpu_count: row.get("vcpu_count")?,
        mem_size_mib: row.get("mem_size_mib")?,
        disk_size: Gib::new(row.get("disk_size_gib")?),
        auto_extend: auto_extend(row)?,
        limits: VmLimits {
            disk_iops: row.get("disk_iops")?,
            disk_mbps: row.get("disk_mbps")?,
            net_mbps: row.get("net_mbps")?,
        },
        autostart: row.get("autostart")?,
        vmm: row.get("vmm")?,
        kernel: match kernel {
            Some(id) => Some(id.parse().map_err(|_| malformed("kernel", &id))?),
            None => None,
        },
        guest: match guest {
            Some(json) => Some(serde_json::from_str(&json).map_err(|_| malformed("guest_config", &json))?),
            None => None,
        },
        guest_ip: ip.parse().map_err(|_| malformed("guest_ip", &ip))?,
        ssh_port: row.get("ssh_port")?,
        status: status_of(&status).ok_or_else(|| malformed("status", &status))?,
        status_reason: row.get("status_reason")?,
    })
}

fn vm_id(row: &Row<'_>, column: &str) -> rusqlite::Result<VmId> {
    let id: String = row.get(column)?;
    id.parse().map_err(|_| malformed(column, &id))
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
    let problem = format!("{value:?} in column {column} is not a valid value");
    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, problem.into())
}

/// Returns a record for tests, with names and addresses that differ by `n`.
#[cfg(test)]
pub(crate) fn example_record(n: u16) -> Record {
    Record {
        id: format!("vm-{n:012x}").parse().unwrap(),
        name: format!("vm-{n}"),
        template: "debian-base".into(),
        ssh_public_key: n.is_multiple_of(2).then(|| "ssh-ed25519 AAAA".into()),
        created_at: format!("2026-01-02T03:04:{n:02}Z"),
        vcpu_count: 1,
        mem_size_mib: 512,
        disk_size: Gib::new(10),
        auto_extend: None,
        limits: VmLimits::default(),
        autostart: true,
        vmm: None,
        kernel: None,
        guest: None,
        guest_ip: Ipv4Addr::new(172, 16, 0, 2 + n as u8),
        ssh_port: 22001 + n,
        status: VmStatus::Running,
        status_reason: None,
    }
}

#[cfg(test)]
mod tests {
    use super::example_record as vm;
    use super::*;
    use scalebox_api::{Init, MainProcess, RestartPolicy};

    #[test]
    fn changes_are_there_after_reopening() {
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
            kernel: Some("0123456789abcdef".parse().unwrap()),
            guest: Some(Box::new(GuestConfig {
                init: Some(Init::Agent),
                env: [("KEY".to_owned(), "va\"lue".to_owned())].into(),
                main: Some(MainProcess {
                    argv: vec!["nginx".into(), "-g".into(), "daemon off;".into()],
                    restart: RestartPolicy::Always,
                }),
                ..GuestConfig::default()
            })),
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
        let kernel = "fedcba9876543210".parse().unwrap();
        state.set_kernel(&vm(2).id, &kernel).unwrap();
        assert_eq!(state.vms().unwrap()[0].kernel, Some(kernel));
        let drivers = State::peek_drivers(folder.path()).unwrap();
        assert_eq!(drivers, [("firecracker".to_owned(), 1), ("qemu".to_owned(), 1)]);
        state.set_settings(&vm(2).id, extend, limits, false).unwrap();
        state.set_settings(&vm(3).id, None, VmLimits::default(), true).unwrap();
        drop(state);
        let vms = State::open(folder.path(), folder.path()).unwrap().vms().unwrap();
        let settings = |vm: &Record| (vm.auto_extend, vm.limits, vm.autostart);
        assert_eq!(settings(&vms[0]), (extend, limits, false));
        assert_eq!(settings(&vms[1]), (None, VmLimits::default(), true));
    }

    #[test]
    fn names_addresses_and_ports_are_unique() {
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
    fn only_one_process_can_open_the_state() {
        let folder = tempfile::tempdir().unwrap();
        let _first = State::open(folder.path(), folder.path()).unwrap();
        assert!(matches!(
            State::open(folder.path(), folder.path()),
            Err(StateError::Locked(_))
        ));
    }

    #[test]
    fn a_state_of_the_first_release_is_migrated_with_all_its_vms() {
        let folder = tempfile::tempdir().unwrap();
        // The statements are exactly those of that release: the first migration must never change.
        let written = Connection::open(folder.path().join("state.db")).unwrap();
        written
            .execute_batch(include_str!("../../tests/data/state-schema-1.sql"))
            .unwrap();
        drop(written);
        let vms = State::open(folder.path(), folder.path()).unwrap().vms().unwrap();
        let failed = Record {
            status: VmStatus::Failed,
            status_reason: Some("its process ended".into()),
            ..vm(2)
        };
        // That release required a key.
        let running = Record {
            ssh_public_key: failed.ssh_public_key.clone(),
            ..vm(1)
        };
        assert_eq!(vms, [running, failed]);
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
    fn a_state_of_a_later_release_is_rejected() {
        let folder = tempfile::tempdir().unwrap();
        drop(State::open(folder.path(), folder.path()).unwrap());
        let connection = Connection::open(folder.path().join("state.db")).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);
        assert!(matches!(
            State::open(folder.path(), folder.path()),
            Err(StateError::LaterSchema { found: 99, .. })
        ));
    }
}
