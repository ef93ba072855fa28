//! A change of the pool's size that fails at any of its steps has not happened, and can be tried again at once.
//!
//! Built with the feature `fault-points` alone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

mod support;

use scalebox_client::{Client, PoolInfo};
use std::fs;
use support::{Host, HostDisk, Options, eventually, run, text};

const GIB: u64 = 1 << 30;
const BEFORE: u64 = 30;

/// Steps behind which something can fail, with the request that comes to them.
const STEPS: [(&str, Change); 5] = [
    ("pool grow: image larger", Change::Grow),
    ("pool grow: device larger", Change::Grow),
    ("pool shrink: ceiling lowered", Change::Shrink),
    ("pool shrink: file system smaller", Change::Shrink),
    ("pool shrink: image smaller", Change::Shrink),
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    Grow,
    Shrink,
}

impl Change {
    fn size(self) -> u64 {
        match self {
            Change::Grow => BEFORE + 2,
            Change::Shrink => BEFORE - 5,
        }
    }

    fn ask(self, client: &Client) -> Result<PoolInfo, String> {
        let answer = match self {
            Change::Grow => client.grow_pool(Some(self.size())),
            Change::Shrink => client.shrink_pool(self.size()),
        };
        answer.map_err(|error| error.to_string())
    }
}

/// Image, loop device and file system, in GiB.
fn layers(host: &Host, disk: &HostDisk) -> [u64; 3] {
    let image = disk.folder.join("pool.img");
    let device = run("losetup", &["-n", "-O", "NAME", "-j", text(&image)]);
    let device: u64 = run("blockdev", &["--getsize64", device.trim()]).trim().parse().unwrap();
    let file_system = host.client().pool().unwrap().capacity_bytes;
    [fs::metadata(&image).unwrap().len(), device, file_system].map(|size| size / GIB)
}

#[test]
fn a_change_of_size_that_fails_has_not_happened_and_can_be_tried_again_at_once() {
    let disk = HostDisk::ext4("100G");
    for (step, change) in STEPS {
        for mode in ["once", "lasting"] {
            let mut host = Host::new(&Options {
                image_dir: Some(&disk.folder),
                ..Options::default()
            });
            host.set("SCALEBOX_FAULT", &format!("{mode} {step}"));
            host.serve();
            let client = host.client();
            let free = client.pool().unwrap().free_bytes;
            let failed = change.ask(&client).expect_err(step);
            assert!(failed.contains("injected behind the step"), "{failed}");
            assert_eq!(layers(&host, &disk), [BEFORE; 3], "{mode} {step}");
            assert!(client.pool().unwrap().free_bytes.abs_diff(free) < GIB, "{mode} {step}");

            if mode == "lasting" {
                change.ask(&client).expect_err(step);
                assert_eq!(layers(&host, &disk), [BEFORE; 3], "{step}");
                // Nobody was told that it happened: it does not happen at the next start either.
                host.crash();
                host.set("SCALEBOX_FAULT", "");
                host.serve();
                assert_eq!(layers(&host, &disk), [BEFORE; 3], "{step}, after a restart");
            }
            let changed = change
                .ask(&host.client())
                .unwrap_or_else(|error| panic!("{mode} {step}: {error}"));
            assert_eq!(changed.capacity_bytes, change.size() * GIB);
            assert_eq!(layers(&host, &disk), [change.size(); 3], "{mode} {step}");
            drop(host);
            fs::remove_file(disk.folder.join("pool.img")).unwrap();
        }
    }
}

#[test]
fn a_growth_by_itself_that_fails_has_not_happened() {
    let disk = HostDisk::ext4("100G");
    let mut host = Host::new(&Options {
        pool_size: "20G",
        image_dir: Some(&disk.folder),
        env: &[("POOL_AUTO_GROW", "on"), ("POOL_LOW_WATER_GIB", "0")],
    });
    host.import_tiny("tiny");
    host.set("SCALEBOX_FAULT", "once pool grow: device larger");
    host.serve();
    let body = format!(
        r#"{{"template": "tiny", "ssh_public_key": "{}", "disk_size_gib": 25, "start": false}}"#,
        support::KEY
    );
    let (status, answer) = host.send("POST", "/vms", body.as_bytes());
    assert_eq!(status, 507, "{answer}");
    eventually("the failure in the log", || {
        host.log().contains("the pool did not grow by itself").then_some(())
    });
    assert_eq!(layers(&host, &disk), [20; 3]);
    host.client().grow_pool(Some(22)).unwrap();
    assert_eq!(layers(&host, &disk), [22; 3]);
}
