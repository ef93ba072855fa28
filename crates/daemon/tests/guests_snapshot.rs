//! A snapshot of a real guest that is writing, and a guest created from it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{CreateVm, SnapshotVm};
use std::process::{Command, Stdio};
use support::guest::{Key, scalebox, wait_for_ssh};
use support::{Host, Options, eventually, output_of, run, text};

const IDENTITY: &str = "cat /etc/machine-id; cat /etc/ssh/ssh_host_ed25519_key.pub; hostname";
const SOURCE: &str = "unmistakable-source";

#[test]
fn a_snapshot_of_a_writing_guest_is_consistent_and_its_copy_has_its_own_identity() {
    let mut host = Host::new(&Options::default());
    host.import_debian();
    host.serve();
    let key = Key::new(&host, "anna");
    let source = host.client().create_vm(&key.request(SOURCE)).unwrap();
    wait_for_ssh(&source);
    key.run(&source, "echo what was written > note");
    let secret = key.run(&source, "sudo sed -n 3p /etc/ssh/ssh_host_ed25519_key");
    let identity = key.run(&source, IDENTITY);
    let machine_id = identity.lines().next().unwrap();

    let mut writer = key
        .ssh(
            &source,
            "while :; do yes | head -c 1M > w; mv w written; echo >> rounds; done",
        )
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let rounds = || -> usize { key.run(&source, "cat rounds 2>/dev/null | wc -l").parse().unwrap() };
    eventually("the guest to write", || (rounds() > 0).then_some(()));
    // The agent starts later than sshd.
    eventually("the agent", || {
        (key.run(&source, "systemctl is-active qemu-guest-agent || true") == "active").then_some(())
    });

    let request = |name: &str| SnapshotVm {
        template_name: name.parse().unwrap(),
    };
    let made = host.client().snapshot_vm(SOURCE, &request("golden")).unwrap();
    println!(
        "the guest was {} and stood still for {} ms",
        made.held, made.stood_still_ms
    );
    assert_eq!((made.template.as_str(), made.held.as_str()), ("golden", "frozen"));
    assert_eq!((made.source_vm, made.size_bytes), (source.id.clone(), 2 << 30));
    let then = rounds();
    eventually("the guest to write on", || (rounds() > then).then_some(()));
    writer.kill().unwrap();
    writer.wait().unwrap();

    let image = host.folder.join("pool/templates/golden.ext4");
    run("e2fsck", &["-fn", text(&image)]);
    for identifying in [
        secret.as_str(),
        machine_id,
        SOURCE,
        key.public.split(' ').nth(1).unwrap(),
    ] {
        let found = Command::new("grep")
            .args(["-qaF", "-e", identifying, text(&image)])
            .status();
        assert_eq!(
            found.unwrap().code(),
            Some(1),
            "{identifying} is nowhere in the template"
        );
    }
    assert_eq!(
        host.client()
            .snapshot_vm(SOURCE, &request("golden"))
            .unwrap_err()
            .status(),
        Some(409)
    );
    host.client().delete_vm(&source.id).unwrap();

    let template = "golden".parse().unwrap();
    let copy = host
        .client()
        .create_vm(&CreateVm {
            template,
            ..key.request("copy")
        })
        .unwrap();
    wait_for_ssh(&copy);
    assert_eq!(key.run(&copy, "cat note"), "what was written");
    let theirs = key.run(&copy, IDENTITY);
    for (before, after) in identity.lines().zip(theirs.lines()) {
        assert_ne!(before, after);
    }
    assert_eq!(theirs.lines().nth(2), Some("copy"));

    // A stopped VM, snapshotted by the command line.
    host.client().stop_vm("copy").unwrap();
    let made = scalebox(&host, &["vm", "snapshot", "copy", "second"]);
    assert!(
        made.status.success() && output_of(&made).contains("the template second is made"),
        "{}",
        output_of(&made)
    );
    host.client().delete_vm("copy").unwrap();
    for template in ["golden", "second"] {
        host.client().delete_template(template).unwrap();
    }
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn a_guest_whose_file_system_has_quotas_boots_and_is_snapshotted() {
    let mut host = Host::new(&Options::default());
    host.import_debian();
    let image = host.folder.join("quotas");
    let base = host.folder.join("pool/templates/debian-base.ext4");
    run("cp", &["--sparse=always", text(&base), text(&image)]);
    run("tune2fs", &["-O", "quota,project", "-Q", "prjquota", text(&image)]);
    host.scaleboxd_ok(&["template", "import", "quotas", text(&image)]);
    host.serve();
    let key = Key::new(&host, "anna");
    let request = |name: &str, template: &str| CreateVm {
        template: template.parse().unwrap(),
        ..key.request(name)
    };
    let vm = host.client().create_vm(&request("counted", "quotas")).unwrap();
    wait_for_ssh(&vm);
    // It is mounted read-write, with quotas enabled.
    let mounted = key.run(&vm, "echo kept > note && sync && grep ' / ' /proc/mounts");
    assert!(mounted.contains(" rw,"), "{mounted}");
    let snapshot = SnapshotVm {
        template_name: "copied".parse().unwrap(),
    };
    host.client().snapshot_vm("counted", &snapshot).unwrap();
    host.client().delete_vm("counted").unwrap();
    let copy = host.client().create_vm(&request("copy", "copied")).unwrap();
    wait_for_ssh(&copy);
    assert_eq!(key.run(&copy, "cat note"), "kept");
}
