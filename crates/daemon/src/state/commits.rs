//! The connection to the state file, with one durable commit for all waiting changes.
//!
//! A change is committed with `synchronous=FULL`: SQLite flushes its write-ahead log before the
//! commit returns, so a change that succeeded survives a power cut
//! (<https://www.sqlite.org/pragma.html#pragma_synchronous>). A flush costs a round trip to the
//! device, however much it writes. Therefore the changes that arrive during a commit share the next
//! one. Each has its own savepoint, so that a change that fails does not affect the others.
//!
//! A failed commit is rolled back, but its frames may be complete in the log, where a later start
//! would treat them as committed; and blocks whose write failed cannot be trusted with the next
//! write ([`renewal`](super::renewal)). Therefore the frames are overwritten by an empty change,
//! and the file is replaced by a copy, before the client gets its response. While that fails, every
//! change is rejected.

use crate::state::connection::connect;
use crate::state::error::{StateError, failed};
use crate::state::renewal;
use crate::state::reserve::Reserve;
use rusqlite::Connection;
use scalebox_fault_points::{crash_point, fault_point};
use std::collections::HashMap;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Number of commits after which the log is written to the state file and restarted.
const COMMITS_PER_CHECKPOINT: u32 = 128;

/// A change of the state: statements that return how many rows they changed. It may run twice.
pub(super) type Change = Box<dyn Fn(&Connection) -> rusqlite::Result<usize> + Send>;

/// The error of a change. Changes that were committed together share it.
pub(super) type Failure = Arc<StateError>;

/// The only writer of the state file.
#[derive(Debug)]
pub(super) struct Commits {
    queue: Mutex<Queue>,
    /// Wakes waiting changes when a commit has ended.
    ended: Condvar,
    writer: Mutex<Writer>,
    reserve: Reserve,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<(u64, Change)>,
    outcomes: HashMap<u64, Result<usize, Failure>>,
    next_ticket: u64,
    committing: bool,
}

#[derive(Debug)]
struct Writer {
    folder: PathBuf,
    /// `None` while the state file is being replaced.
    connection: Option<Connection>,
    /// `true` if a write has failed since the file was last replaced.
    is_suspect: bool,
    commits_since_checkpoint: u32,
}

impl Commits {
    pub(super) fn new(folder: &Path, connection: Connection, reserve: Reserve) -> Commits {
        Commits {
            queue: Mutex::default(),
            ended: Condvar::new(),
            writer: Mutex::new(Writer {
                folder: folder.to_owned(),
                connection: Some(connection),
                is_suspect: false,
                commits_since_checkpoint: 0,
            }),
            reserve,
        }
    }

    /// Makes a change durable and returns how many rows it changed. Blocks for one flush of the
    /// log, or two if a commit is in progress.
    ///
    /// # Errors
    /// The failure of the change or of its commit. The change was not made then, now and after a
    /// restart.
    pub(super) fn commit(&self, change: Change) -> Result<usize, Failure> {
        let mut queue = self.lock_queue();
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.waiting.push((ticket, change));
        loop {
            if let Some(outcome) = queue.outcomes.remove(&ticket) {
                return outcome;
            }
            if queue.committing {
                queue = self.ended.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            queue.committing = true;
            let (tickets, changes): (Vec<_>, Vec<_>) = mem::take(&mut queue.waiting).into_iter().unzip();
            drop(queue);
            let mut batch = Batch {
                commits: self,
                tickets,
                outcomes: Vec::new(),
            };
            batch.outcomes = self.lock_writer().commit(&changes, &self.reserve);
            drop(batch);
            self.lock_writer().checkpoint_when_due();
            queue = self.lock_queue();
        }
    }

    /// Runs a query, which sees only committed changes.
    pub(super) fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StateError> {
        let mut writer = self.lock_writer();
        let path = writer.path();
        query(writer.connection()?).map_err(|error| failed(&path, Arc::new(error)))
    }

    fn lock_queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_writer(&self) -> MutexGuard<'_, Writer> {
        // SQLite rolls back the transaction of a statement that panicked, so the connection is
        // consistent.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("waiting", &self.waiting.len()).finish()
    }
}

/// The changes that one thread commits for all. Dropping it, even in a panic, distributes the
/// outcomes.
struct Batch<'c> {
    commits: &'c Commits,
    tickets: Vec<u64>,
    outcomes: Vec<Result<usize, Failure>>,
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let panicked = || Err(Arc::new(StateError::Panicked));
        let outcomes = mem::take(&mut self.outcomes)
            .into_iter()
            .chain(std::iter::repeat_with(panicked));
        let mut queue = self.commits.lock_queue();
        queue.outcomes.extend(self.tickets.drain(..).zip(outcomes));
        queue.committing = false;
        drop(queue);
        self.commits.ended.notify_all();
    }
}

impl Writer {
    fn path(&self) -> PathBuf {
        self.folder.join("state.db")
    }

    fn connection(&mut self) -> Result<&Connection, StateError> {
        if self.connection.is_none() {
            renewal::finish(&self.folder)?;
            self.connection = Some(connect(&self.path())?);
        }
        self.connection.as_ref().ok_or(StateError::Panicked)
    }

    fn commit(&mut self, changes: &[Change], reserve: &Reserve) -> Vec<Result<usize, Failure>> {
        let failure = match self.try_commit(changes) {
            Ok(outcomes) => return outcomes,
            Err(StateError::Full(_)) if reserve.release() => match self.try_commit(changes) {
                Ok(outcomes) => return outcomes,
                Err(error) => error,
            },
            Err(error) => error,
        };
        // The file is repaired before any client receives the failure.
        if let Err(error) = self.repair() {
            tracing::error!(%error, "cannot write the state file: rejecting all changes until that succeeds");
        }
        let failure = Arc::new(failure);
        changes.iter().map(|_| Err(Arc::clone(&failure))).collect()
    }

    /// Commits the changes in one transaction. Returns the outcome of each.
    ///
    /// # Errors
    /// If no change was made.
    fn try_commit(&mut self, changes: &[Change]) -> Result<Vec<Result<usize, Failure>>, StateError> {
        self.repair()?;
        let outcomes = self.transact(changes)?;
        self.commits_since_checkpoint += 1;
        Ok(outcomes)
    }

    /// Replaces the state file by a copy, if a write of it has failed.
    fn repair(&mut self) -> Result<(), StateError> {
        if !self.is_suspect {
            return Ok(());
        }
        let empty: Change = Box::new(|connection| {
            connection.execute(
                "INSERT INTO facts VALUES ('failed_commits', '1')
                ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1",
                [],
            )
        });
        // Overwrites the frames of the failed commit, even if it cannot be flushed.
        let overwritten = self.transact(&[empty]).map(drop);
        tracing::debug!(?overwritten, "overwrote the failed commit in the log");
        let folder = self.folder.clone();
        renewal::renew(&folder, self.connection()?)?;
        if let Some(old) = self.connection.take() {
            renewal::close(old);
        }
        self.connection()?;
        self.is_suspect = false;
        self.commits_since_checkpoint = 0;
        tracing::warn!("replaced the state file by a copy after a failed write: it can be written again");
        Ok(())
    }

    fn transact(&mut self, changes: &[Change]) -> Result<Vec<Result<usize, Failure>>, StateError> {
        let path = self.path();
        let connection = self.connection()?;
        let written = begin(connection)
            .and_then(|()| savepoints(connection, &path, changes))
            .and_then(|outcomes| {
                fault_point("state: changes written").map_err(injected)?;
                run(connection, "COMMIT").map(|()| outcomes)
            });
        match written {
            Ok(outcomes) => {
                crash_point("state: changes committed");
                Ok(outcomes)
            }
            Err(error) => {
                if !connection.is_autocommit()
                    && let Err(error) = run(connection, "ROLLBACK")
                {
                    tracing::error!(%error, "cannot roll back a failed transaction of the state file");
                }
                self.is_suspect = true;
                Err(failed(&path, Arc::new(error)))
            }
        }
    }

    /// Writes the log to the state file. If that fails, the log is kept, and the next change writes
    /// its content to a new file.
    fn checkpoint_when_due(&mut self) {
        if self.commits_since_checkpoint < COMMITS_PER_CHECKPOINT || self.is_suspect {
            return;
        }
        self.commits_since_checkpoint = 0;
        let Some(connection) = &self.connection else { return };
        let written = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        if let Err(error) = written {
            tracing::error!(%error, "cannot write the log to the state file; retrying");
            self.is_suspect = true;
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Closing would hide a failure. The next start reads the frames that stay in the log.
        if let Some(connection) = self.connection.take() {
            let written = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
            if let Err(error) = written {
                tracing::warn!(%error, "cannot write the log to the state file; the next start reads it");
                renewal::close(connection);
            }
        }
    }
}

fn begin(connection: &Connection) -> rusqlite::Result<()> {
    // An earlier rollback may have failed.
    if !connection.is_autocommit() {
        run(connection, "ROLLBACK")?;
    }
    run(connection, "BEGIN IMMEDIATE")
}

/// Makes the changes, each in a savepoint of its own. Returns the outcome of each.
///
/// # Errors
/// If SQLite has rolled back the whole transaction, for example after an I/O error.
fn savepoints(
    connection: &Connection,
    path: &Path,
    changes: &[Change],
) -> rusqlite::Result<Vec<Result<usize, Failure>>> {
    let mut outcomes = Vec::with_capacity(changes.len());
    for change in changes {
        run(connection, "SAVEPOINT change")?;
        let outcome = change(connection);
        match outcome {
            Err(error) if connection.is_autocommit() => return Err(error),
            Err(error) => {
                run(connection, "ROLLBACK TO change")?;
                outcomes.push(Err(Arc::new(failed(path, Arc::new(error)))));
            }
            Ok(changed) => outcomes.push(Ok(changed)),
        }
        run(connection, "RELEASE change")?;
    }
    Ok(outcomes)
}

fn run(connection: &Connection, statement: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(statement)?.execute([]).map(drop)
}

fn injected(error: std::io::Error) -> rusqlite::Error {
    let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR_FSYNC);
    rusqlite::Error::SqliteFailure(code, Some(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::thread;

    fn commits(folder: &Path) -> Commits {
        let connection = connect(&folder.join("state.db")).unwrap();
        Commits::new(folder, connection, Reserve::at(folder))
    }

    fn insert(key: &str) -> Change {
        let key = key.to_owned();
        Box::new(move |connection| connection.execute("INSERT INTO facts VALUES (?, '')", [&key]))
    }

    fn keys(commits: &Commits) -> Vec<String> {
        let query = |connection: &Connection| {
            let mut keys = connection.prepare("SELECT key FROM facts ORDER BY key")?;
            keys.query_map([], |row| row.get(0))?.collect()
        };
        commits.read(query).unwrap()
    }

    #[test]
    fn a_failed_change_does_not_affect_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let commits = commits(folder.path());
        commits.commit(insert("taken")).unwrap();
        let changes = [insert("one"), insert("taken"), insert("two")];
        let outcomes = commits.lock_writer().commit(&changes, &commits.reserve);
        assert_eq!(
            outcomes.iter().map(Result::is_ok).collect::<Vec<_>>(),
            [true, false, true]
        );
        assert_eq!(keys(&commits), ["one", "taken", "two"]);
    }

    #[test]
    fn concurrent_changes_are_all_made() {
        let folder = tempfile::tempdir().unwrap();
        let commits = commits(folder.path());
        let begin = Barrier::new(8);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (commits, begin) = (&commits, &begin);
                scope.spawn(move || {
                    begin.wait();
                    for n in 0..20 {
                        assert_eq!(commits.commit(insert(&format!("{thread}-{n}"))).unwrap(), 1);
                    }
                });
            }
        });
        assert_eq!(keys(&commits).len(), 160);
    }

    #[test]
    fn a_file_that_was_not_closed_is_replaced_by_a_complete_copy() {
        let folder = tempfile::tempdir().unwrap();
        let first = commits(folder.path());
        first.commit(insert("kept")).unwrap();
        // The first one ends like a killed process, which closes nothing.
        std::mem::forget(first);
        assert!(renewal::was_not_closed(folder.path()));
        let before = std::fs::metadata(folder.path().join("state.db")).unwrap();
        let connection = renewal::open(folder.path()).unwrap();
        let after = std::fs::metadata(folder.path().join("state.db")).unwrap();
        assert_ne!(
            std::os::unix::fs::MetadataExt::ino(&before),
            std::os::unix::fs::MetadataExt::ino(&after)
        );
        let reopened = Commits::new(folder.path(), connection, Reserve::at(folder.path()));
        assert_eq!(keys(&reopened), ["kept"]);
        reopened.commit(insert("more")).unwrap();
    }

    #[test]
    fn a_replacement_interrupted_by_a_crash_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        let first = commits(folder.path());
        first.commit(insert("kept")).unwrap();
        renewal::renew(folder.path(), first.lock_writer().connection().unwrap()).unwrap();
        // This change is written to the old file, which no longer counts.
        first.commit(insert("late")).unwrap();
        std::mem::forget(first);
        let connection = renewal::open(folder.path()).unwrap();
        let reopened = Commits::new(folder.path(), connection, Reserve::at(folder.path()));
        assert_eq!(keys(&reopened), ["kept"]);
    }

    #[test]
    fn a_suspect_file_is_replaced_before_the_next_change() {
        let folder = tempfile::tempdir().unwrap();
        let commits = commits(folder.path());
        commits.commit(insert("kept")).unwrap();
        commits.lock_writer().is_suspect = true;
        commits.commit(insert("next")).unwrap();
        assert!(!commits.lock_writer().is_suspect);
        assert_eq!(keys(&commits), ["failed_commits", "kept", "next"]);
    }
}
