//! Pools without an image: on a separate device, and in a folder on an XFS. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{SnapshotVm, UpdateVm};
use std::fs;
use std::path::Path;
use support::{Host, HostDisk, Options, eventually, run, text};

const GIB: u64 = 1 << 30;

/// Checks that VMs can be created, grown, snapshotted and deleted.
fn check_vm_operations(host: &mut Host) {
    let client = host.client();
    let vm = host.create_stopped("tiny", Some(2));
    let grown = client.update_vm(&vm.id, &UpdateVm::grow(3)).unwrap();
    assert!(grown.disk_size_gib == 3 && grown.disk.unwrap().confirmed);
    run("e2fsck", &["-fn", text(&host.disk(&vm))]);
    let template_name = "derived".parse().unwrap();
    client.snapshot_vm(&vm.id, &SnapshotVm { template_name }).unwrap();
    let copy = host.create_stopped("derived", None);
    run("e2fsck", &["-fn", text(&host.disk(&copy))]);
    eventually("the disk usage", || {
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
    client.delete_template("derived").unwrap();
    eventually("the commitments to be released", || {
        let pool = client.pool().unwrap();
        (pool.committed_bytes == 0 && pool.reserved_bytes == 0).then_some(())
    });
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn a_pool_in_a_folder_on_xfs_works_and_does_not_manage_the_file_system() {
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
    // Other tests expect disks at this path.
    std::os::unix::fs::symlink(&pool, host.folder.join("pool")).unwrap();
    host.import_tiny("tiny");
    host.serve();
    check_vm_operations(&mut host);
    let info = host.client().pool().unwrap();
    assert_eq!(
        (info.file_system.as_str(), info.image, info.host_free_bytes),
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
    let printed = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(printed.contains("on xfs, which supports reflinks"), "{printed}");
    host.terminate();
    host.scaleboxd_ok(&["down"]);
    assert!(pool.join("vms").is_dir(), "the file system stays mounted");
}

#[test]
fn a_pool_on_a_separate_device_works_and_is_unmounted() {
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
        check_vm_operations(&mut host);
        let info = host.client().pool().unwrap();
        assert_eq!(
            (info.file_system.as_str(), info.image, &info.device),
            ("btrfs", None, &device)
        );
        assert_eq!(info.capacity_bytes, 25 * GIB);

        // A request that does not fit makes the pool grow to the rest of the device.
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
