//! Tests guests after a power cut. The data that clients have seen is there after the next boot,
//! and damaged files are restored.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use rustix::process::{Signal, kill_process};
use scalebox_api::{Vm, VmStatus};
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};
use support::guest::{Key, machine_of, wait_for_ssh};
use support::{Host, Options, eventually, run, text};

/// Seconds from a guest's first SSH connection to its kill; `make test-host` tries every second up
/// to 20.
const MOMENTS: [u64; 3] = [0, 1, 8];

/// Returns the SSH host key that a guest presents.
fn host_key(vm: &Vm) -> String {
    eventually("the host key", || {
        let output = Command::new("ssh-keyscan")
            .args(["-T", "20", "-p", &vm.ssh_port.to_string(), &vm.ip])
            .output()
            .unwrap();
        let keys = String::from_utf8(output.stdout).unwrap();
        keys.split_once(' ').map(|(_, key)| key.to_owned())
    })
}

#[test]
fn a_guest_killed_soon_after_its_first_ssh_keeps_its_host_key() {
    let mut host = Host::new(&Options::default());
    host.import_debian();
    host.serve();
    let key = Key::new(&host, "key");
    for seconds in MOMENTS {
        let name = format!("early-{seconds}");
        let vm = host.client().create_vm(&key.request(&name)).unwrap();
        wait_for_ssh(&vm);
        let first = Instant::now();
        let shown = host_key(&vm);
        let left = Duration::from_secs(seconds).saturating_sub(first.elapsed());
        std::thread::park_timeout(left);
        kill_process(machine_of(&host, &vm), Signal::KILL).unwrap();
        eventually("its end to be seen", || {
            (host.client().vm(&name).unwrap().status == VmStatus::Failed).then_some(())
        });
        host.client().start_vm(&name).unwrap();
        wait_for_ssh(&vm);
        assert_eq!(host_key(&vm), shown, "killed after {seconds} s");
        assert_eq!(key.run(&vm, "hostname"), name);
        host.client().delete_vm(&name).unwrap();
    }
}

#[test]
fn a_guest_restores_files_damaged_by_a_power_cut() {
    let mut host = Host::new(&Options::default());
    host.import_debian();
    host.serve();
    let key = Key::new(&host, "key");
    let vm = host.client().create_vm(&key.request("healed")).unwrap();
    wait_for_ssh(&vm);
    let shown = host_key(&vm);
    // This is the effect of delayed allocation: the files exist, but their content is lost.
    let damage = |paths: &[&str]| {
        host.client().stop_vm("healed").unwrap();
        for path in paths {
            let nothing = host.folder.join("nothing");
            fs::write(&nothing, [0; 411]).unwrap();
            for request in [format!("rm {path}"), format!("write {} {path}", text(&nothing))] {
                run("debugfs", &["-w", "-R", &request, text(&host.disk(&vm))]);
            }
        }
        host.client().start_vm("healed").unwrap();
        wait_for_ssh(&vm);
        assert_eq!(key.run(&vm, "hostname; cat /etc/hostname"), "healed\nhealed");
        host_key(&vm)
    };
    assert_eq!(damage(&["/etc/hostname"]), shown, "its key was sound");
    let renewed = damage(&[
        "/etc/ssh/ssh_host_ed25519_key",
        "/etc/ssh/ssh_host_ed25519_key.pub",
        "/etc/hostname",
        "/var/lib/scalebox/instance-id",
    ]);
    assert_ne!(renewed, shown);
    assert_eq!(damage(&["/etc/hostname"]), renewed, "it keeps the new one");
}
