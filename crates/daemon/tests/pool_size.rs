//! A failed automatic growth changes nothing, and the pool can be grown right afterwards.
//!
//! This test is built only with the feature `fault-points`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use std::fs;
use support::{Host, HostDisk, Options, eventually, run, text};

const GIB: u64 = 1 << 30;

/// Returns the sizes of image, loop device and file system, in GiB.
fn layers(host: &Host, disk: &HostDisk) -> [u64; 3] {
    let image = disk.folder.join("pool.img");
    let device = run("losetup", &["-n", "-O", "NAME", "-j", text(&image)]);
    let device: u64 = run("blockdev", &["--getsize64", device.trim()]).trim().parse().unwrap();
    let file_system = host.client().pool().unwrap().capacity_bytes;
    [fs::metadata(&image).unwrap().len(), device, file_system].map(|size| size / GIB)
}

#[test]
fn a_failed_automatic_growth_changes_nothing() {
    let disk = HostDisk::ext4("100G");
    let mut host = Host::new(&Options {
        pool_size: "20G",
        image_dir: Some(&disk.folder),
        env: &[("POOL_AUTO_GROW", "on"), ("POOL_LOW_WATER_GIB", "0")],
    });
    host.import_tiny("tiny");
    host.serve();
    host.arm(Some("once 1 pool grow: device larger"));
    let body = format!(
        r#"{{"template": "tiny", "ssh_public_key": "{}", "disk_size_gib": 25, "start": false}}"#,
        support::KEY
    );
    let (status, answer) = host.send("POST", "/vms", body.as_bytes());
    assert_eq!(status, 507, "{answer}");
    eventually("the failure in the log", || {
        host.log().contains("cannot grow the pool automatically").then_some(())
    });
    assert_eq!(layers(&host, &disk), [20; 3]);
    host.client().grow_pool(Some(22)).unwrap();
    assert_eq!(layers(&host, &disk), [22; 3]);
}
