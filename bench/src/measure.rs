//! Measures the duration of operations, sequential or concurrent.

use crate::outcome::Outcome;
use serde::Serialize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Statistics of a series of equal operations.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Samples {
    /// Number of operations.
    pub count: usize,
    /// Number of concurrent clients.
    pub clients: usize,
    /// Median, in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile, in milliseconds.
    pub p99_ms: f64,
    /// Throughput: operations divided by the elapsed time.
    pub per_second: f64,
}

/// Runs `operation` `count` times on `clients` threads. It receives its number, and returns the
/// duration of the part to measure.
pub(crate) fn run(
    count: usize,
    clients: usize,
    operation: impl Fn(usize) -> Outcome<Duration> + Sync,
) -> Outcome<Samples> {
    let next = AtomicUsize::new(0);
    let times = Mutex::new(Vec::with_capacity(count));
    let begun = Instant::now();
    let client = || -> Outcome<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            let time = operation(number)?;
            times.lock().unwrap_or_else(PoisonError::into_inner).push(time);
        }
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        clients.into_iter().try_for_each(|client| {
            client
                .join()
                .unwrap_or_else(|_| Err("a client of the benchmark panicked".into()))
        })
    })?;
    let elapsed = begun.elapsed();
    let mut times = times.into_inner().unwrap_or_else(PoisonError::into_inner);
    times.sort_unstable();
    Ok(Samples {
        count,
        clients,
        p50_ms: milliseconds(percentile(&times, 50)),
        p99_ms: milliseconds(percentile(&times, 99)),
        per_second: count as f64 / elapsed.as_secs_f64(),
    })
}

/// Returns the smallest sample that `percent` of the samples do not exceed (nearest rank); zero
/// without samples.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// Converts to milliseconds, with fractions.
pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Returns the median, in seconds; zero without samples.
pub(crate) fn median_seconds(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    percentile(&times, 50).as_secs_f64()
}

/// Runs `work`; returns its duration and its result.
pub(crate) fn timed<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<(Duration, T)> {
    let begun = Instant::now();
    let done = work()?;
    Ok((begun.elapsed(), done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_by_nearest_rank() {
        let times: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(100));
        assert_eq!(percentile(&times, 99), Duration::from_millis(198));
        assert_eq!(percentile(&times[..1], 99), Duration::from_millis(1));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }

    #[test]
    fn every_operation_runs_once_and_an_error_ends_the_run() {
        let seen = Mutex::new(vec![0; 50]);
        let count = |number: usize| {
            seen.lock().unwrap_or_else(PoisonError::into_inner)[number] += 1;
            Ok(Duration::from_millis(1))
        };
        assert!(run(50, 8, count).is_ok_and(|samples| samples.count == 50));
        assert_eq!(*seen.lock().unwrap_or_else(PoisonError::into_inner), vec![1; 50]);
        assert!(run(5, 2, |_| Err("no".into())).is_err());
    }
}
