//! Snapshots of disks in real pools: the contents that a template has, and those that were removed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step ends the test"
)]

mod support;

use scalebox_storage::{Bounds, Pool, StorageError, Template};
use scalebox_units::{Bytes, Gib};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use support::{MAX, Place, Stocked, USUAL, disk_path, finish_snapshot, found_in, name, run, text, vm_id};

const HOST_KEY: &str = "b3BlbnNzaC1rZXktdjEAAAAA-the-private-host-key";
const DELETED_KEY: &str = "a-key-that-the-guest-had-deleted";
const MACHINE_ID: &str = "0123456789abcdef0123456789abcdef";
const HOST_NAME: &str = "so-secret-otter";
const SEEDED: &str = "AAAAC3NzaC1lZDI1NTE5AAAAIJustAPublicKeyThatWasSeeded";
const OWN: &str = "AAAAC3NzaC1lZDI1NTE5AAAAIAKeyThatThePersonAddedThemself";

/// Creates an image with the files of a used guest.
fn used_guest(folder: &Path) -> PathBuf {
    let (root, image) = (folder.join("root"), folder.join("guest.ext4"));
    let put = |path: &str, content: &str| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    put("etc/ssh/ssh_host_ed25519_key", HOST_KEY);
    put(
        "etc/ssh/ssh_host_ed25519_key.pub",
        &format!("ssh-ed25519 AAAA {HOST_NAME}\n"),
    );
    put("etc/ssh/ssh_host_ \"odd\" key", "left alone\n");
    put("etc/ssh/sshd_config", "UsePAM yes\n");
    put("etc/machine-id", &format!("{MACHINE_ID}\n"));
    put("etc/hostname", &format!("{HOST_NAME}\n"));
    put(
        "etc/hosts",
        &format!("127.0.0.1 localhost\n127.0.1.1 {HOST_NAME}.lan {HOST_NAME}\n192.0.2.9 other\n"),
    );
    put("var/lib/dbus/machine-id", MACHINE_ID);
    put("var/lib/scalebox/instance-id", "vm-0123456789ab\n");
    put(
        &format!("var/log/journal/{MACHINE_ID}/system.journal"),
        &format!("_HOSTNAME={HOST_NAME}").repeat(999),
    );
    put("var/log/syslog", &format!("Jan 1 {HOST_NAME} sshd\n"));
    put("var/log/wtmp", HOST_NAME);
    put("var/log/mine.log", "my own log\n");
    put("var/lib/cloud/instances/i-1/sem/config_ssh", HOST_NAME);
    put(
        "home/user/.ssh/authorized_keys",
        &format!("ssh-ed25519 {SEEDED} me\nssh-ed25519 {OWN} me too\n"),
    );
    put("home/user/work", "what was written\n");
    put("deleted", DELETED_KEY);
    run("mke2fs", &["-q", "-t", "ext4", "-d", text(&root), text(&image), "64M"]);
    run("debugfs", &["-w", "-R", "rm /deleted", text(&image)]);
    image
}

fn contains(file: &Path, needle: &str) -> bool {
    let found = Command::new("grep")
        .args(["-qaF", "-e", needle, text(file)])
        .status()
        .unwrap();
    assert_ne!(found.code(), Some(2), "grep");
    found.success()
}

fn cat(image: &Path, path: &str) -> String {
    run("debugfs", &["-R", &format!("cat {path}"), text(image)])
}

/// Creates a pool with the disk `vm-1`, cloned from a template with a guest's files.
fn with_a_used_disk() -> Stocked {
    let stocked = Stocked::new("20G", USUAL);
    add_used_disk(&stocked);
    stocked
}

fn add_used_disk(stocked: &Stocked) {
    let scratch = tempfile::tempdir().unwrap();
    let pool = &stocked.pool;
    pool.import_template(&name("used"), &used_guest(scratch.path()), MAX, false)
        .unwrap();
    let admitted = pool.admit(Bytes::from_mib(64)).unwrap();
    pool.create_disk(&vm_id("vm-1"), &name("used"), &admitted).unwrap();
    admitted.commit();
}

fn snapshot(pool: &Pool, template: &str) -> Result<Template, StorageError> {
    let mut snapshot = pool.begin_snapshot(&name(template))?;
    pool.flush_disk(&vm_id("vm-1"))?;
    pool.take_snapshot(&mut snapshot, &vm_id("vm-1"))?;
    finish_snapshot(pool, snapshot, HOST_NAME, &format!("ssh-ed25519 {SEEDED} me"))
}

fn template_path(stocked: &Stocked, template: &str) -> PathBuf {
    stocked.place.plan.data_dir.join(format!("templates/{template}.ext4"))
}

#[test]
fn a_snapshot_keeps_the_files_and_removes_the_identity() {
    let stocked = with_a_used_disk();
    let disk = disk_path(&stocked.pool, &vm_id("vm-1"));
    let secrets = [HOST_KEY, DELETED_KEY, MACHINE_ID, HOST_NAME, SEEDED, "vm-0123456789ab"];
    for secret in secrets {
        assert!(contains(&disk, secret), "the disk lacks {secret}");
    }
    let before = fs::read(&disk).unwrap();

    let made = snapshot(&stocked.pool, "derived").unwrap();
    assert_eq!(made.size, Bytes::from_mib(64));
    let image = template_path(&stocked, "derived");
    for secret in secrets {
        assert!(!contains(&image, secret), "the template contains {secret}");
    }
    let checked = Command::new("e2fsck").args(["-fn", text(&image)]).output().unwrap();
    assert_eq!(
        checked.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&checked.stdout)
    );
    assert!(run("dumpe2fs", &["-h", text(&image)]).contains("has_journal"));

    assert_eq!(cat(&image, "/home/user/work"), "what was written\n");
    assert_eq!(cat(&image, "/etc/ssh/sshd_config"), "UsePAM yes\n");
    assert_eq!(cat(&image, "/var/log/mine.log"), "my own log\n");
    assert_eq!(cat(&image, "/etc/hosts"), "127.0.0.1 localhost\n192.0.2.9 other\n");
    assert_eq!(
        cat(&image, "/home/user/.ssh/authorized_keys"),
        format!("ssh-ed25519 {OWN} me too\n")
    );
    assert_eq!(cat(&image, "/etc/machine-id"), "");
    assert!(run("debugfs", &["-R", "stat /etc/machine-id", text(&image)]).contains("Size: 0"));
    assert!(run("debugfs", &["-R", "ls -l /var/log", text(&image)]).contains("journal"));
    let ssh = run("debugfs", &["-R", "ls /etc/ssh", text(&image)]);
    assert!(ssh.contains("odd") && !ssh.contains("ssh_host_ed25519_key"), "{ssh}");

    assert!(fs::read(&disk).unwrap() == before, "the disk changed");
    // No temporary files are left next to the template.
    let left: Vec<_> = fs::read_dir(image.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|file| file.contains("partial"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn with_a_ratio_of_one_a_snapshot_is_admitted_for_the_shared_blocks() {
    let backed = Bounds {
        overcommit_ratio: 1.0,
        ..USUAL
    };
    let stocked = Stocked::new("20G", backed);
    let pool = &stocked.pool;
    stocked.create("vm-1", 6);
    stocked.create("vm-2", 7);
    // Represents 5 GiB written by a guest, which it may overwrite again.
    let disk = disk_path(pool, &vm_id("vm-1"));
    run("fallocate", &["-l", "5G", text(&disk)]);
    pool.measure().unwrap();
    let before = pool.commitments();
    let refused = snapshot(pool, "derived").unwrap_err();
    assert!(matches!(refused, StorageError::Insufficient { .. }), "{refused}");
    assert_eq!(pool.commitments(), before);
    assert!(!template_path(&stocked, ".derived").with_extension("partial").exists());

    pool.delete_disk(&vm_id("vm-2")).unwrap();
    pool.release(Gib::new(7).bytes());
    pool.measure().unwrap();
    snapshot(pool, "derived").unwrap();
    assert_eq!(pool.commitments().reserved, Bytes::ZERO);
    // The shared blocks are no longer committed.
    pool.measure().unwrap();
    assert!(pool.admit(Gib::new(7).bytes()).is_err());
}

#[test]
fn snapshots_work_in_a_pool_with_an_unusual_path() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("an \"odd\" path's \\ name");
    fs::create_dir(&folder).unwrap();
    let stocked = Stocked::in_place(Place::at(&folder, Some("20G")), USUAL);
    add_used_disk(&stocked);
    snapshot(&stocked.pool, "derived").unwrap();
    let image = template_path(&stocked, "derived");
    assert_eq!(found_in(&image, &[HOST_KEY, SEEDED]), Vec::<&str>::new());
}

#[test]
fn a_guest_named_localhost_keeps_localhost_in_its_hosts_file() {
    let stocked = with_a_used_disk();
    let mut snapshot = stocked.pool.begin_snapshot(&name("derived")).unwrap();
    stocked.pool.take_snapshot(&mut snapshot, &vm_id("vm-1")).unwrap();
    finish_snapshot(&stocked.pool, snapshot, "localhost", "").unwrap();
    let hosts = cat(&template_path(&stocked, "derived"), "/etc/hosts");
    assert!(hosts.starts_with("127.0.0.1 localhost\n"), "{hosts}");
}

#[test]
fn one_of_many_concurrent_snapshots_holds_a_name() {
    let stocked = Stocked::new("20G", USUAL);
    let (pool, partial) = (&stocked.pool, template_path(&stocked, "x").with_file_name(".x.partial"));
    let (begun, held) = (Barrier::new(8), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                begun.wait();
                for _ in 0..200 {
                    match pool.begin_snapshot(&name("x")) {
                        Ok(snapshot) => {
                            assert_eq!(held.fetch_add(1, Ordering::SeqCst), 0, "held twice");
                            assert!(partial.exists(), "removed by a concurrent snapshot");
                            held.fetch_sub(1, Ordering::SeqCst);
                            drop(snapshot);
                        }
                        Err(StorageError::TemplateBeingMade(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert!(!partial.exists());
}

#[test]
fn a_template_name_is_used_once_and_failures_leave_nothing_behind() {
    let stocked = with_a_used_disk();
    let pool = &stocked.pool;
    let held = pool.begin_snapshot(&name("derived")).unwrap();
    assert!(matches!(
        snapshot(pool, "derived"),
        Err(StorageError::TemplateBeingMade(_))
    ));
    assert!(matches!(snapshot(pool, "tiny"), Err(StorageError::TemplateExists(_))));
    let reserved = pool.commitments().reserved;
    drop(held);
    assert!(pool.commitments().reserved < reserved, "the reservation is released");

    // A disk without a file system.
    let disk = disk_path(pool, &vm_id("vm-1"));
    run(
        "dd",
        &[
            "if=/dev/zero",
            &format!("of={}", text(&disk)),
            "bs=1M",
            "count=64",
            "conv=notrunc",
            "status=none",
        ],
    );
    let refused = snapshot(pool, "derived").unwrap_err();
    assert!(matches!(refused, StorageError::UnfitDisk(_)), "{refused}");
    assert!(pool.template(&name("derived")).is_err());
    let templates = template_path(&stocked, "derived");
    let left = fs::read_dir(templates.parent().unwrap()).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().contains("derived")
    });
    assert_eq!(left.count(), 0);
}
