//! Shares one flush between concurrent callers.

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};

/// Shares flushes of one file or folder. Callers that arrive during a flush wait for the next one
/// together. A flush costs a round trip to the device whatever its amount of data, so 32 concurrent
/// writers pay for two flushes, not for 32.
#[derive(Debug, Default)]
pub struct GroupSync {
    // A std mutex: held for a few comparisons, never during a flush.
    rounds: Mutex<Rounds>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Rounds {
    begun: u64,
    ended: u64,
    /// The last failed round, and its error. A later successful round does not recover the data of
    /// a failed one.
    failed: Option<(u64, io::ErrorKind, String)>,
}

impl GroupSync {
    /// Returns when a flush that began after this call has ended. Either this caller's `flush` runs
    /// or another caller's; all must flush the same file.
    ///
    /// # Errors
    /// The error of that flush, or of a later one that ended in the meantime.
    pub fn sync(&self, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        // The current flush may have begun before the caller's write: only the next one is certain
        // to include it.
        let mine = rounds.begun + 1;
        while rounds.ended < rounds.begun && rounds.ended < mine {
            rounds = self.ended.wait(rounds).unwrap_or_else(PoisonError::into_inner);
        }
        if rounds.ended < mine {
            rounds.begun += 1;
            drop(rounds);
            let outcome = flush();
            rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
            rounds.ended += 1;
            if let Err(error) = outcome {
                rounds.failed = Some((rounds.ended, error.kind(), error.to_string()));
            }
            self.ended.notify_all();
        }
        match &rounds.failed {
            Some((round, kind, text)) if *round >= mine => Err(io::Error::new(*kind, text.clone())),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc;
    use std::thread;

    /// Checks that every write is flushed when `sync` returns, and that every flush has a waiting
    /// caller.
    #[test]
    fn data_written_before_the_call_is_flushed_when_it_returns() {
        let (group, written, flushed, flushes) = (
            GroupSync::default(),
            AtomicU64::new(0),
            AtomicU64::new(0),
            AtomicU64::new(0),
        );
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let mine = written.fetch_add(1, Ordering::SeqCst) + 1;
                        let flush = || {
                            flushes.fetch_add(1, Ordering::SeqCst);
                            let seen = written.load(Ordering::SeqCst);
                            thread::yield_now();
                            flushed.fetch_max(seen, Ordering::SeqCst);
                            Ok(())
                        };
                        group.sync(flush).unwrap();
                        assert!(flushed.load(Ordering::SeqCst) >= mine);
                    }
                });
            }
        });
        assert!((1..=1600).contains(&flushes.load(Ordering::SeqCst)));
    }

    #[test]
    fn calls_during_a_flush_share_the_next_flush_and_its_error() {
        let group = GroupSync::default();
        let (begun, has_begun) = mpsc::channel();
        let (resume, may_resume) = mpsc::channel::<()>();
        let second = AtomicU64::new(0);
        let fail = || {
            second.fetch_add(1, Ordering::SeqCst);
            Err(io::Error::from(io::ErrorKind::StorageFull))
        };
        thread::scope(|scope| {
            let shared = &group;
            let first = scope.spawn(move || {
                shared.sync(|| {
                    begun.send(()).unwrap();
                    may_resume.recv().map_err(io::Error::other)
                })
            });
            has_begun.recv().unwrap();
            let later: Vec<_> = (0..4).map(|_| scope.spawn(|| group.sync(fail))).collect();
            resume.send(()).unwrap();
            assert!(first.join().unwrap().is_ok());
            for waiter in later {
                let error = waiter.join().unwrap().unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::StorageFull);
            }
        });
        assert!((1..=4).contains(&second.load(Ordering::SeqCst)));
        assert!(group.sync(|| Ok(())).is_ok(), "a later flush is not affected");
    }
}
