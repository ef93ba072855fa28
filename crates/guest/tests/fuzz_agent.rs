//! Random bytes from a guest, for `SCALEBOX_FUZZ_SECONDS` seconds (two by default; CI runs it for a
//! minute).
//!
//! Each round is a connection to a guest that sends frames of HTTP/2 and of output with random
//! changes, and then closes. No byte may make the host panic, hang, or read without a limit. The
//! seed of a round that fails is printed.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use scalebox_agent_api::frame::Frame;
use std::time::{Duration, Instant};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// xorshift64 (Marsaglia, 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn bytes(&mut self, max: usize) -> Vec<u8> {
        (0..self.below(max + 1)).map(|_| self.next() as u8).collect()
    }

    fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }
}

/// Returns the bytes of a guest: mostly valid frames, some of them damaged.
fn session(random: &mut Random) -> Vec<u8> {
    let mut bytes = frame(SETTINGS, 0, 0, &[]);
    for _ in 0..random.below(20) {
        let stream = [0, 1, 1, 1, 3, 5, 7, random.next() as u32][random.below(8)];
        let next = match random.below(8) {
            0 => frame(HEADERS, END_HEADERS | random.below(2) as u8, stream, STATUS_200),
            1 => frame(
                DATA,
                random.below(2) as u8,
                stream,
                br#"{"version":"1","boot_id":"x","init":"agent"}"#,
            ),
            2 => {
                let mut output = Vec::new();
                let frame_of = Frame::Stdout {
                    offset: random.below(3) as u64,
                    bytes: random.bytes(50),
                };
                frame_of.encode(&mut output);
                frame(DATA, 0, stream, &output)
            }
            3 => frame(
                SETTINGS,
                0,
                0,
                &[0, random.below(8) as u8, 0, 0, random.next() as u8, random.next() as u8],
            ),
            4 => frame(WINDOW_UPDATE, 0, stream, &(random.next() as u32).to_be_bytes()),
            5 => frame(PING, random.below(2) as u8, 0, &[7; 8]),
            6 => frame(random.next() as u8, random.next() as u8, stream, &random.bytes(100)),
            _ => random.bytes(200),
        };
        bytes.extend(next);
    }
    for _ in 0..random.below(4) {
        let at = random.below(bytes.len());
        bytes[at] = random.next() as u8;
    }
    if random.chance(4) {
        bytes.truncate(random.below(bytes.len()));
    }
    bytes
}

async fn round(seed: u64) {
    let mut random = Random(seed.max(1));
    let bytes = session(&mut random);
    let connection = connect(|mut stream| async move {
        let _ = stream.write_all(&bytes).await;
        // The host's requests are read, so that the host is not blocked.
        let mut ignored = [0; 4096];
        let _ = timeout(Duration::from_millis(20), async {
            while stream.read(&mut ignored).await.is_ok_and(|read| read > 0) {}
        })
        .await;
    });
    let Ok(connection) = connection.await else { return };
    let output = async {
        if let Ok(mut output) = connection.output("exec-0123456789ab", 0, true).await {
            while let Some(Ok(_)) = output.next().await {}
        }
    };
    let requests = async { tokio::join!(connection.info(), connection.execs(), output) };
    let ended = timeout(Duration::from_secs(30), requests).await;
    assert!(ended.is_ok(), "the host hangs: seed {seed}");
}

#[tokio::test]
async fn random_bytes_neither_hang_nor_crash_the_host() {
    let seconds = std::env::var("SCALEBOX_FUZZ_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok());
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(2));
    let start = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let (mut seed, mut rounds) = (start.as_nanos() as u64, 0);
    while Instant::now() < until {
        seed = seed.wrapping_add(1);
        if let Err(panicked) = tokio::spawn(round(seed)).await {
            std::panic::resume_unwind(Box::new(format!("seed {seed}: {panicked}")));
        }
        rounds += 1;
    }
    println!("{rounds} rounds");
}
