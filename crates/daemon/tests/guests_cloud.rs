//! A cloud image of Debian: a disk in qcow2 with a GPT, whose cloud-init reads the seed drive.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{CreateExec, CreateVm, SnapshotVm, UpdateVm, Vm, VmSource};
use scalebox_client::Client;
use std::time::Instant;
use support::guest::{Key, WAIT, sh};
use support::{Host, Options, eventually, guarantee, run, template_cache, text};

const SOURCE: &str = "unmistakable-source";
const COPY: &str = "copy";
/// The template of the disk image, and the one that is made from the first VM.
const TEMPLATE: &str = "cloud";
const DERIVED: &str = "derived";
/// Lines that identify a system.
const IDENTITY: &str = "cat /etc/machine-id; cat /etc/ssh/ssh_host_ed25519_key.pub; hostname";

struct Scene {
    host: Host,
    client: Client,
    anna: Key,
    ben: Key,
    vm: Vm,
    /// The output of [`IDENTITY`].
    identity: String,
}

#[test]
fn a_cloud_image_takes_its_identity_from_the_seed_drive_grows_and_is_cloned() {
    let mut scene = Scene::boot();
    guarantee(
        &mut scene,
        Scene::the_disk_without_its_other_partitions_boots_without_a_failure,
    );
    guarantee(&mut scene, Scene::name_key_and_network_come_from_the_seed_drive);
    guarantee(&mut scene, Scene::the_disk_grows_live);
    guarantee(&mut scene, Scene::a_snapshot_has_no_trace_of_the_agent_or_the_vm);
    guarantee(&mut scene, Scene::a_copy_has_the_files_and_its_own_identity);
}

impl Scene {
    fn boot() -> Scene {
        let mut host = Host::new(&Options::default());
        host.import_debian();
        let disk = template_cache().join("cloud-disk.qcow2");
        assert!(disk.exists(), "{}: `make test` makes it", disk.display());
        host.scaleboxd_ok(&["template", "import", TEMPLATE, text(&disk)]);
        host.serve();
        let (anna, ben) = (Key::new(&host, "anna"), Key::new(&host, "ben"));
        let client = host.client();
        let begun = Instant::now();
        let vm = create(&client, &anna, TEMPLATE, SOURCE);
        println!("POST /vms to the agent: {:.1} s", begun.elapsed().as_secs_f64());
        wait_for_cloud_init(&client, SOURCE);
        println!(
            "POST /vms to the end of cloud-init: {:.1} s",
            begun.elapsed().as_secs_f64()
        );
        let identity = sh(&client, SOURCE, IDENTITY);
        Scene {
            host,
            client,
            anna,
            ben,
            vm,
            identity,
        }
    }

    /// The image's fstab names an EFI system partition, for which a boot would wait in vain.
    fn the_disk_without_its_other_partitions_boots_without_a_failure(&mut self) {
        let failed = "systemctl list-units --failed --plain --no-legend";
        assert_eq!(sh(&self.client, SOURCE, failed), "");
        let fstab = sh(&self.client, SOURCE, "cat /etc/fstab");
        let (root, efi) = fstab.split_once('\n').expect(&fstab);
        assert!(root.starts_with("/dev/vda / ext4 "), "{fstab}");
        assert!(efi.starts_with("# not imported: PARTUUID="), "{fstab}");
    }

    fn name_key_and_network_come_from_the_seed_drive(&mut self) {
        let client = &self.client;
        assert_eq!(sh(client, SOURCE, "hostname"), SOURCE);
        let addresses = sh(client, SOURCE, "ip -4 -o address show dev eth0");
        let ours = format!("inet {}", self.host.guest_addresses);
        assert!(addresses.contains(&ours), "{addresses}");
        assert!(sh(client, SOURCE, "ip route").contains("default via"));
        let resolvers = sh(client, SOURCE, "cat /run/systemd/resolve/resolv.conf");
        assert!(resolvers.contains("\nnameserver "), "{resolvers}");
        let keys = sh(client, SOURCE, "cat /home/user/.ssh/authorized_keys");
        assert_eq!(keys, self.anna.public);
        assert_eq!(self.anna.run(&self.vm, "id -un; sudo id -un"), "user\nroot");
        self.ben.is_refused_by(&self.vm);
    }

    fn the_disk_grows_live(&mut self) {
        let grown = self.client.update_vm(SOURCE, &UpdateVm::grow(5)).unwrap();
        assert_eq!(grown.disk_size_gib, 5);
        eventually("the growth of the file system", || {
            let size: u64 = sh(&self.client, SOURCE, "df --output=size -BM / | tail -1 | tr -dc 0-9")
                .parse()
                .unwrap();
            (size > 4500).then_some(())
        });
    }

    fn a_snapshot_has_no_trace_of_the_agent_or_the_vm(&mut self) {
        sh(&self.client, SOURCE, "echo what was written > /srv/note");
        let secret = sh(&self.client, SOURCE, "sed -n 3p /etc/ssh/ssh_host_ed25519_key");
        let request = SnapshotVm {
            template_name: DERIVED.parse().unwrap(),
        };
        let made = self.client.snapshot_vm(SOURCE, &request).unwrap();
        assert_eq!(made.held, "frozen");
        self.client.delete_vm(SOURCE).unwrap();
        let image = self.host.folder.join(format!("pool/templates/{DERIVED}.ext4"));
        run("e2fsck", &["-fn", text(&image)]);
        let machine_id = self.identity.lines().next().unwrap();
        let key = self.anna.public.split(' ').nth(1).unwrap();
        for trace in ["scalebox", &secret, machine_id, SOURCE, key] {
            assert!(!contains(text(&image), trace), "{trace} is in the template");
        }
    }

    fn a_copy_has_the_files_and_its_own_identity(&mut self) {
        let vm = create(&self.client, &self.ben, DERIVED, COPY);
        wait_for_cloud_init(&self.client, COPY);
        assert_eq!(sh(&self.client, COPY, "cat /srv/note"), "what was written");
        let identity = sh(&self.client, COPY, IDENTITY);
        assert_eq!(identity.lines().count(), 3, "{identity}");
        for (before, after) in self.identity.lines().zip(identity.lines()) {
            assert_ne!(before, after);
        }
        assert_eq!(identity.lines().last(), Some(COPY));
        assert_eq!(self.ben.run(&vm, "id -un"), "user");
        self.anna.is_refused_by(&vm);
        self.client.delete_vm(COPY).unwrap();
        assert_eq!(self.host.leftovers(), Vec::<String>::new());
    }
}

fn create(client: &Client, key: &Key, template: &str, name: &str) -> Vm {
    let request = CreateVm {
        source: VmSource::Template(template.parse().unwrap()),
        ..key.request(name)
    };
    client.create_vm_and_wait(&request, WAIT).unwrap()
}

fn wait_for_cloud_init(client: &Client, vm: &str) {
    // The agent responds before systemd has started cloud-init, whose own way of waiting takes a
    // tenth of an emulated processor.
    let status = "until [ -e /run/cloud-init/result.json ]; do sleep 1; done; cloud-init status --wait --long";
    let request = CreateExec {
        timeout_seconds: Some(280),
        ..CreateExec::of_command(status)
    };
    let ended = client.run_exec(vm, &request).unwrap();
    let all = [&*ended.stdout, &*ended.stderr].concat();
    assert!(
        all.contains("status: done") && all.contains("DataSourceNoCloud"),
        "{ended:?}"
    );
}

/// Returns whether a file contains a text.
fn contains(file: &str, text: &str) -> bool {
    let found = std::process::Command::new("grep")
        .args(["-qaF", "-e", text, file])
        .status();
    match found.unwrap().code() {
        Some(0) => true,
        Some(1) => false,
        other => panic!("grep: {other:?}"),
    }
}
