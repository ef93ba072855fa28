//! Events for `GET /events`.
//!
//! The last [`MAX_EVENTS`] events are kept in memory, for a client that reconnects
//! (`Last-Event-ID`) or connects later (`since`). Ids increase and are never reused, even after a
//! restart or a crash: each start of the daemon is counted in the state file, and its ids begin at
//! count × [`IDS_PER_START`]. Events of earlier starts are gone; a client that requests older
//! events first receives `missed`. An event is published after its change is durable, and a crash
//! at that moment may lose it: the state is authoritative, events announce that it changed.
//!
//! To publish an event: `service.events.publish(EventKind::Grown, Some(&record),
//! json!({"to_gib": 8}))`. A new kind is one line in `crates/api/src/events.rs`, with the names
//! of its details.

use crate::state::{Fact, Record, State, StateError};
use scalebox_api::{Event, EventKind, EventVm};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Limit on kept events: a few minutes of a busy host, in one or two megabytes.
const MAX_EVENTS: usize = 4096;
/// Number of ids for each start: more than a daemon publishes in its lifetime. Nine million starts
/// stay below 2⁵³, above which JavaScript numbers have gaps.
const IDS_PER_START: u64 = 1_000_000_000;

/// The events since this start of the daemon.
pub(crate) struct Events {
    /// The lock is held for a push or a copy, never across an await.
    ring: Mutex<Ring>,
    /// Wakes followers for a new event, and for the end of the stream.
    latest: watch::Sender<Latest>,
}

struct Ring {
    events: VecDeque<Arc<Event>>,
    /// The last id; initially one below the first id of this start.
    last: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Latest {
    last: u64,
    ended: bool,
}

impl Events {
    /// Begins the events of one start of the daemon and counts it in `state`. Blocks.
    ///
    /// A start that cannot be counted, because the disk is full or read-only, uses ids from the
    /// second half of its range, chosen by the clock, so that they differ from those of the next
    /// start.
    ///
    /// # Errors
    /// [`StateError`] if the state cannot be read.
    pub(crate) fn begin(state: &State) -> Result<Events, StateError> {
        // A value that is not a number was not written by us. Ids then start over, and a client
        // with an old id receives `missed`.
        let starts = state.fact(Fact::Starts)?.and_then(|count| count.parse::<u64>().ok());
        let start = starts.unwrap_or(0) + 1;
        let first = start * IDS_PER_START;
        match state.set_fact(Fact::Starts, &start.to_string()) {
            Ok(()) => Ok(Events::from(first)),
            Err(error) => {
                tracing::warn!(%error, "cannot count this start in the state file");
                let half = IDS_PER_START / 2;
                let seconds = jiff::Timestamp::now().as_second().unsigned_abs();
                Ok(Events::from(first + half + seconds % half))
            }
        }
    }

    fn from(base: u64) -> Events {
        let ring = Ring {
            events: VecDeque::new(),
            last: base,
        };
        Events {
            ring: Mutex::new(ring),
            latest: watch::Sender::new(Latest {
                last: base,
                ended: false,
            }),
        }
    }

    /// Publishes an event of a VM or of the host. `details` is an object or [`Value::Null`].
    pub(crate) fn publish(&self, kind: EventKind, vm: Option<&Record>, details: Value) {
        let vm = vm.map(|record| EventVm {
            id: record.id.to_string(),
            name: record.name.clone(),
        });
        let mut ring = self.lock();
        ring.last += 1;
        let event = event(ring.last, kind, vm, details);
        if ring.events.len() == MAX_EVENTS {
            ring.events.pop_front();
        }
        ring.events.push_back(Arc::new(event));
        let last = ring.last;
        // The id is sent under the lock, so that followers receive events in order.
        self.latest.send_modify(|latest| latest.last = last);
    }

    /// Counts the events since the start.
    pub(crate) fn count(&self) -> u64 {
        self.lock().last % IDS_PER_START
    }

    /// Ends all streams, after followers have received the events so far.
    pub(crate) fn end(&self) {
        self.latest.send_modify(|latest| latest.ended = true);
    }

    /// Subscribes to the events after `since`: new events only if `None`, all kept events if 0.
    pub(crate) fn subscribe(self: &Arc<Self>, since: Option<u64>, follow: bool) -> Subscription {
        let ring = self.lock();
        Subscription {
            seen: match since {
                None => ring.last,
                // All kept events, without `missed`.
                Some(0) => ring.events.front().map_or(ring.last, |first| first.id - 1),
                Some(id) => id,
            },
            waiting: VecDeque::new(),
            follow,
            latest: self.latest.subscribe(),
            events: Arc::clone(self),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// Returns the events after `seen`, preceded by `missed` if some of them are gone.
    fn after(&self, seen: u64) -> VecDeque<Arc<Event>> {
        let kept_from = self.events.front().map_or(self.last, |first| first.id - 1);
        // An id above all of ours comes from a daemon with another state.
        let known = (kept_from..=self.last).contains(&seen);
        let from = if known { seen } else { kept_from };
        let events = self.events.iter().filter(|event| event.id > from).cloned();
        let missed = (!known).then(|| {
            // The id of `missed` directly precedes the next event, so that a client that reconnects
            // with it continues there.
            Arc::new(event(from, EventKind::Missed, None, json!({ "since": seen })))
        });
        missed.into_iter().chain(events).collect()
    }
}

fn event(id: u64, kind: EventKind, vm: Option<EventVm>, details: Value) -> Event {
    Event {
        id,
        at: format!("{:.3}", jiff::Timestamp::now()),
        kind,
        vm,
        details: match details {
            Value::Object(details) => details,
            Value::Null => Map::new(),
            other => Map::from_iter([("value".to_owned(), other)]),
        },
    }
}

/// A client's position in the events.
pub(crate) struct Subscription {
    events: Arc<Events>,
    latest: watch::Receiver<Latest>,
    seen: u64,
    waiting: VecDeque<Arc<Event>>,
    follow: bool,
}

impl Subscription {
    /// Returns the id to reconnect with: that of the last received event, or the one before the
    /// first.
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// Returns the next event, waiting for it when following; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<Arc<Event>> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                self.seen = event.id;
                return Some(event);
            }
            // The latest id is marked as seen before the check, so that an event in between wakes
            // the next wait.
            let latest = *self.latest.borrow_and_update();
            self.waiting = self.events.lock().after(self.seen);
            if self.waiting.is_empty() && (!self.follow || latest.ended || self.latest.changed().await.is_err()) {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(events: &Events, count: usize) {
        for _ in 0..count {
            events.publish(EventKind::PoolGrown, None, Value::Null);
        }
    }

    async fn received(events: &Arc<Events>, since: Option<u64>) -> Vec<(u64, EventKind)> {
        let mut subscription = events.subscribe(since, false);
        let mut received = Vec::new();
        while let Some(event) = subscription.next().await {
            received.push((event.id, event.kind.clone()));
        }
        received
    }

    #[tokio::test]
    async fn a_reconnecting_client_receives_the_events_since_then_and_whether_some_are_missing() {
        let grown = |id| (id, EventKind::PoolGrown);
        let missed = |id| (id, EventKind::Missed);
        let events = Arc::new(Events::from(100));
        assert_eq!(received(&events, Some(100)).await, []);
        assert_eq!(received(&events, Some(50)).await, [missed(100)]);
        publish(&events, 3);
        assert_eq!(received(&events, Some(101)).await, [grown(102), grown(103)]);
        assert_eq!(received(&events, Some(103)).await, []);
        assert_eq!(received(&events, None).await, []);
        let all = [grown(101), grown(102), grown(103)];
        assert_eq!(received(&events, Some(0)).await, all);
        for other in [99, 104] {
            assert_eq!(
                received(&events, Some(other)).await,
                [&[missed(100)][..], &all].concat()
            );
        }
        publish(&events, MAX_EVENTS);
        let late = received(&events, Some(101)).await;
        assert_eq!(
            (late.len(), &late[..2]),
            (MAX_EVENTS + 1, &[missed(103), grown(104)][..])
        );
        assert_eq!(received(&events, Some(0)).await.len(), MAX_EVENTS);
    }

    #[tokio::test]
    async fn a_follower_waits_for_events_and_receives_the_last_one_before_the_end() {
        let events = Arc::new(Events::from(0));
        let mut follower = events.subscribe(None, true);
        let (first, ()) = tokio::join!(follower.next(), async { publish(&events, 1) });
        assert_eq!(first.map(|event| event.id), Some(1));
        publish(&events, 1);
        events.end();
        assert_eq!(follower.next().await.map(|event| event.id), Some(2));
        assert!(follower.next().await.is_none());
    }

    #[test]
    fn ids_increase_across_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let mut last = 0;
        for _ in 0..3 {
            let state = State::open(folder.path(), folder.path()).unwrap();
            let events = Events::begin(&state).unwrap();
            publish(&events, 2);
            let first = events.lock().events[0].id;
            assert!(first > last, "{first} after {last}");
            last = events.lock().last;
        }
    }
}
