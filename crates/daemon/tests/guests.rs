//! Tests the main features with real guests: Debian booted by QEMU and reached over SSH through the
//! forward.
//!
//! Guests are emulated on most machines and take many seconds to boot, so few are booted, and each
//! one tests several features.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{AutoExtend, CreateVm, EventKind, UpdateVm, Vm, VmStatus};
use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use support::guest::{Key, machine_of, machines, scalebox, wait_for_ssh};
use support::{Host, Options, eventually, guarantee, output_of, run, text};

fn root_size_gib(key: &Key, vm: &Vm) -> f64 {
    let bytes: f64 = key.run(vm, "df --output=size -B1 / | tail -n 1").parse().unwrap();
    bytes / f64::from(1 << 30)
}

/// Two booted guests, each with the key of its own user.
struct Guests {
    host: Host,
    anna: Key,
    ben: Key,
    first: Vm,
    second: Vm,
}

#[test]
fn guests_have_their_own_disks_names_and_keys_and_survive_the_daemon() {
    let mut guests = Guests::boot();
    guarantee(&mut guests, Guests::guests_have_their_own_keys_disks_and_identities);
    guarantee(&mut guests, Guests::the_command_line_runs_commands_in_a_guest);
    guarantee(&mut guests, Guests::disks_grow_live);
    guarantee(&mut guests, Guests::disk_limits_apply_from_setting_to_removal);
    guarantee(&mut guests, Guests::disks_extend_themselves_up_to_their_limit);
    guarantee(&mut guests, Guests::the_agent_responds_on_a_vsock);
    guarantee(&mut guests, Guests::sessions_survive_a_killed_daemon);
    guarantee(&mut guests, Guests::machines_survive_sigterm);
    guarantee(&mut guests, Guests::a_stop_shuts_the_guest_down_cleanly);
    guarantee(&mut guests, Guests::a_guest_that_powers_off_is_stopped);
    guarantee(&mut guests, Guests::a_stopped_vm_starts_with_its_port_and_its_files);
    guarantee(
        &mut guests,
        Guests::a_root_without_modules_for_its_kernel_gets_them_from_their_drive,
    );
    guarantee(&mut guests, Guests::a_vm_whose_process_dies_is_failed);
    guarantee(&mut guests, Guests::deleted_vms_leave_nothing_behind);
}

impl Guests {
    /// Boots both guests at the same time.
    fn boot() -> Guests {
        let mut host = Host::new(&Options::default());
        host.import_debian();
        host.serve();
        let (anna, ben) = (Key::new(&host, "anna"), Key::new(&host, "ben"));

        let first = host.client().create_vm(&anna.request("first")).unwrap();
        let second = host
            .client()
            .create_vm(&CreateVm {
                disk_size_gib: Some(10),
                ..ben.request("second")
            })
            .unwrap();
        assert_eq!(
            (first.status, first.disk_size_gib, second.disk_size_gib),
            (VmStatus::Running, 2, 10)
        );
        let waited = scalebox(&host, &["vm", "wait", "second", "--timeout", "300"]);
        assert!(waited.status.success(), "{}", output_of(&waited));
        wait_for_ssh(&first);
        // The hypervisor reports that the agent is up: a guest that has booted may reboot any
        // number of times.
        eventually("its agent", || {
            host.log().contains("qemu-guest-agent opened its port").then_some(())
        });
        Guests {
            host,
            anna,
            ben,
            first,
            second,
        }
    }

    fn guests_have_their_own_keys_disks_and_identities(&mut self) {
        let Guests {
            anna,
            ben,
            first,
            second,
            ..
        } = self;
        assert_eq!(anna.run(first, "hostname"), "first");
        assert_eq!(ben.run(second, "hostname"), "second");
        anna.is_refused_by(second);
        ben.is_refused_by(first);
        let (small, large) = (root_size_gib(anna, first), root_size_gib(ben, second));
        assert!((1.8..=2.0).contains(&small), "the default: {small} GiB");
        assert!((9.5..=10.0).contains(&large), "the requested size: {large} GiB");
        assert_eq!(ben.run(second, "id -un; id -u; sudo -n id -u"), "user\n1000\n0");
        assert_eq!(
            ben.run(second, "sudo findmnt -n -o FSTYPE --target /run/scalebox"),
            "tmpfs",
            "keys are in a tmpfs"
        );
        assert_ne!(
            anna.run(first, "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub"),
            ben.run(second, "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub")
        );
    }

    fn the_command_line_runs_commands_in_a_guest(&mut self) {
        let by_cli = scalebox(
            &self.host,
            &[
                "vm",
                "ssh",
                "second",
                "-i",
                text(&self.ben.private),
                "--",
                "echo",
                "through the CLI",
            ],
        );
        assert!(output_of(&by_cli).contains("through the CLI"), "{}", output_of(&by_cli));
    }

    /// Checks that the response confirms a growth only when the guest's file system has grown.
    fn disks_grow_live(&mut self) {
        let grown = self.host.client().update_vm("first", &UpdateVm::grow(6)).unwrap();
        let disk = grown.disk.expect("the state of the file system");
        assert!(disk.confirmed, "{disk:?}");
        let reported = disk.guest_total_bytes.expect("the size reported by the agent") as f64 / f64::from(1 << 30);
        let seen = root_size_gib(&self.anna, &self.first);
        assert!(
            (5.5..=6.0).contains(&reported) && (5.5..=6.0).contains(&seen),
            "reported {reported}, seen {seen}"
        );
    }

    /// Checks in the guest that limits apply from the moment they are set until they are removed.
    fn disk_limits_apply_from_setting_to_removal(&mut self) {
        let limit = |disk_iops, disk_mbps| {
            let change = UpdateVm {
                disk_iops: Some(disk_iops),
                disk_mbps: Some(disk_mbps),
                ..UpdateVm::default()
            };
            self.host.client().update_vm("first", &change).unwrap();
        };
        // Returns how long the guest takes for these writes, in seconds, bypassing its cache.
        let write = |size: &str, count: u32| -> f64 {
            let dd = format!("dd if=/dev/zero of=w bs={size} count={count} oflag=direct conv=notrunc 2>&1 | tail -n 1");
            let printed = self.anna.run(&self.first, &dd);
            let seconds = printed.split(", ").nth(2).and_then(|part| part.strip_suffix(" s"));
            seconds.unwrap_or_else(|| panic!("{printed}")).parse().unwrap()
        };
        let free = write("4k", 400);
        limit(Some(100), None);
        // Four seconds' worth, of which one second's worth may pass at once.
        let by_requests = write("4k", 400);
        limit(None, Some(4));
        let by_bytes = write("1M", 16);
        limit(None, None);
        println!("400 writes: {free} s, and {by_requests} s at 100 a second; 16 MiB at 4 MB/s: {by_bytes} s");
        assert!(by_requests > 2.9 && by_bytes > 2.9, "{by_requests} {by_bytes}");
        assert!(write("4k", 400) < by_requests);
    }

    /// Checks that a disk extends itself before its guest is full, by its increment and up to its
    /// limit.
    fn disks_extend_themselves_up_to_their_limit(&mut self) {
        let client = self.host.client();
        let extend = AutoExtend {
            threshold_percent: 60,
            increment_gib: 2,
            limit_gib: 9,
        };
        let change = UpdateVm {
            disk_auto_extend: Some(Some(extend)),
            ..UpdateVm::default()
        };
        assert_eq!(
            client.update_vm("first", &change).unwrap().disk_auto_extend,
            Some(extend)
        );
        for (file, size, grown) in [("one", "3600M", 8), ("two", "1500M", 9)] {
            // Uses space in the guest's file system, and none on the host.
            self.anna.run(&self.first, &format!("fallocate -l {size} {file}"));
            eventually(&format!("the disk to extend itself to {grown} GiB"), || {
                (client.vm("first").unwrap().disk_size_gib == grown).then_some(())
            });
            eventually("the guest to see it", || {
                (root_size_gib(&self.anna, &self.first) > grown as f64 - 0.5).then_some(())
            });
        }
        let reported: Vec<_> = client
            .events(Some(0), false)
            .unwrap()
            .map(Result::unwrap)
            .filter(|event| event.kind == EventKind::Grown)
            .map(|event| (event.details["by"].clone(), event.details["to_gib"].clone()))
            .collect();
        assert_eq!(
            reported,
            [
                ("request".into(), 6.into()),
                ("auto_extend".into(), 8.into()),
                ("auto_extend".into(), 9.into())
            ]
        );
        self.anna.run(&self.first, "rm one two");
    }

    /// Checks the agent's other transport, a vsock. QEMU has no host end for it here, so the guest
    /// connects to itself, through a loopback transport that it refuses to load.
    fn the_agent_responds_on_a_vsock(&mut self) {
        let (key, vm) = (&self.anna, &self.first);
        let refused = key.ssh(vm, "sudo modprobe vsock_loopback").output().unwrap();
        assert!(
            !refused.status.success(),
            "any user could reach the agent: {}",
            output_of(&refused)
        );
        let load = "cd /usr/lib/modules/$(uname -r)/kernel/net/vmw_vsock && sudo modprobe vsock \
                    && for name in vmw_vsock_virtio_transport_common vsock_loopback; do sudo insmod $name.ko; done";
        key.run(vm, load);
        let ask = r#"perl -e 'use Socket; socket(S, 40, SOCK_STREAM, 0) or die "socket: $!";
            connect(S, pack("SSLLx4", 40, 0, 1024, 1)) or die "connect: $!";
            syswrite(S, "{\"execute\":\"guest-ping\"}\n"); sysread(S, $answer, 100); print $answer'"#;
        eventually("the agent on the vsock", || {
            let answer = key.ssh(vm, ask).output().unwrap();
            (answer.stdout.trim_ascii() == br#"{"return": {}}"#).then_some(())
        });
    }

    /// Kills the daemon with three VMs running and an SSH session open. Machines and session
    /// continue, and the next daemon adopts them.
    fn sessions_survive_a_killed_daemon(&mut self) {
        let host = &mut self.host;
        let third = host.client().create_vm(&self.ben.request("third")).unwrap();
        let mut session = self
            .anna
            .ssh(&self.first, "cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut to_guest = session.stdin.take().unwrap();
        let mut from_guest = BufReader::new(session.stdout.take().unwrap());
        let mut echo = |text: &str| {
            writeln!(to_guest, "{text}").unwrap();
            let mut line = String::new();
            from_guest.read_line(&mut line).unwrap();
            assert_eq!(line.trim(), text);
        };
        echo("before");
        let before = machines(host);
        assert_eq!(before.len(), 3);
        host.crash();
        echo("without a daemon");
        host.serve();
        echo("with the next daemon");
        assert_eq!(machines(host), before);
        let statuses: Vec<_> = host.client().vms().unwrap().into_iter().map(|vm| vm.status).collect();
        assert_eq!(statuses, [VmStatus::Running; 3]);
        // The daemon controls all three; the second is stopped below.
        let grown = host.client().update_vm("first", &UpdateVm::grow(10)).unwrap();
        assert!(grown.disk.expect("the state of the file system").confirmed);
        host.client().delete_vm(&third.id).unwrap();
        assert_eq!(machines(host).len(), 2);
        echo("with two machines");
        drop(to_guest);
        session.wait().unwrap();
    }

    fn machines_survive_sigterm(&mut self) {
        let before = machines(&self.host);
        assert!(self.host.terminate().success());
        assert_eq!(machines(&self.host), before);
        self.host.serve();
    }

    /// Checks that a stopped VM keeps its disk and its port.
    fn a_stop_shuts_the_guest_down_cleanly(&mut self) {
        let (host, second) = (&self.host, &self.second);
        self.ben.run(second, "echo kept > note && sync");
        let mounted = "findmnt -n -o SOURCE --target /usr/lib/modules/$(uname -r)";
        assert_eq!(
            self.ben.run(second, mounted),
            "/dev/vda",
            "the root has its own modules"
        );
        // This is the root of an older template.
        self.ben
            .run(second, "cd /usr/lib/modules && sudo mv $(uname -r) 0.0-older && sync");
        let stopped = host.client().stop_vm("second").unwrap();
        assert_eq!((stopped.status, stopped.ssh_port), (VmStatus::Stopped, second.ssh_port));
        let header = run("dumpe2fs", &["-h", text(&host.disk(second))]);
        assert!(!header.contains("needs_recovery"), "the guest unmounted its root");
        let console = fs::read_to_string(host.console(second)).unwrap();
        assert!(
            console.contains("Power down"),
            "the console log has the guest's last output: {console:?}"
        );
        assert_eq!(machines(host).len(), 1);
    }

    fn a_guest_that_powers_off_is_stopped(&mut self) {
        let _connection_ends = self.anna.ssh(&self.first, "sudo systemctl poweroff").output().unwrap();
        eventually("the guest's own shutdown", || {
            (self.host.client().vm("first").unwrap().status == VmStatus::Stopped).then_some(())
        });
        assert_eq!(self.host.taps(), Vec::<String>::new());
    }

    fn a_stopped_vm_starts_with_its_port_and_its_files(&mut self) {
        let second = &self.second;
        let started = self.host.client().start_vm("second").unwrap();
        assert_eq!((started.status, started.ssh_port), (VmStatus::Running, second.ssh_port));
        wait_for_ssh(second);
        assert_eq!(self.ben.run(second, "cat note; hostname"), "kept\nsecond");
    }

    fn a_root_without_modules_for_its_kernel_gets_them_from_their_drive(&mut self) {
        let (ben, second) = (&self.ben, &self.second);
        let mounted = "findmnt -n -o SOURCE,FSTYPE --mountpoint /usr/lib/modules/$(uname -r) | tr -s ' '";
        assert_eq!(ben.run(second, mounted), "/dev/vdc ext4");
        let load = "sudo modprobe overlay && grep -c ^overlay /proc/modules; \
                    sudo touch /usr/lib/modules/$(uname -r)/x 2>&1 | grep -o 'Read-only file system'";
        assert_eq!(ben.run(second, load), "1\nRead-only file system");
    }

    fn a_vm_whose_process_dies_is_failed(&mut self) {
        let host = &self.host;
        rustix::process::kill_process(machine_of(host, &self.second), rustix::process::Signal::KILL).unwrap();
        let failed = eventually("the failure", || {
            let vm = host.client().vm("second").unwrap();
            (vm.status == VmStatus::Failed).then_some(vm)
        });
        let reason = failed.status_reason.expect("why it failed");
        assert!(reason.contains("last console output:"), "{reason}");
    }

    fn deleted_vms_leave_nothing_behind(&mut self) {
        let host = &self.host;
        host.client().delete_vm("first").unwrap();
        host.client().delete_vm("second").unwrap();
        assert_eq!(host.leftovers(), Vec::<String>::new());
        assert_eq!(machines(host), Vec::<String>::new());
    }
}

/// A host whose daemon was killed during eight creations, and started again.
struct AfterCrash {
    host: Host,
    key: Key,
    /// The ids of the VMs whose creation was reported to a client.
    reported: HashSet<String>,
    listed: Vec<Vm>,
}

#[test]
fn a_crash_during_eight_creations_loses_no_vm_and_leaves_no_orphaned_machine() {
    let mut crashed = AfterCrash::new();
    guarantee(&mut crashed, AfterCrash::every_reported_vm_runs_and_nothing_is_orphaned);
    guarantee(&mut crashed, AfterCrash::unrecorded_and_hung_machines_are_killed);
    guarantee(&mut crashed, AfterCrash::an_adopted_guest_is_reachable);
    guarantee(&mut crashed, AfterCrash::running_vms_are_started_after_a_reboot);
    guarantee(&mut crashed, AfterCrash::the_last_vm_leaves_nothing_behind);
}

impl AfterCrash {
    fn new() -> AfterCrash {
        let mut host = Host::new(&Options::default());
        host.import_debian();
        host.serve();
        let key = Key::new(&host, "key");
        let client = host.client();
        let reported: HashSet<String> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..8)
                .map(|n| {
                    let (client, request) = (
                        &client,
                        CreateVm {
                            disk_size_gib: Some(3),
                            ..key.request(&format!("vm-{n}"))
                        },
                    );
                    scope.spawn(move || client.create_vm(&request).ok().map(|vm| vm.id))
                })
                .collect();
            eventually("three VMs", || (host.client().vms().unwrap().len() >= 3).then_some(()));
            host.crash();
            workers
                .into_iter()
                .filter_map(|worker| worker.join().unwrap())
                .collect()
        });
        host.serve();
        let listed = host.client().vms().unwrap();
        AfterCrash {
            host,
            key,
            reported,
            listed,
        }
    }

    fn every_reported_vm_runs_and_nothing_is_orphaned(&mut self) {
        let AfterCrash {
            host, reported, listed, ..
        } = self;
        let ids: HashSet<String> = listed.iter().map(|vm| vm.id.clone()).collect();
        assert!(reported.is_subset(&ids), "lost: {:?}", reported.difference(&ids));
        for vm in listed.iter() {
            assert_eq!(vm.status, VmStatus::Running, "{vm:?}");
        }
        assert_eq!(machines(host).len(), listed.len(), "no machine is orphaned");
        assert_eq!(host.taps().len(), listed.len());
        let disks = fs::read_dir(host.folder.join("pool/vms")).unwrap().count();
        assert_eq!(disks, listed.len());
        assert_eq!(host.client().pool().unwrap().reserved_bytes, 0);
    }

    /// Checks that two other leftovers of a crash are killed. They are a machine whose start was
    /// not recorded, and a machine that hangs.
    fn unrecorded_and_hung_machines_are_killed(&mut self) {
        let AfterCrash { host, listed, .. } = self;
        let [_, unrecorded, hung, ..] = listed.as_slice() else {
            panic!("{} VMs are too few", listed.len())
        };
        host.crash();
        change_state(
            host,
            "UPDATE vms SET status = 'stopped' WHERE id = ?",
            &[&unrecorded.id],
        );
        let pid = machine_of(host, hung);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        host.serve();
        assert_eq!(host.client().vm(&unrecorded.id).unwrap().status, VmStatus::Stopped);
        let found = host.client().vm(&hung.id).unwrap();
        assert_eq!(found.status, VmStatus::Failed);
        assert!(found.status_reason.unwrap().contains("does not respond"));
        assert_eq!(machines(host).len(), listed.len() - 1, "the unrecorded one was killed");
        host.client().delete_vm(&hung.id).unwrap();
        assert_eq!(
            machines(host).len(),
            listed.len() - 2,
            "the hung one was killed with its VM"
        );
    }

    /// Checks one adopted guest over SSH. Deletes the other VMs first, so that this guest has the
    /// processor to itself.
    fn an_adopted_guest_is_reachable(&mut self) {
        let (kept, hung) = (&self.listed[0], &self.listed[2]);
        for vm in self.listed.iter().filter(|vm| vm.id != kept.id && vm.id != hung.id) {
            self.host.client().delete_vm(&vm.id).unwrap();
        }
        wait_for_ssh(kept);
        assert_eq!(self.key.run(kept, "hostname"), kept.name);
    }

    /// Simulates a reboot of the host: all machines are gone, and the boot id differs.
    fn running_vms_are_started_after_a_reboot(&mut self) {
        let (host, kept) = (&mut self.host, &self.listed[0]);
        host.crash();
        rustix::process::kill_process(machine_of(host, kept), rustix::process::Signal::KILL).unwrap();
        change_state(host, "UPDATE facts SET value = 'another' WHERE key = 'boot_id'", &[]);
        host.serve();
        eventually("the VM to be started again", || {
            (host.client().vm(&kept.id).unwrap().status == VmStatus::Running).then_some(())
        });
        assert_eq!(machines(host).len(), 1);
    }

    fn the_last_vm_leaves_nothing_behind(&mut self) {
        let host = &self.host;
        host.client().delete_vm(&self.listed[0].id).unwrap();
        assert_eq!(host.leftovers(), Vec::<String>::new());
        assert_eq!(machines(host), Vec::<String>::new());
    }
}

fn change_state(host: &Host, statement: &str, values: &[&String]) {
    let state = rusqlite::Connection::open(host.folder.join("state/state.db")).unwrap();
    state.execute(statement, rusqlite::params_from_iter(values)).unwrap();
}
