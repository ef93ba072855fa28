//! Opening the SQLite file, and migrating it to the current schema.

use crate::state::error::{StateError, failed};
use rusqlite::Connection;
use std::path::Path;
use std::sync::Arc;

/// The steps that migrate a state file to the current schema, one per schema version. The version
/// is the number of completed steps, in `PRAGMA user_version`. Steps are only ever appended.
pub(super) const MIGRATIONS: [&str; 8] = [
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
    // The three columns are set together or not at all.
    "ALTER TABLE vms ADD COLUMN extend_threshold_percent INTEGER;
    ALTER TABLE vms ADD COLUMN extend_increment_gib INTEGER;
    ALTER TABLE vms ADD COLUMN extend_limit_gib INTEGER",
    "ALTER TABLE vms ADD COLUMN disk_iops INTEGER;
    ALTER TABLE vms ADD COLUMN disk_mbps INTEGER;
    ALTER TABLE vms ADD COLUMN net_mbps INTEGER;
    ALTER TABLE vms ADD COLUMN autostart INTEGER NOT NULL DEFAULT 1",
    // Earlier releases wrote keys before their VMs; a crash in between left keys without a VM.
    "DELETE FROM idempotency_keys WHERE vm NOT IN (SELECT id FROM vms)",
    "ALTER TABLE vms ADD COLUMN vmm TEXT",
    "ALTER TABLE vms ADD COLUMN kernel TEXT",
    // JSON; null for VMs without settings.
    "ALTER TABLE vms ADD COLUMN guest_config TEXT",
];

/// Opens the file and migrates it.
///
/// # Errors
/// [`StateError`], for example if a later release has written the file.
pub(super) fn connect(path: &Path) -> Result<Connection, StateError> {
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

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StateError> {
    let database = |error| failed(path, Arc::new(error));
    let done: usize = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(database)?;
    if done > MIGRATIONS.len() {
        return Err(StateError::LaterSchema {
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
