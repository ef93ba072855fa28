//! The latest measurement of disk usage, and the history of the space used.

use crate::state::Record;
use scalebox_api::StorageUsage;
use scalebox_storage::{PoolUsage, Template, Usage};
use scalebox_units::Bytes;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// The latest measurement, and the history of the space used.
#[derive(Default)]
pub(crate) struct UsageTracker {
    latest: Mutex<Option<Arc<PoolUsage>>>,
    history: Mutex<History>,
}

impl UsageTracker {
    /// Returns the latest measurement; `None` before the first.
    pub(crate) fn latest(&self) -> Option<Arc<PoolUsage>> {
        lock(&self.latest).clone()
    }

    /// Estimates in how many days `free` is used up at the last day's rate; see
    /// [`History::days_left`].
    pub(crate) fn days_left(&self, free: Bytes) -> Option<f64> {
        lock(&self.history).days_left(free)
    }

    /// Adds a measurement, made `since_start` after the daemon's start.
    pub(crate) fn add(&self, accounts: PoolUsage, since_start: Duration) {
        lock(&self.history).add(since_start, accounts.total());
        *lock(&self.latest) = Some(Arc::new(accounts));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The lock is held only for a copy or a push, which do not panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the usage of a VM's disk in the latest measurement.
pub(crate) fn disk_usage(accounts: &PoolUsage, record: &Record) -> Option<StorageUsage> {
    let usage = accounts.disks.get(&record.id)?;
    Some(storage_usage(usage, record.disk_size.bytes(), accounts))
}

/// Returns the usage of a template in the latest measurement.
pub(crate) fn template_usage(accounts: &PoolUsage, template: &Template) -> Option<StorageUsage> {
    let usage = accounts.templates.get(&template.name)?;
    Some(storage_usage(usage, template.size, accounts))
}

/// Combines a measurement with the current provisioned size, which may have grown since.
fn storage_usage(usage: &Usage, provisioned: Bytes, accounts: &PoolUsage) -> StorageUsage {
    StorageUsage {
        provisioned_bytes: provisioned.as_u64(),
        used_bytes: usage.used.as_u64(),
        exclusive_bytes: usage.exclusive.as_u64(),
        measured_at: rfc3339(accounts.measured_at),
    }
}

/// Formats a time in UTC, to the millisecond.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let time = jiff::Timestamp::try_from(time).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{time:.3}")
}

/// The space used during the last day. It is kept in memory, so a restart of the daemon clears it.
#[derive(Default)]
struct History {
    /// Seconds since the start, and bytes used; oldest first.
    samples: VecDeque<(f64, f64)>,
}

impl History {
    /// Minimum time between two samples.
    const MIN_SAMPLE_INTERVAL: Duration = Duration::from_secs(300);
    /// Samples older than this are dropped.
    const MAX_AGE: Duration = Duration::from_secs(24 * 3600);
    /// Minimum history for an estimate: one VM filling its disk is not a trend.
    const MIN_HISTORY: Duration = Duration::from_secs(3600);
    /// Maximum estimate; a longer time is reported as unknown.
    const MAX_DAYS: f64 = 3650.0;

    fn add(&mut self, at: Duration, used: Bytes) {
        let (at, used) = (at.as_secs_f64(), used.as_u64() as f64);
        if self
            .samples
            .back()
            .is_some_and(|(last, _)| at < last + Self::MIN_SAMPLE_INTERVAL.as_secs_f64())
        {
            return;
        }
        self.samples.push_back((at, used));
        while self
            .samples
            .front()
            .is_some_and(|(first, _)| at - first > Self::MAX_AGE.as_secs_f64())
        {
            self.samples.pop_front();
        }
    }

    /// Returns `free ÷ rate`, in days. The rate is the slope of the straight line that best fits
    /// the samples of the last day (least squares):
    ///
    /// ```text
    /// rate = Σ (tᵢ − t̄)(uᵢ − ū) ÷ Σ (tᵢ − t̄)²
    /// ```
    ///
    /// Returns `None` with less than [`History::MIN_HISTORY`] of history, without growth, and
    /// beyond [`History::MAX_DAYS`].
    fn days_left(&self, free: Bytes) -> Option<f64> {
        let (first, last) = (self.samples.front()?.0, self.samples.back()?.0);
        if last - first < Self::MIN_HISTORY.as_secs_f64() {
            return None;
        }
        let count = self.samples.len() as f64;
        let mean_time = self.samples.iter().map(|(time, _)| time).sum::<f64>() / count;
        let mean_used = self.samples.iter().map(|(_, used)| used).sum::<f64>() / count;
        let (mut product, mut square) = (0.0, 0.0);
        for (time, used) in &self.samples {
            product += (time - mean_time) * (used - mean_used);
            square += (time - mean_time).powi(2);
        }
        let bytes_a_day = product / square * 86_400.0;
        let days = free.as_u64() as f64 / bytes_a_day;
        // The result is rounded to tenths of a day; the estimate is no more precise.
        (bytes_a_day > 0.0 && days <= Self::MAX_DAYS).then(|| (days * 10.0).round() / 10.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a history with a sample every five minutes; `used` maps hours to GiB.
    fn history(hours: u64, used: impl Fn(f64) -> f64) -> History {
        let mut history = History::default();
        for at in (0..=hours * 3600).step_by(300) {
            let used = used(at as f64 / 3600.0) * (1u64 << 30) as f64;
            history.add(Duration::from_secs(at), Bytes::new(used as u64));
        }
        history
    }

    fn days(history: &History) -> Option<f64> {
        history.days_left(scalebox_units::Gib::new(48).bytes())
    }

    #[test]
    fn steady_growth_uses_up_the_free_space_at_its_rate() {
        assert_eq!(days(&history(24, |hour| 10.0 + hour)), Some(2.0));
        assert_eq!(days(&history(2, |hour| 10.0 + hour / 10.0)), Some(20.0));
    }

    #[test]
    fn noise_barely_changes_the_estimate() {
        let wavering = history(24, |hour| 10.0 + hour + 0.5 * (hour * 40.0).sin());
        assert!((1.9..=2.1).contains(&days(&wavering).unwrap()));
    }

    #[test]
    fn only_the_last_day_counts() {
        let history = history(72, |hour| {
            if hour < 48.0 {
                hour * 5.0
            } else {
                240.0 + (hour - 48.0) * 2.0
            }
        });
        assert_eq!(days(&history), Some(1.0));
        assert!(history.samples.len() <= 289);
    }

    #[test]
    fn no_estimate_is_given_without_history_without_growth_or_beyond_ten_years() {
        assert_eq!(days(&History::default()), None);
        assert_eq!(days(&history(0, |hour| hour)), None);
        assert_eq!(days(&history(24, |_| 10.0)), None);
        assert_eq!(days(&history(24, |hour| 50.0 - hour)), None);
        assert_eq!(days(&history(24, |hour| 10.0 + hour / 1e4)), None);
        let mut short = History::default();
        for at in [0, 300, 3300] {
            short.add(Duration::from_secs(at), Bytes::new(at));
        }
        assert_eq!(days(&short), None);
    }

    #[test]
    fn samples_are_at_least_five_minutes_apart() {
        let mut history = History::default();
        for at in 0..=600 {
            history.add(Duration::from_secs(at), Bytes::ZERO);
        }
        assert_eq!(history.samples.len(), 3);
    }
}
