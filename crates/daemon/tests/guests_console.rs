//! A guest that floods its serial console harms neither the host nor itself.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use std::fs;
use std::time::{Duration, Instant};
use support::guest::{Key, wait_for_ssh};
use support::{Host, Options, eventually};

const MEGABYTES: u64 = 10;

#[test]
fn a_guest_that_floods_its_console_keeps_working() {
    let mut host = Host::new(&Options::default());
    host.import_debian();
    host.serve();
    let key = Key::new(&host, "key");
    let vm = host.client().create_vm(&key.request("loud")).unwrap();
    wait_for_ssh(&vm);
    let flood = format!("yes this is a line of a log | head -c {MEGABYTES}000000 | sudo tee /dev/ttyS0 >/dev/null");
    let mut flooding = key.ssh(&vm, &flood).spawn().unwrap();
    let log = host.folder.join(format!("state/console/{}/console.log", vm.id));
    eventually("the flood", || {
        fs::read_to_string(&log)
            .unwrap()
            .contains("line of a log")
            .then_some(())
    });
    // During the flood and after it.
    assert_eq!(key.run(&vm, "echo well"), "well");
    let done = eventually("the flood's end", || flooding.try_wait().unwrap());
    assert!(done.success(), "{done}");
    assert_eq!(key.run(&vm, "echo well"), "well");
    let kept: u64 = ["console.log", "console.log.1"]
        .iter()
        .map(|name| log.with_file_name(name).metadata().unwrap().len())
        .sum();
    assert!(kept <= 1 << 20, "{kept}");
    let begun = Instant::now();
    host.client().stop_vm("loud").unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(55),
        "the guest was killed after the time limit"
    );
}
