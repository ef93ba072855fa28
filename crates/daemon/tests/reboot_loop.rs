//! A guest that cannot boot. Its kernel is a few bytes that reboot the machine at once.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

#[path = "../../vmm/tests/support/guest.rs"]
#[allow(dead_code, reason = "only one of its guests is used")]
mod bare_guest;
mod support;

use bare_guest::Guest;
use scalebox_api::{CreateVm, EventKind, VmStatus};
use std::fs;
use support::{Host, Options, eventually};

#[test]
fn a_guest_that_cannot_boot_fails_with_a_reason_and_is_killed() {
    let host = Host::with_tiny_template(&Options::default());
    let kernel = host.kernel_folder();
    Guest::Restless.write_to(&kernel.join("vmlinuz"));
    fs::write(kernel.join("initrd.img"), b"").unwrap();
    let request = CreateVm {
        start: true,
        ..host.stopped("tiny")
    };
    let vm = host.client().create_vm(&request).unwrap();
    let failed = eventually("the loop to be seen", || {
        let vm = host.client().vm(&vm.id).unwrap();
        (vm.status == VmStatus::Failed).then_some(vm)
    });
    let reason = failed.status_reason.unwrap();
    assert!(
        reason.contains("rebooted 6 times") && reason.contains("last console output: up"),
        "{reason}"
    );
    assert_eq!(host.taps(), Vec::<String>::new(), "the machine was killed");
    let events = host.client().events(Some(0), false).unwrap();
    assert_eq!(events.last().unwrap().unwrap().kind, EventKind::Failed);

    // It can be started again, for example after its disk was repaired.
    assert_eq!(host.client().start_vm(&vm.id).unwrap().status, VmStatus::Running);
    host.client().delete_vm(&vm.id).unwrap();
    assert_eq!(host.leftovers(), Vec::<String>::new());
}
