//! A host with many VMs. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};
use support::{Host, Options, unmeasured};

const VMS: usize = 200;
const THREADS: usize = 4;
const LISTINGS: usize = 200;

#[test]
fn two_hundred_stopped_vms_are_all_there_after_a_crash() {
    let mut host = Host::with_tiny_template(&Options {
        pool_size: "100G",
        // Ports that no other test uses: theirs end at 28999.
        env: &[
            ("PORT_MIN", "29100"),
            ("PORT_MAX", "29399"),
            ("OVERCOMMIT_RATIO", "100"),
        ],
        ..Options::default()
    });
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..VMS / THREADS {
                    host.create_stopped("tiny", None);
                }
            });
        }
    });
    let before = host.client().vms().unwrap();
    assert_eq!(before.len(), VMS);
    let ports: BTreeSet<_> = before.iter().map(|vm| vm.ssh_port).collect();
    let names: BTreeSet<_> = before.iter().map(|vm| &vm.name).collect();
    assert_eq!((ports.len(), names.len()), (VMS, VMS));

    host.crash();
    let begun = Instant::now();
    host.serve();
    let ready = begun.elapsed();
    // Disk usage is measured at any time, so it is not compared.
    assert_eq!(unmeasured(host.client().vms().unwrap()), unmeasured(before));

    let mut took: Vec<Duration> = (0..LISTINGS)
        .map(|_| {
            let begun = Instant::now();
            assert_eq!(host.send("GET", "/vms", b"").0, 200);
            begun.elapsed()
        })
        .collect();
    took.sort();
    // The time is printed and not checked, because test machines are shared.
    let p99 = took[LISTINGS * 99 / 100];
    println!("{VMS} stopped VMs: ready {ready:?} after a crash; GET /vms p99 {p99:?}, a connection each");
}
