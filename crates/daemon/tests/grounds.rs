//! A daemon whose pool has no image: on a device of its own, and in a folder on an XFS. No guest is
//! booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

mod support;

use scalebox_client::{SnapshotVm, UpdateVm};
use std::fs;
use std::path::Path;
use support::{Host, HostDisk, Options, eventually, run, text};

const GIB: u64 = 1 << 30;

/// Makes, grows, snapshots and deletes VMs.
fn serves(host: &mut Host) {
    let client = host.client();
    let vm = host.create_stopped("tiny", Some(2));
    let grown = client.update_vm(&vm.id, &UpdateVm::grow(3)).unwrap();
    assert!(grown.disk_size_gib == 3 && grown.disk.unwrap().confirmed);
    run("e2fsck", &["-fn", text(&host.disk(&vm))]);
    let template_name = "golden".parse().unwrap();
    client.snapshot_vm(&vm.id, &SnapshotVm { template_name }).unwrap();
    let copy = host.create_stopped("golden", None);
    run("e2fsck", &["-fn", text(&host.disk(&copy))]);
    eventually("the accounts", || {
        let pool = client.pool().unwrap();
        let parts = [
            pool.vms_exclusive_bytes?,
            pool.templates_exclusive_bytes?,
            pool.shared_bytes?,
            pool.other_bytes?,
        ];
        (parts.iter().sum::<u64>().abs_diff(pool.used_bytes) * 100 <= pool.used_bytes).then_some(())
    });

    host.crash();
    host.serve();
    let client = host.client();
    assert_eq!(client.vms().unwrap().len(), 2);
    for vm in [&vm, &copy] {
        client.delete_vm(&vm.id).unwrap();
    }
    client.delete_template("golden").unwrap();
    eventually("the promises to be taken back", || {
        let pool = client.pool().unwrap();
        (pool.committed_bytes == 0 && pool.reserved_bytes == 0).then_some(())
    });
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn a_daemon_serves_from_a_folder_on_xfs_and_leaves_the_file_system_to_its_owner() {
    let disk = HostDisk::made("30G", "mkfs.xfs", &["-q"]);
    let pool = disk.folder.join("pool");
    let mut host = Host::new(&Options {
        env: &[
            ("POOL_IMAGE", "none"),
            ("DATA_DIR", text(&pool)),
            ("ACCOUNTING_SECONDS", "1"),
        ],
        ..Options::default()
    });
    // Where the tests look for disks.
    std::os::unix::fs::symlink(&pool, host.folder.join("pool")).unwrap();
    host.import_tiny("tiny");
    host.serve();
    serves(&mut host);
    let told = host.client().pool().unwrap();
    assert_eq!(
        (told.file_system.as_str(), told.image, told.host_free_bytes),
        ("xfs", None, None)
    );
    for (path, body) in [("/pool/grow", &b""[..]), ("/pool/shrink", br#"{"size_gib": 20}"#)] {
        let (status, answer) = host.send("POST", path, body);
        assert!(
            status == 400 && answer.contains("on an existing file system"),
            "{status} {answer}"
        );
    }
    let doctor = host.scaleboxd(&["doctor"]).output().unwrap();
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(said.contains("on xfs, and clones files"), "{said}");
    host.terminate();
    host.scaleboxd_ok(&["down"]);
    assert!(pool.join("vms").is_dir(), "the file system stays mounted");
}

#[test]
fn a_daemon_serves_from_a_device_of_its_own_and_takes_it_down() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("disk");
    run("truncate", &["-s", "30G", text(&file)]);
    let device = run("losetup", &["--find", "--show", text(&file)]).trim().to_owned();
    {
        let mut host = Host::new(&Options {
            pool_size: "25G",
            env: &[
                ("POOL_IMAGE", ""),
                ("POOL_DEVICE", &device),
                ("POOL_AUTO_GROW", "on"),
                ("ACCOUNTING_SECONDS", "1"),
            ],
            ..Options::default()
        });
        host.import_tiny("tiny");
        host.serve();
        serves(&mut host);
        let told = host.client().pool().unwrap();
        assert_eq!(
            (told.file_system.as_str(), told.image, &told.device),
            ("btrfs", None, &device)
        );
        assert_eq!(told.capacity_bytes, 25 * GIB);

        // A request that does not fit is what the rest of the device is for.
        let vm = host.create_stopped("tiny", Some(26));
        assert_eq!(host.client().pool().unwrap().capacity_bytes, 30 * GIB);
        host.client().delete_vm(&vm.id).unwrap();
        assert_eq!(host.client().shrink_pool(20).unwrap().capacity_bytes, 20 * GIB);
        host.terminate();
        let mounted = |path: &Path| fs::read_to_string("/proc/self/mounts").unwrap().contains(text(path));
        let pool = host.folder.join("pool");
        assert!(mounted(&pool));
        host.scaleboxd_ok(&["down"]);
        assert!(!mounted(&pool));
        host.scaleboxd_ok(&["pool", "init"]);
        assert!(mounted(&pool) && pool.join("templates/tiny.ext4").exists());
    }
    run("losetup", &["--detach", &device]);
}
