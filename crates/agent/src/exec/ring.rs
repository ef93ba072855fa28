//! The output buffer of one exec, without locks and clocks.
//!
//! It holds the newest output in chunks. The oldest chunks are dropped to make room, except those
//! that a follower has not read: then the command has to wait, for at most [`MAX_STALL`].

use scalebox_agent_api::ExecEnd;
use scalebox_agent_api::exec::MIN_BUFFER;
use scalebox_agent_api::frame::Frame;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Maximum number of bytes that are added at once, and that one read returns.
pub(crate) const PIECE: usize = 8 << 10;
/// Memory that a chunk takes in addition to its bytes: its entry and the allocator's header.
const OVERHEAD: usize = 64;
/// Maximum time that a command waits for a stalled follower, or for the first follower of an
/// attached exec.
pub(crate) const MAX_STALL: Duration = Duration::from_secs(10);

// A buffer without chunks has room for a piece, whatever its size.
const _: () = assert!(PIECE + OVERHEAD <= MIN_BUFFER as usize);

/// A stream of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// The result of a request for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// A piece can be added.
    Free,
    /// A follower has to read first. After this time, the request succeeds without it.
    Until(Instant),
}

struct Chunk {
    stream: Stream,
    offset: u64,
    bytes: Vec<u8>,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }

    fn cost(&self) -> usize {
        self.bytes.capacity() + OVERHEAD
    }
}

struct Follower {
    id: u64,
    position: u64,
    /// Did not read for [`MAX_STALL`]: output is dropped although it was not read.
    lags: bool,
}

/// The buffer. Offsets count the bytes of both streams together.
#[derive(Default)]
pub(crate) struct Ring {
    chunks: VecDeque<Chunk>,
    /// The memory of all chunks, in bytes.
    cost: usize,
    end: u64,
    followers: Vec<Follower>,
    next_follower: u64,
    /// The time at which a command began to wait for a follower.
    blocked_since: Option<Instant>,
    /// Nothing is dropped before this time, because the first follower is expected.
    reserved_until: Option<Instant>,
    finished: Option<ExecEnd>,
}

impl Ring {
    /// Creates an empty buffer. Until `reserved_until`, or until the first follower, it behaves as
    /// if a follower were at the start.
    pub(crate) fn new(reserved_until: Option<Instant>) -> Ring {
        Ring {
            reserved_until,
            ..Ring::default()
        }
    }

    /// Returns the memory of the content, in bytes.
    pub(crate) fn cost(&self) -> usize {
        self.cost
    }

    /// Returns the offset of the oldest byte.
    pub(crate) fn start(&self) -> u64 {
        self.chunks.front().map_or(self.end, |chunk| chunk.offset)
    }

    /// Returns the offset after the newest byte.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Returns how the command ended, if no more output follows.
    pub(crate) fn finished(&self) -> Option<ExecEnd> {
        self.finished
    }

    /// Records the end, after which nothing is added.
    pub(crate) fn finish(&mut self, end: ExecEnd) {
        self.finished = Some(end);
        if let Some(last) = self.chunks.back_mut() {
            self.cost -= last.cost();
            last.bytes.shrink_to_fit();
            self.cost += last.cost();
        }
        self.chunks.shrink_to_fit();
    }

    /// Drops the oldest output until a piece fits into a buffer of `limit` bytes, at least
    /// [`MIN_BUFFER`].
    pub(crate) fn make_room(&mut self, limit: usize, now: Instant) -> Room {
        while self.cost + PIECE + OVERHEAD > limit {
            let Some(oldest) = self.chunks.front().map(Chunk::end) else {
                break;
            };
            if let Some(until) = self.hold(oldest, now) {
                return Room::Until(until);
            }
            self.drop_oldest();
        }
        self.blocked_since = None;
        Room::Free
    }

    /// Drops the oldest output until at most `limit` bytes of memory are left. Keeps output that a
    /// follower has not read.
    pub(crate) fn trim(&mut self, limit: usize, now: Instant) {
        while self.cost > limit {
            let held = |chunk: &Chunk| self.is_reserved(now) || self.is_unread(chunk.end());
            if self.chunks.front().is_none_or(held) {
                break;
            }
            self.drop_oldest();
        }
    }

    /// Returns until when output before the offset `end` must be kept. Followers that stalled for
    /// too long do not hold it any more.
    fn hold(&mut self, end: u64, now: Instant) -> Option<Instant> {
        if self.is_unread(end) {
            let until = *self.blocked_since.get_or_insert(now) + MAX_STALL;
            if now < until {
                return Some(until);
            }
            let stalled = self.followers.iter_mut().filter(|follower| follower.position < end);
            stalled.for_each(|follower| follower.lags = true);
            self.blocked_since = None;
        }
        self.reserved_until.filter(|_| self.is_reserved(now))
    }

    fn is_unread(&self, end: u64) -> bool {
        let mut followers = self.followers.iter();
        followers.any(|follower| !follower.lags && follower.position < end)
    }

    fn is_reserved(&self, now: Instant) -> bool {
        self.reserved_until.is_some_and(|until| now < until)
    }

    fn drop_oldest(&mut self) {
        if let Some(chunk) = self.chunks.pop_front() {
            self.cost -= chunk.cost();
        }
    }

    /// Adds at most [`PIECE`] bytes, after [`make_room`](Ring::make_room).
    pub(crate) fn push(&mut self, stream: Stream, bytes: &[u8]) {
        let offset = self.end;
        self.end += bytes.len() as u64;
        match self.chunks.back_mut() {
            Some(last) if last.stream == stream && last.bytes.len() + bytes.len() <= PIECE => {
                self.cost -= last.cost();
                let needed = last.bytes.len() + bytes.len();
                if needed > last.bytes.capacity() {
                    let capacity = needed.max(2 * last.bytes.capacity()).min(PIECE);
                    last.bytes.reserve_exact(capacity - last.bytes.len());
                }
                last.bytes.extend_from_slice(bytes);
                self.cost += last.cost();
            }
            _ => {
                let bytes = bytes.to_vec();
                let chunk = Chunk { stream, offset, bytes };
                self.cost += chunk.cost();
                self.chunks.push_back(chunk);
            }
        }
    }

    /// Appends frames from the offset `position` up to `until`, with about [`PIECE`] bytes, to
    /// `to`. Returns the offset after them.
    pub(crate) fn read(&self, mut position: u64, until: u64, to: &mut Vec<u8>) -> u64 {
        let start = self.start();
        if position < start {
            let count = start - position;
            Frame::Lost {
                offset: position,
                count,
            }
            .encode(to);
            position = start;
        }
        let first = self.chunks.partition_point(|chunk| chunk.end() <= position);
        for chunk in self.chunks.range(first..) {
            if position >= until || to.len() >= PIECE {
                break;
            }
            let from = (position - chunk.offset) as usize;
            let most = (until - position).min((PIECE - to.len()) as u64) as usize;
            let bytes = &chunk.bytes[from..];
            let bytes = bytes[..most.min(bytes.len())].to_vec();
            let (offset, length) = (position, bytes.len() as u64);
            match chunk.stream {
                Stream::Stdout => Frame::Stdout { offset, bytes },
                Stream::Stderr => Frame::Stderr { offset, bytes },
            }
            .encode(to);
            position += length;
        }
        position
    }

    /// Adds a follower that continues at `position`. Returns its number.
    pub(crate) fn add_follower(&mut self, position: u64) -> u64 {
        let id = self.next_follower;
        self.next_follower += 1;
        self.reserved_until = None;
        self.followers.push(Follower {
            id,
            position,
            lags: false,
        });
        id
    }

    /// Records that a follower has read everything before `position`.
    pub(crate) fn follower_read(&mut self, id: u64, position: u64) {
        self.blocked_since = None;
        if let Some(follower) = self.followers.iter_mut().find(|follower| follower.id == id) {
            follower.position = position;
            follower.lags = false;
        }
    }

    /// Removes a follower.
    pub(crate) fn remove_follower(&mut self, id: u64) {
        self.blocked_since = None;
        self.followers.retain(|follower| follower.id != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use scalebox_agent_api::frame::Decoder;

    const LIMIT: usize = MIN_BUFFER as usize;

    fn frames(ring: &Ring, position: u64) -> Vec<Frame> {
        let (mut bytes, mut frames, mut position) = (Vec::new(), Vec::new(), position);
        loop {
            bytes.clear();
            let next = ring.read(position, ring.end(), &mut bytes);
            Decoder::default().push(&bytes, &mut frames).unwrap();
            if next == position {
                return frames;
            }
            position = next;
        }
    }

    #[test]
    fn the_oldest_output_is_dropped_and_reported_without_a_follower() {
        let (mut ring, now) = (Ring::default(), Instant::now());
        for number in 0..8_u8 {
            assert_eq!(ring.make_room(LIMIT, now), Room::Free);
            ring.push(Stream::Stdout, &[number; PIECE]);
        }
        let (start, end) = (ring.start(), ring.end());
        assert!(ring.cost() <= LIMIT && start > 0, "{} {start}", ring.cost());
        let read = frames(&ring, 5);
        let count = start - 5;
        assert_eq!(read[0], Frame::Lost { offset: 5, count });
        let Some(Frame::Stdout { offset, bytes }) = read.last() else {
            panic!("{read:?}")
        };
        assert_eq!((offset + bytes.len() as u64, bytes[0]), (end, 7));
    }

    #[test]
    fn a_follower_that_stalls_holds_the_output_for_ten_seconds() {
        let (mut ring, now) = (Ring::default(), Instant::now());
        let follower = ring.add_follower(0);
        ring.push(Stream::Stdout, &[0; PIECE]);
        ring.push(Stream::Stdout, &[1; PIECE]);
        assert_eq!(ring.make_room(LIMIT, now), Room::Until(now + MAX_STALL));
        let later = now + MAX_STALL - Duration::from_secs(1);
        assert_eq!(ring.make_room(LIMIT, later), Room::Until(now + MAX_STALL));
        ring.follower_read(follower, 1);
        let until = later + MAX_STALL;
        assert_eq!(ring.make_room(LIMIT, later), Room::Until(until), "it reads again");
        assert_eq!(ring.make_room(LIMIT, until), Room::Free);
        ring.push(Stream::Stdout, &[2; PIECE]);
        assert_eq!(ring.make_room(LIMIT, until), Room::Free, "it lags");
        ring.push(Stream::Stdout, &[3; PIECE]);
        ring.follower_read(follower, ring.start());
        assert_eq!(ring.make_room(LIMIT, until), Room::Until(until + MAX_STALL));
    }

    #[test]
    fn an_attached_exec_waits_for_its_first_follower() {
        let now = Instant::now();
        let mut ring = Ring::new(Some(now + MAX_STALL));
        ring.push(Stream::Stdout, &[0; PIECE]);
        ring.push(Stream::Stdout, &[1; PIECE]);
        ring.trim(0, now);
        assert_eq!(ring.make_room(LIMIT, now), Room::Until(now + MAX_STALL));
        assert_eq!(ring.start(), 0);
        let follower = ring.add_follower(0);
        ring.remove_follower(follower);
        assert_eq!(ring.make_room(LIMIT, now), Room::Free);
        assert_eq!(ring.start(), PIECE as u64);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_follower_reads_all_output_in_order_within_the_limit(
            pushes in proptest::collection::vec((any::<bool>(), 1..PIECE), 1..20),
        ) {
            let (mut ring, now) = (Ring::default(), Instant::now());
            let follower = ring.add_follower(0);
            let (mut position, mut read, mut written) = (0, Vec::new(), Vec::new());
            for (number, (is_stdout, length)) in pushes.into_iter().enumerate() {
                while ring.make_room(LIMIT, now) != Room::Free {
                    let mut piece = Vec::new();
                    position = ring.read(position, u64::MAX, &mut piece);
                    read.append(&mut piece);
                    ring.follower_read(follower, position);
                }
                let stream = if is_stdout { Stream::Stdout } else { Stream::Stderr };
                let bytes = vec![number as u8; length];
                written.extend(bytes.iter().map(|byte| (stream, *byte)));
                ring.push(stream, &bytes);
                prop_assert!(ring.cost() <= LIMIT);
            }
            while position < ring.end() {
                let mut piece = Vec::new();
                    position = ring.read(position, u64::MAX, &mut piece);
                    read.append(&mut piece);
            }
            let mut frames = Vec::new();
            Decoder::default().push(&read, &mut frames).unwrap();
            let mut received = Vec::new();
            for frame in frames {
                let (stream, offset, bytes) = match frame {
                    Frame::Stdout { offset, bytes } => (Stream::Stdout, offset, bytes),
                    Frame::Stderr { offset, bytes } => (Stream::Stderr, offset, bytes),
                    other => panic!("{other:?}"),
                };
                prop_assert_eq!(offset, received.len() as u64);
                received.extend(bytes.into_iter().map(|byte| (stream, byte)));
            }
            prop_assert!(received == written);
        }
    }
}
