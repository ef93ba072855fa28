//! What happens on the host, told as it happens: `GET /events`.
//!
//! The last [`KEPT`] events are in memory, for a client that comes back (`Last-Event-ID`) or looks
//! later (`since`). Ids grow from event to event and are never given twice, also over a restart or
//! a crash of the daemon: each start counts itself in the state file and begins at that count ×
//! [`IDS_A_START`]. The events of an earlier start are gone; who asks for them is told so by an
//! event `missed`. An event is published after what it tells of is durable, and may be lost with a
//! crash right then: the state is what counts, events say when to look.
//!
//! To tell of something: `service.inner().events.publish(EventKind::Grown, Some(&record),
//! json!({"to_gib": 8}))`. A new kind is a line in `crates/client/src/event.rs`, with the names of
//! its details.

use crate::state::{Fact, Record, State, StateError};
use scalebox_client::{Event, EventKind, EventVm};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// How many events are kept: a busy host's of some minutes, in a megabyte or two.
const KEPT: usize = 4096;
/// More than a daemon publishes in its life; with it, nine million starts stay below 2⁵³, above
/// which JavaScript's numbers have gaps.
const IDS_A_START: u64 = 1_000_000_000;

/// The events of this start of the daemon.
pub struct Events {
    /// A std mutex: held for a push or a copy, never across an await.
    ring: Mutex<Ring>,
    /// Tells followers to look, and at the end that no more come.
    news: watch::Sender<News>,
}

struct Ring {
    events: VecDeque<Arc<Event>>,
    /// The last id given; at first, one below this start's ids.
    last: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct News {
    last: u64,
    ended: bool,
}

impl Events {
    /// Begins the events of one start of the daemon, which is counted in `state`. Blocks.
    ///
    /// A start that cannot be counted, on a full or read-only disk, takes ids from the second half
    /// of its range, by the clock: they are unlike those of the next start.
    ///
    /// # Errors
    /// [`StateError`] when the state cannot be read.
    pub fn begin(state: &State) -> Result<Events, StateError> {
        // A value that is not a number was not written by us; ids then begin anew, and a client
        // with an old one receives `missed`.
        let starts = state.fact(Fact::Starts)?.and_then(|count| count.parse::<u64>().ok());
        let start = starts.unwrap_or(0) + 1;
        let first = start * IDS_A_START;
        match state.set_fact(Fact::Starts, &start.to_string()) {
            Ok(()) => Ok(Events::from(first)),
            Err(error) => {
                tracing::warn!(%error, "this start is not counted in the state file");
                let half = IDS_A_START / 2;
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
            news: watch::Sender::new(News {
                last: base,
                ended: false,
            }),
        }
    }

    /// Tells of something, of a VM's or of the host's own. `details` is an object; [`Value::Null`]
    /// stands for an empty one.
    pub fn publish(&self, kind: EventKind, vm: Option<&Record>, details: Value) {
        let vm = vm.map(|record| EventVm {
            id: record.id.clone(),
            name: record.name.clone(),
        });
        let mut ring = self.lock();
        ring.last += 1;
        let event = event(ring.last, kind, vm, details);
        if ring.events.len() == KEPT {
            ring.events.pop_front();
        }
        ring.events.push_back(Arc::new(event));
        let last = ring.last;
        // Under the lock, so that followers are told in order.
        self.news.send_modify(|news| news.last = last);
    }

    /// How many were published since the start.
    pub fn count(&self) -> u64 {
        self.lock().last % IDS_A_START
    }

    /// No more events come: followers get what there is, and their streams end.
    pub fn end(&self) {
        self.news.send_modify(|news| news.ended = true);
    }

    /// The events after `since`; from now on where it is `None`, all that are kept where it is 0.
    pub fn subscribe(self: &Arc<Self>, since: Option<u64>, follow: bool) -> Subscription {
        let ring = self.lock();
        Subscription {
            seen: match since {
                None => ring.last,
                // All that are kept, and no word of those that are not.
                Some(0) => ring.events.front().map_or(ring.last, |first| first.id - 1),
                Some(id) => id,
            },
            waiting: VecDeque::new(),
            follow,
            news: self.news.subscribe(),
            events: Arc::clone(self),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// The events after `seen`, before them one that says so if some are missing.
    fn after(&self, seen: u64) -> VecDeque<Arc<Event>> {
        let kept_from = self.events.front().map_or(self.last, |first| first.id - 1);
        // One that is above all of ours was given by a daemon with another state.
        let known = (kept_from..=self.last).contains(&seen);
        let from = if known { seen } else { kept_from };
        let events = self.events.iter().filter(|event| event.id > from).cloned();
        let missed = (!known).then(|| {
            // Its id stands right before what follows, so that a client that comes back with it
            // goes on there.
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

/// One client's place among the events.
pub struct Subscription {
    events: Arc<Events>,
    news: watch::Receiver<News>,
    seen: u64,
    waiting: VecDeque<Arc<Event>>,
    follow: bool,
}

impl Subscription {
    /// The id to come back with: that of the last event told, or of the last before the first.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// The next event, waiting for it if events are followed; `None` at the end.
    pub async fn next(&mut self) -> Option<Arc<Event>> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                self.seen = event.id;
                return Some(event);
            }
            // Marked as seen before looking, so that what comes in between wakes the next wait.
            let news = *self.news.borrow_and_update();
            self.waiting = self.events.lock().after(self.seen);
            if self.waiting.is_empty() && (!self.follow || news.ended || self.news.changed().await.is_err()) {
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

    async fn told(events: &Arc<Events>, since: Option<u64>) -> Vec<(u64, EventKind)> {
        let mut subscription = events.subscribe(since, false);
        let mut told = Vec::new();
        while let Some(event) = subscription.next().await {
            told.push((event.id, event.kind.clone()));
        }
        told
    }

    #[tokio::test]
    async fn who_comes_back_is_told_what_came_meanwhile_and_whether_something_is_missing() {
        let grown = |id| (id, EventKind::PoolGrown);
        let missed = |id| (id, EventKind::Missed);
        let events = Arc::new(Events::from(100));
        assert_eq!(told(&events, Some(100)).await, []);
        assert_eq!(told(&events, Some(50)).await, [missed(100)]);
        publish(&events, 3);
        assert_eq!(told(&events, Some(101)).await, [grown(102), grown(103)]);
        assert_eq!(told(&events, Some(103)).await, []);
        assert_eq!(told(&events, None).await, []);
        let all = [grown(101), grown(102), grown(103)];
        assert_eq!(told(&events, Some(0)).await, all);
        for other in [99, 104] {
            assert_eq!(told(&events, Some(other)).await, [&[missed(100)][..], &all].concat());
        }
        publish(&events, KEPT);
        let late = told(&events, Some(101)).await;
        assert_eq!((late.len(), &late[..2]), (KEPT + 1, &[missed(103), grown(104)][..]));
        assert_eq!(told(&events, Some(0)).await.len(), KEPT);
    }

    #[tokio::test]
    async fn a_follower_waits_for_each_event_and_is_told_the_last_before_the_end() {
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
    fn ids_grow_over_a_restart() {
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
