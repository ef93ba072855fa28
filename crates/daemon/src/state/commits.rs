//! The connection to the state file, and one durable commit for all changes that wait.
//!
//! A change is committed with `synchronous=FULL`: SQLite flushes its write-ahead log before the
//! commit returns, so a change that succeeded survives a power cut
//! (<https://www.sqlite.org/pragma.html#pragma_synchronous>). A flush costs a round trip to the
//! device whatever it carries. Changes that arrive while a commit is under way therefore share the
//! next one, each in a savepoint of its own: a change that fails takes no other with it.
//!
//! A commit that failed is rolled back, but its frames may lie complete in the log, where a later
//! start would take them for committed; and blocks that refused a write cannot be trusted with the
//! next ([`renewal`](super::renewal)). So the frames are overwritten by an empty change, and the
//! file is replaced by a fresh copy, before the client is answered. While that fails, every change
//! is refused.

use super::renewal;
use super::reserve::Reserve;
use super::{StateError, connect, failed};
use rusqlite::Connection;
use scalebox_fault_points::{crash_point, fault_point};
use std::collections::HashMap;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// After so many commits the log is written to the state file, and begins anew.
const COMMITS_PER_CHECKPOINT: u32 = 128;

/// A change of the state: some statements, which return how many rows they changed. It may run
/// twice.
pub(super) type Change = Box<dyn Fn(&Connection) -> rusqlite::Result<usize> + Send>;

/// Why a change was not made. Several changes share one.
pub(super) type Failure = Arc<StateError>;

/// The only writer of the state file.
#[derive(Debug)]
pub(super) struct Commits {
    queue: Mutex<Queue>,
    /// Notified when a commit has ended.
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
    /// A write has failed, and the file is not replaced yet.
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

    /// Makes a change durable and returns how many rows it changed. Blocks for about one flush of
    /// the log, two if a commit is under way.
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
            let mut turn = Turn {
                commits: self,
                tickets,
                outcomes: Vec::new(),
            };
            turn.outcomes = self.lock_writer().commit(&changes, &self.reserve);
            drop(turn);
            self.lock_writer().checkpoint_when_due();
            queue = self.lock_queue();
        }
    }

    /// Runs a query. It sees committed changes only.
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
        // whole.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("waiting", &self.waiting.len()).finish()
    }
}

/// One thread's turn to commit for all. Dropped, also by a panic, it hands out the outcomes.
struct Turn<'c> {
    commits: &'c Commits,
    tickets: Vec<u64>,
    outcomes: Vec<Result<usize, Failure>>,
}

impl Drop for Turn<'_> {
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
        // At once, so that it is done before any client is told of the failure.
        if let Err(error) = self.mend() {
            tracing::error!(%error, "the state file cannot be written: changes are refused until it can");
        }
        let failure = Arc::new(failure);
        changes.iter().map(|_| Err(Arc::clone(&failure))).collect()
    }

    /// # Errors
    /// When nothing of any change was made.
    fn try_commit(&mut self, changes: &[Change]) -> Result<Vec<Result<usize, Failure>>, StateError> {
        self.mend()?;
        let outcomes = self.transact(changes)?;
        self.commits_since_checkpoint += 1;
        Ok(outcomes)
    }

    /// Makes the state file one to be trusted again, after a write of it has failed.
    fn mend(&mut self) -> Result<(), StateError> {
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
        // Its frames take the place of the failed commit's, also where they cannot be flushed.
        let overwritten = self.transact(&[empty]).map(drop);
        tracing::debug!(?overwritten, "what the failed commit left in the log");
        let folder = self.folder.clone();
        renewal::renew(&folder, self.connection()?)?;
        if let Some(old) = self.connection.take() {
            renewal::close(old);
        }
        self.connection()?;
        self.is_suspect = false;
        self.commits_since_checkpoint = 0;
        tracing::warn!(
            "a write of the state file had failed: the file was replaced by a fresh copy and can be written again"
        );
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
                    tracing::error!(%error, "a failed transaction of the state file cannot be rolled back");
                }
                self.is_suspect = true;
                Err(failed(&path, Arc::new(error)))
            }
        }
    }

    /// Writes the log to the state file. What fails here is in the log, and is written to a fresh
    /// file with the next change.
    fn checkpoint_when_due(&mut self) {
        if self.commits_since_checkpoint < COMMITS_PER_CHECKPOINT || self.is_suspect {
            return;
        }
        self.commits_since_checkpoint = 0;
        let Some(connection) = &self.connection else { return };
        let written = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        if let Err(error) = written {
            tracing::error!(%error, "the log of the state file cannot be written to it; trying again");
            self.is_suspect = true;
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Closing would hide a failure; what stays in the log is read at the next start.
        if let Some(connection) = self.connection.take() {
            let written = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
            if let Err(error) = written {
                tracing::warn!(%error, "the log of the state file stays beside it");
                renewal::close(connection);
            }
        }
    }
}

fn begin(connection: &Connection) -> rusqlite::Result<()> {
    // What an earlier rollback could not end.
    if !connection.is_autocommit() {
        run(connection, "ROLLBACK")?;
    }
    run(connection, "BEGIN IMMEDIATE")
}

/// # Errors
/// When SQLite has rolled the whole transaction back, as after an I/O error.
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

    fn note(key: &str) -> Change {
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
    fn a_change_that_fails_takes_no_other_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let commits = commits(folder.path());
        commits.commit(note("taken")).unwrap();
        let changes = [note("one"), note("taken"), note("two")];
        let outcomes = commits.lock_writer().commit(&changes, &commits.reserve);
        assert_eq!(
            outcomes.iter().map(Result::is_ok).collect::<Vec<_>>(),
            [true, false, true]
        );
        assert_eq!(keys(&commits), ["one", "taken", "two"]);
    }

    #[test]
    fn changes_of_many_threads_are_all_made() {
        let folder = tempfile::tempdir().unwrap();
        let commits = commits(folder.path());
        let begin = Barrier::new(8);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (commits, begin) = (&commits, &begin);
                scope.spawn(move || {
                    begin.wait();
                    for n in 0..20 {
                        assert_eq!(commits.commit(note(&format!("{thread}-{n}"))).unwrap(), 1);
                    }
                });
            }
        });
        assert_eq!(keys(&commits).len(), 160);
    }

    #[test]
    fn a_file_that_was_left_open_is_replaced_by_a_whole_copy() {
        let folder = tempfile::tempdir().unwrap();
        let first = commits(folder.path());
        first.commit(note("kept")).unwrap();
        // As a process that is killed: nothing is closed.
        std::mem::forget(first);
        assert!(renewal::was_left_open(folder.path()));
        let before = std::fs::metadata(folder.path().join("state.db")).unwrap();
        let connection = renewal::open(folder.path()).unwrap();
        let behind = std::fs::metadata(folder.path().join("state.db")).unwrap();
        assert_ne!(
            std::os::unix::fs::MetadataExt::ino(&before),
            std::os::unix::fs::MetadataExt::ino(&behind)
        );
        let again = Commits::new(folder.path(), connection, Reserve::at(folder.path()));
        assert_eq!(keys(&again), ["kept"]);
        again.commit(note("more")).unwrap();
    }

    #[test]
    fn a_replacement_that_a_crash_interrupted_is_put_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let first = commits(folder.path());
        first.commit(note("kept")).unwrap();
        renewal::renew(folder.path(), first.lock_writer().connection().unwrap()).unwrap();
        // Written to the file that counts no more.
        first.commit(note("late")).unwrap();
        std::mem::forget(first);
        let connection = renewal::open(folder.path()).unwrap();
        let again = Commits::new(folder.path(), connection, Reserve::at(folder.path()));
        assert_eq!(keys(&again), ["kept"]);
    }

    #[test]
    fn a_suspect_file_is_replaced_before_the_next_change() {
        let folder = tempfile::tempdir().unwrap();
        let commits = commits(folder.path());
        commits.commit(note("kept")).unwrap();
        commits.lock_writer().is_suspect = true;
        commits.commit(note("next")).unwrap();
        assert!(!commits.lock_writer().is_suspect);
        assert_eq!(keys(&commits), ["failed_commits", "kept", "next"]);
    }
}
