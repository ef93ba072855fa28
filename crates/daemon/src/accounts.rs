//! Whose each block of the pool is, measured in the background, and how many days the pool lasts at
//! the rate at which it fills.
//!
//! A measurement walks every extent, so it is made seldom: every `ACCOUNTING_SECONDS`, sooner when
//! a template came or went (admission then counts with less until it is made), and never more than
//! a twentieth of the time. Requests are answered from the last one.

use crate::service::{Service, blocking};
use crate::state::Record;
use scalebox_client::StorageUsage;
use scalebox_storage::{PoolUsage, Template, Usage};
use scalebox_units::{Bytes, Gib, VmId};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// A measurement of one second is followed by nineteen without.
const REST: u32 = 19;
/// How often it is looked whether one is due.
const TICK: Duration = Duration::from_millis(500);

/// The last measurement, and what was used before.
#[derive(Default)]
pub struct Ledger {
    latest: Mutex<Option<Arc<PoolUsage>>>,
    history: Mutex<History>,
}

impl Ledger {
    /// The last measurement; `None` before the first.
    pub fn latest(&self) -> Option<Arc<PoolUsage>> {
        lock(&self.latest).clone()
    }

    /// In how many days `free` is used up at the rate of the last day; see [`History::days_left`].
    pub fn days_left(&self, free: Bytes) -> Option<f64> {
        lock(&self.history).days_left(free)
    }

    fn enter(&self, accounts: PoolUsage, since_start: Duration) {
        lock(&self.history).enter(since_start, accounts.total());
        *lock(&self.latest) = Some(Arc::new(accounts));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Held for a copy or a push.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the last measurement says of a VM's disk.
pub fn disk_usage(accounts: &PoolUsage, record: &Record) -> Option<StorageUsage> {
    let usage = accounts.disks.get(&record.id.parse::<VmId>().ok()?)?;
    Some(told(usage, Gib::new(record.disk_size_gib).bytes(), accounts))
}

/// What the last measurement says of a template.
pub fn template_usage(accounts: &PoolUsage, template: &Template) -> Option<StorageUsage> {
    let usage = accounts.templates.get(&template.name)?;
    Some(told(usage, template.size, accounts))
}

/// `provisioned` as it is now: it may have grown since.
fn told(usage: &Usage, provisioned: Bytes, accounts: &PoolUsage) -> StorageUsage {
    StorageUsage {
        provisioned_bytes: provisioned.as_u64(),
        used_bytes: usage.used.as_u64(),
        exclusive_bytes: usage.exclusive.as_u64(),
        measured_at: rfc3339(accounts.measured_at),
    }
}

/// In UTC, to the millisecond.
pub fn rfc3339(time: SystemTime) -> String {
    let time = jiff::Timestamp::try_from(time).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{time:.3}")
}

/// Measures for as long as it is polled.
pub async fn run(service: Service) -> Infallible {
    let (started, interval) = (Instant::now(), service.inner().settings.accounting_interval);
    loop {
        let begun = Instant::now();
        let pool = Arc::clone(&service.inner().pool);
        match blocking(move || pool.measure()).await {
            Ok(accounts) => {
                tracing::debug!(
                    took_ms = accounts.took.as_millis() as u64,
                    disks = accounts.disks.len(),
                    total_bytes = accounts.total().as_u64(),
                    "the pool's extents were counted"
                );
                service.inner().ledger.enter(accounts, started.elapsed());
            }
            Err(error) => tracing::warn!(%error, "the pool's extents cannot be counted: its accounts are not fresh"),
        }
        let took = begun.elapsed();
        let (earliest, due) = (Instant::now() + took * REST, Instant::now() + interval.max(took * REST));
        loop {
            tokio::time::sleep(TICK).await;
            let now = Instant::now();
            if now >= due || (now >= earliest && service.inner().pool.needs_measuring()) {
                break;
            }
        }
    }
}

/// How much was used, over the last day. In memory: a restart of the daemon begins it anew.
#[derive(Default)]
struct History {
    /// Seconds since the start, and bytes used; oldest first.
    samples: VecDeque<(f64, f64)>,
}

impl History {
    /// Between two samples, at least.
    const INTERVAL: Duration = Duration::from_secs(300);
    /// The rate is that of this time.
    const SPAN: Duration = Duration::from_secs(24 * 3600);
    /// With a history shorter than this nothing is estimated: one VM being filled is no trend.
    const LEAST: Duration = Duration::from_secs(3600);
    /// An estimate beyond this says no more than that there is no hurry.
    const MOST_DAYS: f64 = 3650.0;

    fn enter(&mut self, at: Duration, used: Bytes) {
        let (at, used) = (at.as_secs_f64(), used.as_u64() as f64);
        if self
            .samples
            .back()
            .is_some_and(|(last, _)| at < last + Self::INTERVAL.as_secs_f64())
        {
            return;
        }
        self.samples.push_back((at, used));
        while self
            .samples
            .front()
            .is_some_and(|(first, _)| at - first > Self::SPAN.as_secs_f64())
        {
            self.samples.pop_front();
        }
    }

    /// `free ÷ rate`, in days, where the rate is the slope of the straight line that fits the
    /// samples of the last day best (least squares):
    ///
    /// ```text
    /// rate = Σ (tᵢ − t̄)(uᵢ − ū) ÷ Σ (tᵢ − t̄)²
    /// ```
    ///
    /// `None` with less than [`History::LEAST`] of history, when nothing grows, and beyond
    /// [`History::MOST_DAYS`].
    fn days_left(&self, free: Bytes) -> Option<f64> {
        let (first, last) = (self.samples.front()?.0, self.samples.back()?.0);
        if last - first < Self::LEAST.as_secs_f64() {
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
        // Tenths of a day: more would be made up.
        (bytes_a_day > 0.0 && days <= Self::MOST_DAYS).then(|| (days * 10.0).round() / 10.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Samples every five minutes for so many hours; `used` in GiB from hours.
    fn history(hours: u64, used: impl Fn(f64) -> f64) -> History {
        let mut history = History::default();
        for at in (0..=hours * 3600).step_by(300) {
            let used = used(at as f64 / 3600.0) * (1u64 << 30) as f64;
            history.enter(Duration::from_secs(at), Bytes::new(used as u64));
        }
        history
    }

    fn days(history: &History) -> Option<f64> {
        history.days_left(Gib::new(48).bytes())
    }

    #[test]
    fn what_grows_evenly_lasts_as_long_as_what_is_free_at_that_rate() {
        assert_eq!(days(&history(24, |hour| 10.0 + hour)), Some(2.0));
        assert_eq!(days(&history(2, |hour| 10.0 + hour / 10.0)), Some(20.0));
    }

    #[test]
    fn noise_does_not_change_the_rate_much() {
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
    fn nothing_is_estimated_without_history_without_growth_or_beyond_ten_years() {
        assert_eq!(days(&History::default()), None);
        assert_eq!(days(&history(0, |hour| hour)), None);
        assert_eq!(days(&history(24, |_| 10.0)), None);
        assert_eq!(days(&history(24, |hour| 50.0 - hour)), None);
        assert_eq!(days(&history(24, |hour| 10.0 + hour / 1e4)), None);
        let mut short = History::default();
        for at in [0, 300, 3300] {
            short.enter(Duration::from_secs(at), Bytes::new(at));
        }
        assert_eq!(days(&short), None);
    }

    #[test]
    fn samples_are_no_closer_than_five_minutes() {
        let mut history = History::default();
        for at in 0..=600 {
            history.enter(Duration::from_secs(at), Bytes::ZERO);
        }
        assert_eq!(history.samples.len(), 3);
    }
}
