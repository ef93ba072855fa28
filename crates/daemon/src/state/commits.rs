//! The connection to the state file, and one durable commit for all changes that wait.
//!
//! A change is committed with `synchronous=FULL`: SQLite flushes its write-ahead log before the commit returns, so a
//! change that succeeded survives a power cut (<https://www.sqlite.org/pragma.html#pragma_synchronous>). A flush costs a
//! round trip to the device whatever it carries. Changes that arrive while a commit is under way therefore share the
//! next one, each in a savepoint of its own: a change that fails takes no other with it.
//!
//! A commit that failed is rolled back, but its frames may lie complete in the log, and a later start would take them
//! for committed. They are overwritten by an empty change at once. While that fails too, every change is refused.

use super::reserve::Reserve;
use rusqlite::{Connection, ErrorCode};
use scalebox_fault_points::{crash_point, fault_point};
use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A change of the state: some statements, which return how many rows they changed. It may run twice.
pub(super) type Change = Box<dyn Fn(&Connection) -> rusqlite::Result<usize> + Send>;

/// Why a change was not made. Several changes share one.
pub(super) type Failure = Arc<rusqlite::Error>;

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
    connection: Connection,
    /// A commit failed, and its frames in the log are not overwritten yet.
    is_suspect: bool,
}

impl Commits {
    pub(super) fn new(connection: Connection, reserve: Reserve) -> Commits {
        Commits {
            queue: Mutex::default(),
            ended: Condvar::new(),
            writer: Mutex::new(Writer {
                connection,
                is_suspect: false,
            }),
            reserve,
        }
    }

    /// Makes a change durable and returns how many rows it changed. Blocks for about one flush of the log, two if a
    /// commit is under way.
    ///
    /// # Errors
    /// The failure of the change or of its commit. The change was not made then, now and after a restart.
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
            queue = self.lock_queue();
        }
    }

    /// Runs a query. It sees committed changes only.
    pub(super) fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        query(&self.lock_writer().connection)
    }

    fn lock_queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_writer(&self) -> MutexGuard<'_, Writer> {
        // SQLite rolls back the transaction of a statement that panicked, so the connection is whole.
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
        let panicked = || Err(Arc::new(rusqlite::Error::InvalidQuery));
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
    fn commit(&mut self, changes: &[Change], reserve: &Reserve) -> Vec<Result<usize, Failure>> {
        let failure = match self.try_commit(changes) {
            Ok(outcomes) => return outcomes,
            Err(error) if is_out_of_space(&error) && reserve.release() => match self.try_commit(changes) {
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
    fn try_commit(&mut self, changes: &[Change]) -> rusqlite::Result<Vec<Result<usize, Failure>>> {
        self.mend()?;
        self.transact(changes)
    }

    /// Overwrites what a failed commit left in the log.
    fn mend(&mut self) -> rusqlite::Result<()> {
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
        self.transact(&[empty])?;
        self.is_suspect = false;
        tracing::warn!("a commit to the state file had failed; the file can be written again");
        Ok(())
    }

    fn transact(&mut self, changes: &[Change]) -> rusqlite::Result<Vec<Result<usize, Failure>>> {
        let connection = &self.connection;
        let written = begin(connection)
            .and_then(|()| savepoints(connection, changes))
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
                self.is_suspect = true;
                if !connection.is_autocommit()
                    && let Err(error) = run(connection, "ROLLBACK")
                {
                    tracing::error!(%error, "a failed transaction of the state file cannot be rolled back");
                }
                Err(error)
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
fn savepoints(connection: &Connection, changes: &[Change]) -> rusqlite::Result<Vec<Result<usize, Failure>>> {
    let mut outcomes = Vec::with_capacity(changes.len());
    for change in changes {
        run(connection, "SAVEPOINT change")?;
        let outcome = change(connection);
        match outcome {
            Err(error) if connection.is_autocommit() => return Err(error),
            Err(error) => {
                run(connection, "ROLLBACK TO change")?;
                outcomes.push(Err(Arc::new(error)));
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

/// Whether the disk of the state file is full.
pub(super) fn is_out_of_space(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::DiskFull)
}
