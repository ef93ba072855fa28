//! Problems of the disk under `STATE_DIR`: it loses writes, is full, or is read-only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{CreateVm, UpdateVm};
use scalebox_client::ClientError;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use support::{Host, HostDisk, Options, run, text};
use tempfile::TempDir;

/// An ext4 file system on a device like a thin volume. Writes to it fail once its backing store is
/// full.
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
        // Allocates all blocks, including journal and tables; then discards those that are free.
        run("fallocate", &["-l", "64M", text(&disk.image())]);
        // Only flushed data is committed.
        run(
            "mount",
            &["-o", "loop,commit=600", text(&disk.image()), text(&disk.folder)],
        );
        disk.refuse_whole_requests();
        run("fstrim", &[text(&disk.folder)]);
        disk
    }

    /// Limits the device's requests to one block of the store. Otherwise the loop device could
    /// write a request in part and report success.
    fn refuse_whole_requests(&self) {
        let device = run("findmnt", &["-n", "-o", "SOURCE", text(&self.folder)]);
        let name = device.trim().trim_start_matches("/dev/");
        fs::write(format!("/sys/block/{name}/queue/max_sectors_kb"), "4").unwrap();
    }

    fn image(&self) -> PathBuf {
        self.store.join("image")
    }

    /// Uses up the space that is left in the store.
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

    /// Returns the names of the VMs in the state file if the power were cut now.
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
fn reported_changes_survive_a_power_cut_on_a_disk_that_loses_writes() {
    let disk = ThinDisk::new();
    let host = host_with_state_in(&disk.folder);
    let mut reported = BTreeSet::new();
    let create = |name: &str, reported: &mut BTreeSet<String>| {
        let created = host.client().create_vm(&named(&host, name));
        if created.is_ok() {
            reported.insert(name.to_owned());
        }
        assert_eq!(
            disk.vms_after_a_power_cut(),
            *reported,
            "after the response to {name}: {created:?}"
        );
        created
    };
    for n in 0..4 {
        create(&format!("before-{n}"), &mut reported).unwrap();
    }
    disk.exhaust();
    // The log may have some allocated blocks left.
    let refusal = (0..64).find_map(|n| create(&format!("during-{n}"), &mut reported).err());
    assert_eq!(status(&refusal.expect("a write that is lost")), 500);
    let deleted = host.client().delete_vm("before-0");
    assert_eq!(status(&deleted.unwrap_err()), 500);
    assert_eq!(disk.vms_after_a_power_cut(), reported);
    assert!(
        host.client().vm("before-0").is_ok(),
        "a VM that could not be deleted is there"
    );

    disk.refill();
    for n in 0..4 {
        create(&format!("after-{n}"), &mut reported).unwrap();
    }
    host.client().delete_vm("before-0").unwrap();
    reported.remove("before-0");
    assert_eq!(disk.vms_after_a_power_cut(), reported);
    let listed: BTreeSet<_> = host.client().vms().unwrap().into_iter().map(|vm| vm.name).collect();
    assert_eq!(listed, reported);
}

/// Fills the file system of `folder`, down to the smallest blocks.
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
    // The file system is too small for a reserve.
    let disk = HostDisk::ext4("40M");
    let mut host = host_with_state_in(&disk.folder);
    host.create_stopped("tiny", Some(1));
    let vm = host.client().create_vm(&named(&host, "kept")).unwrap();
    fill(&disk.folder);
    // Makes changes until the log needs another block.
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
    let after = host.client().vm("kept").unwrap();
    assert_eq!((after.disk_iops, after.status), (before.disk_iops, before.status));
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
fn vms_can_be_deleted_on_a_full_state_disk_even_after_a_restart() {
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
        // Uses up the space again.
        let _until_full = host.client().update_vm("three", &limit(iops));
    }
    host.client().delete_vm("two").unwrap();
    host.crash();
    host.serve();
    let left: Vec<_> = host.client().vms().unwrap().into_iter().map(|vm| vm.name).collect();
    assert_eq!(left, ["three"]);
    assert!(host.log().contains("the reserved space is now in use"));
}

#[test]
fn a_daemon_with_a_read_only_state_serves_reads_and_rejects_changes() {
    let disk = HostDisk::ext4("200M");
    let mut host = host_with_state_in(&disk.folder);
    host.client().create_vm(&named(&host, "kept")).unwrap();
    // Leaves a log that is not yet written to the file.
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
        let (status, answer) = host.send(method, path, body.as_bytes());
        assert_eq!(status, 503, "{method} {path}: {answer}");
        assert!(answer.contains("read-only"), "{method} {path}: {answer}");
    }
    let vm = host.client().vm("kept").unwrap();
    assert_eq!((vm.disk_size_gib, vm.autostart), (2, true));
    assert_eq!(host.leftovers().len(), 1, "its disk: {:?}", host.leftovers());
    assert!(host.terminate().success());
    run("mount", &["-o", "remount,rw", text(&disk.folder)]);
    host.serve();
    host.client().delete_vm("kept").unwrap();
}
