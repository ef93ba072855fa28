//! A snapshot of a real guest that is writing, and a guest created from it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{CreateVm, SnapshotVm, Vm, VmSource};
use std::process::{Command, Stdio};
use support::guest::{Key, scalebox, wait_for_ssh};
use support::{Host, Options, eventually, guarantee, output_of, run, text};

const IDENTITY: &str = "cat /etc/machine-id; cat /etc/ssh/ssh_host_ed25519_key.pub; hostname";
const SOURCE: &str = "unmistakable-source";
/// The template that is made from the source.
const TEMPLATE: &str = "derived";

/// A booted guest with a file, and its identity.
struct Source {
    host: Host,
    key: Key,
    vm: Vm,
    /// A line of its SSH host key's private half.
    secret: String,
    /// The output of [`IDENTITY`].
    identity: String,
}

#[test]
fn a_snapshot_of_a_writing_guest_is_consistent_and_its_copy_has_its_own_identity() {
    let mut source = Source::boot();
    guarantee(
        &mut source,
        Source::a_writing_guest_is_frozen_and_continues_after_the_snapshot,
    );
    guarantee(
        &mut source,
        Source::the_template_is_sound_and_does_not_identify_its_source,
    );
    guarantee(&mut source, Source::a_template_name_is_used_once);
    guarantee(&mut source, Source::a_copy_has_the_files_and_its_own_identity);
    guarantee(&mut source, Source::the_command_line_snapshots_a_stopped_vm);
    guarantee(&mut source, Source::deletions_leave_nothing_behind);
}

impl Source {
    fn boot() -> Source {
        let mut host = Host::new(&Options::default());
        host.import_debian();
        host.serve();
        let key = Key::new(&host, "anna");
        let vm = host.client().create_vm(&key.request(SOURCE)).unwrap();
        wait_for_ssh(&vm);
        key.run(&vm, "echo what was written > note");
        let secret = key.run(&vm, "sudo sed -n 3p /etc/ssh/ssh_host_ed25519_key");
        let identity = key.run(&vm, IDENTITY);
        Source {
            host,
            key,
            vm,
            secret,
            identity,
        }
    }

    /// Returns how often the guest has written its file.
    fn rounds(&self) -> usize {
        let printed = self.key.run(&self.vm, "cat rounds 2>/dev/null | wc -l");
        printed.parse().unwrap()
    }

    fn request() -> SnapshotVm {
        SnapshotVm {
            template_name: TEMPLATE.parse().unwrap(),
        }
    }

    fn a_writing_guest_is_frozen_and_continues_after_the_snapshot(&mut self) {
        let mut writer = self
            .key
            .ssh(
                &self.vm,
                "while :; do yes | head -c 1M > w; mv w written; echo >> rounds; done",
            )
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the guest to write", || (self.rounds() > 0).then_some(()));
        // The agent starts later than sshd.
        eventually("the agent", || {
            (self.key.run(&self.vm, "systemctl is-active qemu-guest-agent || true") == "active").then_some(())
        });

        let made = self.host.client().snapshot_vm(SOURCE, &Source::request()).unwrap();
        println!("the guest was {} for {} ms", made.held, made.stood_still_ms);
        assert_eq!((made.template.as_str(), made.held.as_str()), (TEMPLATE, "frozen"));
        assert_eq!((made.source_vm, made.size_bytes), (self.vm.id.clone(), 2 << 30));
        let before = self.rounds();
        eventually("the guest to write on", || (self.rounds() > before).then_some(()));
        writer.kill().unwrap();
        writer.wait().unwrap();
    }

    fn the_template_is_sound_and_does_not_identify_its_source(&mut self) {
        let image = self.host.folder.join(format!("pool/templates/{TEMPLATE}.ext4"));
        run("e2fsck", &["-fn", text(&image)]);
        let machine_id = self.identity.lines().next().unwrap();
        for identifying in [
            self.secret.as_str(),
            machine_id,
            SOURCE,
            self.key.public.split(' ').nth(1).unwrap(),
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
    }

    fn a_template_name_is_used_once(&mut self) {
        assert_eq!(
            self.host
                .client()
                .snapshot_vm(SOURCE, &Source::request())
                .unwrap_err()
                .status(),
            Some(409)
        );
    }

    fn a_copy_has_the_files_and_its_own_identity(&mut self) {
        let client = self.host.client();
        client.delete_vm(&self.vm.id).unwrap();

        let copy = client
            .create_vm(&CreateVm {
                source: VmSource::Template(TEMPLATE.parse().unwrap()),
                ..self.key.request("copy")
            })
            .unwrap();
        wait_for_ssh(&copy);
        assert_eq!(self.key.run(&copy, "cat note"), "what was written");
        let new_identity = self.key.run(&copy, IDENTITY);
        for (before, after) in self.identity.lines().zip(new_identity.lines()) {
            assert_ne!(before, after);
        }
        assert_eq!(new_identity.lines().nth(2), Some("copy"));
    }

    fn the_command_line_snapshots_a_stopped_vm(&mut self) {
        self.host.client().stop_vm("copy").unwrap();
        let made = scalebox(&self.host, &["vm", "snapshot", "copy", "second"]);
        assert!(
            made.status.success() && output_of(&made).contains("created the template second"),
            "{}",
            output_of(&made)
        );
    }

    fn deletions_leave_nothing_behind(&mut self) {
        let client = self.host.client();
        client.delete_vm("copy").unwrap();
        for template in [TEMPLATE, "second"] {
            client.delete_template(template).unwrap();
        }
        assert_eq!(self.host.leftovers(), Vec::<String>::new());
    }
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
        source: VmSource::Template(template.parse().unwrap()),
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
