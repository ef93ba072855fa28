//! The disk under `STATE_DIR` in trouble: it loses writes, is full, or is read-only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

mod support;

use scalebox_client::{ClientError, CreateVm, UpdateVm};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use support::{Host, HostDisk, Options, run, text};
use tempfile::TempDir;

/// An ext4 file system on a device that holds what is written to it only while there is room behind
/// it, as a thin volume does. A write for which there is none fails.
struct ThinDisk {
    store: PathBuf,
    folder: PathBuf,
    _scratch: TempDir,
}

impl ThinDisk {
    fn new() -> ThinDisk {
        let scratch = tempfile::tempdir().unwrap();
        let (store, folder) = (scratch.path().join("store"), scratch.path().join("disk"));
        fs::create_dir(&store).unwrap();
        fs::create_dir(&folder).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=80M", "thin", text(&store)]);
        let disk = ThinDisk {
            store,
            folder,
            _scratch: scratch,
        };
        run("truncate", &["-s", "64M", text(&disk.image())]);
        run(
            "mke2fs",
            &["-q", "-t", "ext4", "-b", "4096", "-J", "size=4", text(&disk.image())],
        );
        // All blocks exist, the journal's and the tables' too; then those of free space are given
        // back.
        run("fallocate", &["-l", "64M", text(&disk.image())]);
        // Nothing is committed but what is flushed.
        run(
            "mount",
            &["-o", "loop,commit=600", text(&disk.image()), text(&disk.folder)],
        );
        disk.refuse_whole_requests();
        run("fstrim", &[text(&disk.folder)]);
        disk
    }

    /// A loop device reports success for a request of which it could write a part, so each is one
    /// block of the store.
    fn refuse_whole_requests(&self) {
        let device = run("findmnt", &["-n", "-o", "SOURCE", text(&self.folder)]);
        let name = device.trim().trim_start_matches("/dev/");
        fs::write(format!("/sys/block/{name}/queue/max_sectors_kb"), "4").unwrap();
    }

    fn image(&self) -> PathBuf {
        self.store.join("image")
    }

    /// Takes all room that is left behind the device.
    fn exhaust(&self) {
        let ballast = File::create(self.store.join("ballast")).unwrap();
        for size in [1 << 20, 4096] {
            let mut end = ballast.metadata().unwrap().len();
            while rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), end, size).is_ok() {
                end += size;
            }
        }
    }

    fn refill(&self) {
        fs::remove_file(self.store.join("ballast")).unwrap();
    }

    /// The names of the VMs in the state file, if the power were cut now.
    fn vms_after_a_power_cut(&self) -> BTreeSet<String> {
        let scratch = tempfile::tempdir().unwrap();
        let (copy, folder) = (scratch.path().join("image"), scratch.path().join("disk"));
        run("cp", &["--sparse=always", text(&self.image()), text(&copy)]);
        fs::create_dir(&folder).unwrap();
        run("mount", &["-o", "loop", text(&copy), text(&folder)]);
        let names = names_in_state(&folder.join("state.db"));
        run("umount", &[text(&folder)]);
        names
    }
}

impl Drop for ThinDisk {
    fn drop(&mut self) {
        run("umount", &[text(&self.folder)]);
        run("umount", &[text(&self.store)]);
    }
}

fn names_in_state(file: &Path) -> BTreeSet<String> {
    let state = rusqlite::Connection::open(file).unwrap();
    let check: String = state.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(check, "ok");
    let mut names = state.prepare("SELECT name FROM vms").unwrap();
    names
        .query_map([], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

fn named(host: &Host, name: &str) -> CreateVm {
    CreateVm {
        name: Some(name.parse().unwrap()),
        ..host.stopped("tiny")
    }
}

fn status(error: &ClientError) -> u16 {
    match error {
        ClientError::Refused { status, .. } => *status,
        other => panic!("{other}"),
    }
}

fn host_with_state_in(folder: &Path) -> Host {
    Host::with_tiny_template(&Options {
        env: &[("STATE_DIR", text(folder))],
        ..Options::default()
    })
}

#[test]
fn answers_hold_after_a_power_cut_of_a_disk_that_loses_writes() {
    let disk = ThinDisk::new();
    let host = host_with_state_in(&disk.folder);
    let mut told = BTreeSet::new();
    let create = |name: &str, told: &mut BTreeSet<String>| {
        let created = host.client().create_vm(&named(&host, name));
        if created.is_ok() {
            told.insert(name.to_owned());
        }
        assert_eq!(
            disk.vms_after_a_power_cut(),
            *told,
            "behind the answer to {name}: {created:?}"
        );
        created
    };
    for n in 0..4 {
        create(&format!("before-{n}"), &mut told).unwrap();
    }
    disk.exhaust();
    // The log may have some blocks left.
    let refusal = (0..64).find_map(|n| create(&format!("during-{n}"), &mut told).err());
    assert_eq!(status(&refusal.expect("a write that is lost")), 500);
    let deleted = host.client().delete_vm("before-0");
    assert_eq!(status(&deleted.unwrap_err()), 500);
    assert_eq!(disk.vms_after_a_power_cut(), told);
    assert!(
        host.client().vm("before-0").is_ok(),
        "a VM that could not be deleted is there"
    );

    disk.refill();
    for n in 0..4 {
        create(&format!("behind-{n}"), &mut told).unwrap();
    }
    host.client().delete_vm("before-0").unwrap();
    told.remove("before-0");
    assert_eq!(disk.vms_after_a_power_cut(), told);
    let listed: BTreeSet<_> = host.client().vms().unwrap().into_iter().map(|vm| vm.name).collect();
    assert_eq!(listed, told);
}

/// Leaves no room on the file system of `folder`, in any size of blocks.
fn fill(folder: &Path) {
    let ballast = File::create(folder.join("ballast")).unwrap();
    for size in [1 << 20, 4096] {
        let mut end = ballast.metadata().unwrap().len();
        while rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), end, size).is_ok() {
            end += size;
        }
    }
}

#[test]
fn a_deletion_that_cannot_be_recorded_changes_nothing() {
    // Too small for a reserve.
    let disk = HostDisk::ext4("40M");
    let mut host = host_with_state_in(&disk.folder);
    host.create_stopped("tiny", Some(1));
    let vm = host.client().create_vm(&named(&host, "kept")).unwrap();
    fill(&disk.folder);
    // Changes are written until the log needs another block.
    let refusal = (2..200).find_map(|size| host.client().update_vm("kept", &limit(size)).err());
    let refusal = refusal.expect("a full disk");
    assert_eq!(status(&refusal), 507, "{refusal}");
    let refusal = host.client().delete_vm("kept").unwrap_err();
    assert_eq!(status(&refusal), 507, "{refusal}");
    assert!(refusal.to_string().contains("the disk of STATE_DIR"), "{refusal}");
    let before = host.client().vm("kept").unwrap();
    assert!(host.disk(&vm).exists());

    fs::remove_file(disk.folder.join("ballast")).unwrap();
    host.crash();
    host.serve();
    let behind = host.client().vm("kept").unwrap();
    assert_eq!((behind.disk_iops, behind.status), (before.disk_iops, before.status));
    host.client().delete_vm("kept").unwrap();
    assert!(!host.disk(&vm).exists());
}

fn limit(iops: u64) -> UpdateVm {
    UpdateVm {
        disk_iops: Some(Some(iops)),
        ..UpdateVm::default()
    }
}

#[test]
fn vms_can_be_deleted_on_a_full_state_disk_also_when_the_daemon_starts_on_it() {
    let disk = HostDisk::ext4("200M");
    let mut host = host_with_state_in(&disk.folder);
    for name in ["one", "two", "three"] {
        host.client().create_vm(&named(&host, name)).unwrap();
    }
    assert!(host.terminate().success());
    fill(&disk.folder);
    host.serve();
    host.client().delete_vm("one").unwrap();
    for iops in 1..100 {
        // Uses the room up again.
        let _until_full = host.client().update_vm("three", &limit(iops));
    }
    host.client().delete_vm("two").unwrap();
    host.crash();
    host.serve();
    let left: Vec<_> = host.client().vms().unwrap().into_iter().map(|vm| vm.name).collect();
    assert_eq!(left, ["three"]);
    assert!(host.log().contains("the room reserved for that is used up now"));
}

#[test]
fn a_daemon_whose_state_is_read_only_serves_what_there_is_and_changes_nothing() {
    let disk = HostDisk::ext4("200M");
    let mut host = host_with_state_in(&disk.folder);
    host.client().create_vm(&named(&host, "kept")).unwrap();
    // A log that is not in the file itself yet.
    host.crash();
    run("mount", &["-o", "remount,ro", text(&disk.folder)]);
    host.serve();
    assert_eq!(host.client().vm("kept").unwrap().name, "kept");
    for (method, path, body) in [
        ("POST", "/vms", r#"{"template": "tiny", "start": false}"#.to_owned()),
        ("PATCH", "/vms/kept", r#"{"disk_size_gib": 5}"#.to_owned()),
        ("PATCH", "/vms/kept", r#"{"autostart": false}"#.to_owned()),
        ("DELETE", "/vms/kept", String::new()),
    ] {
        let body = body.replacen(
            '{',
            &format!(r#"{{"ssh_public_key": "{}", "#, support::KEY),
            usize::from(path == "/vms"),
        );
        let (status, said) = host.send(method, path, body.as_bytes());
        assert_eq!(status, 503, "{method} {path}: {said}");
        assert!(said.contains("read-only"), "{method} {path}: {said}");
    }
    let vm = host.client().vm("kept").unwrap();
    assert_eq!((vm.disk_size_gib, vm.autostart), (2, true));
    assert_eq!(host.leftovers().len(), 1, "its disk: {:?}", host.leftovers());
    assert!(host.terminate().success());
    run("mount", &["-o", "remount,rw", text(&disk.folder)]);
    host.serve();
    host.client().delete_vm("kept").unwrap();
}
