//! Checks that one VM in trouble does not affect the others. The trouble occurs at start, after a
//! reboot of the host, or when the network tables are removed. The guests are a few bytes of code.
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
use scalebox_api::{CreateVm, Vm, VmStatus};
use scalebox_client::ClientError;
use std::fs;
use support::guest::{machine_of, machines};
use support::{Host, Options, eventually, run, text};

/// Creates a host whose guests do nothing but respond to the power button.
fn host_with_kernel() -> Host {
    let host = Host::with_tiny_template(&Options::default());
    let kernel = host.kernel_folder();
    Guest::Obedient.write_to(&kernel.join("vmlinuz"));
    fs::write(kernel.join("initrd.img"), b"").unwrap();
    host
}

fn create_running(host: &Host) -> Vm {
    let request = CreateVm {
        start: true,
        ..host.stopped("tiny")
    };
    host.client().create_vm(&request).unwrap()
}

fn change_state(host: &Host, sql: &str) {
    let state = rusqlite::Connection::open(host.folder.join("state/state.db")).unwrap();
    state.execute(sql, []).unwrap();
}

#[test]
fn an_interrupted_growth_that_fails_is_rolled_back_and_other_vms_are_served() {
    let mut host = Host::with_tiny_template(&Options::default());
    let (broken, sound) = (
        host.create_stopped("tiny", Some(1)),
        host.create_stopped("tiny", Some(1)),
    );
    host.crash();
    // The state after a crash that followed the recorded intent, and a file system on which e2fsck
    // would wait for hours.
    change_state(&host, "UPDATE vms SET disk_size_gib = 3");
    run(
        "tune2fs",
        &["-O", "mmp", "-E", "mmp_update_interval=300", text(&host.disk(&broken))],
    );
    host.serve();
    assert_eq!(host.client().vm(&sound.id).unwrap().disk_size_gib, 3);
    assert_eq!(host.client().vm(&broken.id).unwrap().disk_size_gib, 1);
    assert_eq!(host.client().pool().unwrap().committed_bytes, 4 << 30);
    assert!(host.log().contains("rolling it back"));

    // A request to grow its disk is rejected with the remedy.
    let (status, answer) = host.send("PATCH", &format!("/vms/{}", broken.id), br#"{"disk_size_gib": 3}"#);
    assert_eq!(status, 409, "{answer}");
    assert!(answer.contains("tune2fs -O ^mmp"), "{answer}");
    let (status, answer) = host.send(
        "POST",
        &format!("/vms/{}/snapshot", broken.id),
        br#"{"template_name": "x"}"#,
    );
    assert_eq!(status, 409, "{answer}");
    assert!(answer.contains("tune2fs -O ^mmp"), "{answer}");
    // A VM whose disk is missing fails too.
    fs::remove_file(host.disk(&sound)).unwrap();
    for (method, path, body) in [
        ("PATCH", "", r#"{"disk_size_gib": 5}"#),
        ("POST", "/snapshot", r#"{"template_name": "x"}"#),
        ("POST", "/start", ""),
    ] {
        let (status, answer) = host.send(method, &format!("/vms/{}{path}", sound.id), body.as_bytes());
        assert_eq!(status, 409, "{method} {path}: {answer}");
        assert!(answer.contains("is missing from the pool"), "{answer}");
    }
    host.client().delete_vm(&broken.id).unwrap();
    host.client().delete_vm(&sound.id).unwrap();
    assert_eq!(host.client().pool().unwrap().committed_bytes, 0);
}

#[test]
fn a_vm_started_by_a_client_while_it_waits_after_a_reboot_keeps_running() {
    let mut host = host_with_kernel();
    let vms: Vec<Vm> = (0..6).map(|_| create_running(&host)).collect();
    host.crash();
    for vm in &vms {
        rustix::process::kill_process(machine_of(&host, vm), rustix::process::Signal::KILL).unwrap();
    }
    change_state(&host, "UPDATE facts SET value = 'another' WHERE key = 'boot_id'");
    host.serve();
    // The requests are in reverse order: the daemon reaches each VM while a request starts it, or
    // when it runs.
    for vm in vms.iter().rev() {
        match host.client().start_vm(&vm.id) {
            Ok(_) | Err(ClientError::Refused { status: 409, .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    eventually("all turns to have come", || {
        let listed = host.client().vms().unwrap();
        listed.iter().all(|vm| vm.status == VmStatus::Running).then_some(())
    });
    assert_eq!(machines(&host).len(), vms.len());
    // The next daemon finds them running.
    host.crash();
    host.serve();
    assert!(
        host.client()
            .vms()
            .unwrap()
            .iter()
            .all(|vm| vm.status == VmStatus::Running)
    );
    assert_eq!(machines(&host).len(), vms.len());
    for vm in &vms {
        host.client().delete_vm(&vm.id).unwrap();
    }
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn a_vm_whose_tap_is_unusable_does_not_keep_others_from_the_network() {
    let mut host = host_with_kernel();
    let (taken, other) = (create_running(&host), create_running(&host));
    let (tap, foreign) = (tap_of(&taken), format!("{}00", host.bridge));
    run("ip", &["link", "add", &foreign, "type", "bridge"]);
    run("ip", &["link", "set", &tap, "master", &foreign]);

    // The first case is the daemon's start.
    host.crash();
    host.serve();
    assert!(host.log().contains("is a port of another bridge"));
    assert_eq!(machines(&host).len(), 2);
    // The second case is the removal of the tables.
    sweep(&host);
    eventually("the other's forward to be back", || {
        has_forward(&host, &other).then_some(())
    });
    assert!(!has_forward(&host, &taken));

    // Once the tap is usable again, it is reconnected automatically.
    run("ip", &["link", "set", &tap, "nomaster"]);
    run("ip", &["link", "del", &foreign]);
    eventually("its forward to be back", || has_forward(&host, &taken).then_some(()));
    eventually("its tap to be back", || host.taps().contains(&tap).then_some(()));
    for vm in [&taken, &other] {
        host.client().delete_vm(&vm.id).unwrap();
    }
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn a_machine_that_does_not_respond_at_one_start_is_adopted_by_a_later_one() {
    use rustix::process::{Signal, kill_process};
    let mut host = host_with_kernel();
    let vm = create_running(&host);
    let machine = machine_of(&host, &vm);
    // The process is stopped only now, because a stopped process whose parent dies receives SIGHUP.
    host.crash();
    kill_process(machine, Signal::STOP).unwrap();
    host.serve();
    let found = host.client().vm(&vm.id).unwrap();
    assert_eq!(found.status, VmStatus::Failed);
    assert!(found.status_reason.unwrap().contains("does not respond"));
    // The guest may be running normally, so its network is kept.
    assert!(has_forward(&host, &vm) && host.taps().contains(&tap_of(&vm)));
    let (status, answer) = host.send("PATCH", &format!("/vms/{}", vm.id), br#"{"disk_size_gib": 5}"#);
    assert!(
        status == 409 && answer.contains("does not respond"),
        "{status}: {answer}"
    );
    assert_eq!(host.client().pool().unwrap().reserved_bytes, 0);

    kill_process(machine, Signal::CONT).unwrap();
    host.crash();
    host.serve();
    assert_eq!(host.client().vm(&vm.id).unwrap().status, VmStatus::Running);
    assert_eq!(machine_of(&host, &vm), machine);
    host.client().delete_vm(&vm.id).unwrap();
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

fn tap_of(vm: &Vm) -> String {
    vm.id.replace("vm-", "sb")
}

fn sweep(host: &Host) {
    for family in ["ip", "bridge"] {
        run(
            "nft",
            &["delete", "table", family, &format!("scalebox_{}", host.bridge)],
        );
    }
}

fn has_forward(host: &Host, vm: &Vm) -> bool {
    let listed = std::process::Command::new("nft")
        .args(["list", "table", "ip", &format!("scalebox_{}", host.bridge)])
        .output()
        .unwrap();
    let map = String::from_utf8_lossy(&listed.stdout).into_owned();
    map.contains(&format!("{} : ", vm.ssh_port))
}
