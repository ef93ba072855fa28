//! Disk usage and commitments through the API: every block has an owner, and a ratio of 1
//! overcommits nothing.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use scalebox_api::{CreateVm, PoolInfo, StorageUsage};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use support::{Host, Options, eventually, run, text};

const MIB: u64 = 1 << 20;

fn write(disk: &Path, offset: u64, length: u64) {
    let file = File::options().write(true).open(disk).unwrap();
    file.write_all_at(&vec![0x5a; length as usize], offset).unwrap();
    file.sync_all().unwrap();
}

/// Returns the pool's figures, measured after now, with all writes included.
fn measured(host: &Host) -> PoolInfo {
    run("btrfs", &["filesystem", "sync", text(&host.folder.join("pool"))]);
    let before = host.client().pool().unwrap().measured_at;
    // The measurement in progress may have begun before the writes; the one after it has not.
    let next = |before: Option<String>| {
        eventually("a measurement", || {
            let pool = host.client().pool().unwrap();
            (pool.measured_at.is_some() && pool.measured_at != before).then_some(pool)
        })
    };
    let in_progress = next(before).measured_at;
    next(in_progress)
}

#[test]
fn disk_usage_covers_every_block_and_agrees_with_btrfs() {
    let host = Host::with_tiny_template(&Options {
        env: &[("ACCOUNTING_SECONDS", "1")],
        ..Options::default()
    });
    let [one, two] = [0, 1].map(|_| host.create_stopped("tiny", Some(5)));
    write(&host.disk(&one), 1 << 30, 96 * MIB);
    write(&host.disk(&two), 1 << 30, 32 * MIB);
    fs::write(host.kernel_folder().join("vmlinuz"), vec![1; 8 << 20]).unwrap();

    let pool = measured(&host);
    let parts = [
        pool.vms_exclusive_bytes,
        pool.templates_exclusive_bytes,
        pool.shared_bytes,
        pool.other_bytes,
    ];
    let sum: u64 = parts.iter().map(|part| part.unwrap()).sum();
    assert!(
        sum.abs_diff(pool.used_bytes) * 100 <= pool.used_bytes,
        "{parts:?} of {pool:?}"
    );
    assert_eq!(pool.other_bytes, Some(8 * MIB));
    assert!(pool.vms_exclusive_bytes.unwrap() >= 128 * MIB);
    assert_eq!(pool.days_left, None, "no estimate without a history");

    let usage = |vm: &str| -> StorageUsage { host.client().vm(vm).unwrap().storage.unwrap() };
    let (first, second) = (usage(&one.id), usage(&two.id));
    assert_eq!((first.provisioned_bytes, second.provisioned_bytes), (5 << 30, 5 << 30));
    assert!((96 * MIB..98 * MIB).contains(&first.exclusive_bytes), "{first:?}");
    assert!((32 * MIB..34 * MIB).contains(&second.exclusive_bytes), "{second:?}");
    assert!(
        first.used_bytes > first.exclusive_bytes,
        "it shares the template's blocks: {first:?}"
    );
    assert_eq!(
        pool.vms_exclusive_bytes,
        Some(first.exclusive_bytes + second.exclusive_bytes)
    );
    let template = host.client().templates().unwrap().remove(0);
    assert_eq!(template.storage.unwrap().provisioned_bytes, template.size_bytes);

    host.client().delete_vm(&one.id).unwrap();
    let after = measured(&host);
    assert_eq!(after.vms_exclusive_bytes, Some(second.exclusive_bytes));
}

#[test]
fn with_a_ratio_of_one_written_blocks_are_not_counted_twice() {
    let host = Host::with_tiny_template(&Options {
        env: &[("OVERCOMMIT_RATIO", "1"), ("ACCOUNTING_SECONDS", "1")],
        ..Options::default()
    });
    let first = host.create_stopped("tiny", Some(10));
    run("fallocate", &["-o", "1G", "-l", "6G", text(&host.disk(&first))]);
    let request = CreateVm {
        disk_size_gib: Some(10),
        ..host.stopped("tiny")
    };
    // 6 GiB written, 20 committed, 2 kept free: added up, they would exceed the 26 GiB that a
    // pool of 30 GiB can back.
    eventually("the measurement of disk usage", || {
        host.client().create_vm(&request).ok()
    });
    let pool = host.client().pool().unwrap();
    assert_eq!((pool.committed_bytes, pool.reserved_bytes), (20 << 30, 0));
}
