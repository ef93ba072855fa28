//! Sends random bytes and damaged requests to a daemon. It keeps running, responds with no 5xx but
//! 503 and 507, and creates nothing that it does not list. The seed is fixed; `SCALEBOX_TEST_SEED`
//! chooses another one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};
use support::{Host, KEY, Options, TOKEN, eventually};

const MAX_REQUESTS: usize = 1500;
/// Time limit of the run, for slow machines.
const MAX_RUN_TIME: Duration = Duration::from_secs(60);
/// Pause after which the client stops sending. The daemon then waits for the rest of a request, or
/// is processing one.
const IDLE_TIMEOUT: Duration = Duration::from_millis(60);
/// Time limit for the response after that.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// xorshift64*: sufficient to choose the damage.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn one_of<T: Clone>(&mut self, things: &[T]) -> T {
        things[self.below(things.len())].clone()
    }

    fn bytes(&mut self, at_most: usize) -> Vec<u8> {
        (0..self.below(at_most)).map(|_| self.next() as u8).collect()
    }
}

fn request(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Returns a valid request of each kind; VMs stay stopped.
fn good(random: &mut Random) -> Vec<u8> {
    let vm = random.one_of(&["one", "two", "three", "four"]);
    let template = random.one_of(&["tiny", "made", "other"]);
    let size = 1 + random.below(4);
    let create = json!({"template": template, "ssh_public_key": KEY, "start": false, "name": vm, "disk_size_gib": size,
        "vcpu_count": 1, "mem_size_mib": 256, "disk_iops": 100, "net_mbps": 10, "autostart": false,
        "disk_auto_extend": {"threshold_percent": 80, "increment_gib": 1, "limit_gib": 4}});
    let change = json!({"disk_size_gib": size, "net_mbps": null, "disk_iops": 7, "disk_auto_extend": null});
    let policy =
        json!({"disk_auto_extend": {"threshold_percent": 9, "increment_gib": 1, "limit_gib": 4}, "autostart": true});
    let at = |path: &str| format!("/vms/{vm}{path}");
    let text = |body: &Value| body.to_string().into_bytes();
    match random.below(20) {
        0..=4 => request("POST", "/vms", "Content-Type: application/json\r\n", &text(&create)),
        5 => request("POST", "/vms", "Idempotency-Key: \"once\"\r\n", &text(&create)),
        6 => request("PATCH", &at(""), "", &text(&change)),
        7 => request("PATCH", &at(""), "", &text(&policy)),
        8 => request("DELETE", &at(""), "", b""),
        9 => request(
            "POST",
            &at(random.one_of(&["/start", "/stop", "/restart", "/trim"])),
            "",
            b"",
        ),
        10 => request("POST", &at("/snapshot"), "", &text(&json!({ "template_name": "made" }))),
        11 => request("DELETE", "/templates/made", "", b""),
        12 => request("POST", "/templates/other/import?replace=true", "", b"no image"),
        13 => request("POST", "/pool/grow", "", br#"{"size_gib": 31}"#),
        14 => request("POST", "/pool/shrink", "", br#"{"size_gib": 30}"#),
        15 => request("GET", "/events?since=0&follow=false", "Last-Event-ID: 3\r\n", b""),
        16 => request("GET", "/templates/tiny/export", "", b""),
        17 => request("GET", &at(""), "", b""),
        _ => {
            let path = random.one_of(&[
                "/vms",
                "/templates",
                "/pool",
                "/info",
                "/metrics",
                "/openapi.json",
                "/health",
            ]);
            request("GET", path, "", b"")
        }
    }
}

/// Replacements for a byte, a number or a fragment.
const ODDITIES: [&[u8]; 24] = [
    b"\0",
    b"\r\n",
    b"\r\n\r\n",
    b"\"",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"{",
    b"[[[[[[[[",
    b"null",
    b"-1",
    b"1e400",
    b"18446744073709551616",
    b"0.0000001",
    b"%00",
    b"%2f..%2f",
    b"../",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xc2\xa0",
    b" ",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 99999999\r\n",
    b"?follow=true",
];

fn damage(mut bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    for _ in 0..random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(7) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 => drop(bytes.splice(at..at, random.one_of(&ODDITIES).iter().copied())),
            3 => {
                let end = (at + random.below(12)).min(bytes.len());
                bytes.splice(at..end, random.one_of(&ODDITIES).iter().copied());
            }
            4 => drop(bytes.splice(at..at, random.bytes(40))),
            5 => {
                let piece = bytes[at..(at + random.below(60)).min(bytes.len())].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            _ => bytes.extend(good(random)),
        }
    }
    bytes
}

/// Sends the bytes and returns the response, up to its end or the time limit.
fn responses(host: &Host, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(host.url.strip_prefix("http://").unwrap()).expect("the daemon accepts");
    stream.set_read_timeout(Some(IDLE_TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(RESPONSE_TIMEOUT)).unwrap();
    // The daemon may reject the request before all of it is sent.
    let _sent = stream.write_all(bytes);
    let (mut answers, mut piece) = (Vec::new(), vec![0; 1 << 16]);
    let mut closing = false;
    loop {
        let silent = match stream.read(&mut piece) {
            Ok(0) => return answers,
            Ok(read) => {
                answers.extend(&piece[..read]);
                // Most responses are complete by now, and the connection is kept open for another
                // request.
                answers.ends_with(b"}") || answers.ends_with(b"\r\n\r\n")
            }
            Err(error) => !closing && matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        };
        match (silent, closing) {
            (true, false) => {
                closing = true;
                let _gone = stream.shutdown(Shutdown::Write);
                stream.set_read_timeout(Some(RESPONSE_TIMEOUT)).unwrap();
            }
            (false, true) => return answers,
            _ => {}
        }
    }
}

/// Extracts the statuses of the responses. A status line is at the start, or directly after a body.
fn statuses(answers: &[u8]) -> Vec<u16> {
    let text = String::from_utf8_lossy(answers);
    let lines = text
        .match_indices("HTTP/1.")
        .filter_map(|(at, _)| text.get(at + 9..at + 12)?.parse().ok());
    lines.collect()
}

/// Checks that the pool has no unlisted files and no commitments for missing VMs.
fn check_pool(host: &Host) {
    let client = host.client();
    let vms = eventually("deleted disks to be freed", || {
        let (vms, pool) = (client.vms().unwrap(), client.pool().unwrap());
        let committed: u64 = vms.iter().map(|vm| vm.disk_size_gib << 30).sum();
        (pool.committed_bytes == committed && pool.reserved_bytes == 0).then_some(vms)
    });
    let mut disks: Vec<String> = vms.iter().map(|vm| format!("{}.ext4", vm.id)).collect();
    let mut found = host.leftovers();
    // A console folder is created by a start, and kept.
    found.retain(|name| !vms.iter().any(|vm| vm.id == *name));
    disks.sort();
    found.sort();
    assert_eq!(found, disks);
    let mut listed: Vec<String> = client
        .templates()
        .unwrap()
        .iter()
        .flat_map(|template| ["ext4", "json"].map(|suffix| format!("{}.{suffix}", template.name)))
        .collect();
    listed.push(".grown".to_owned());
    let folder = fs::read_dir(host.folder.join("pool/templates")).unwrap();
    for entry in folder {
        let name = entry.unwrap().file_name().into_string().unwrap();
        // The image of a replaced template is NAME@INODE.ext4.
        let of = name
            .split_once('@')
            .map_or(name.clone(), |(of, _)| format!("{of}.ext4"));
        assert!(listed.contains(&of), "{name} is not listed: {listed:?}");
    }
}

#[test]
fn damaged_requests_neither_stop_the_daemon_nor_create_unlisted_objects() {
    let mut host = Host::with_tiny_template(&Options {
        env: &[("MAX_DISK_SIZE_GIB", "4")],
        ..Options::default()
    });
    let seed = std::env::var("SCALEBOX_TEST_SEED").map_or(0x5ca1_eb0c, |seed| seed.parse().expect("a number"));
    println!("SCALEBOX_TEST_SEED={seed}");
    let mut random = Random(seed | 1);
    let (begun, mut counts) = (Instant::now(), BTreeMap::<u16, usize>::new());
    for number in 0..MAX_REQUESTS {
        if begun.elapsed() > MAX_RUN_TIME {
            break;
        }
        let bytes = match random.below(12) {
            0 => random.bytes(2000),
            1 => good(&mut random),
            _ => damage(good(&mut random), &mut random),
        };
        for status in statuses(&responses(&host, &bytes)) {
            *counts.entry(status).or_default() += 1;
            assert!(
                status < 500 || matches!(status, 503 | 507),
                "request {number} of seed {seed} got {status}: {:?}",
                String::from_utf8_lossy(&bytes)
            );
        }
    }
    println!("{counts:?} in {:.0?}", begun.elapsed());
    assert!(
        counts.contains_key(&200) && counts.contains_key(&201) && counts.contains_key(&400),
        "{counts:?}"
    );
    assert!(!host.log().contains("panicked"), "a task panicked");
    check_pool(&host);
    // A restart must not reveal anything that was not listed.
    let before = support::unmeasured(host.client().vms().unwrap());
    assert_eq!(host.terminate().code(), Some(0));
    host.serve();
    assert_eq!(support::unmeasured(host.client().vms().unwrap()), before);
    assert!(host.log().contains("files_removed=0"), "the start found orphaned files");
    check_pool(&host);
}
