//! Disk usage in real pools, compared with btrfs-progs and with the space that a deletion frees.

#![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

mod support;

use scalebox_storage::{Bounds, Pool, PoolUsage};
use scalebox_units::{Bytes, Gib};
use std::fs::{self, File};
use std::path::Path;
use support::{MAX, Stocked, USUAL, disk_path, name, run, text, vm_id, write};

const MIB: u64 = 1 << 20;

fn punch(path: &Path, offset: u64, length: u64) {
    let (offset, length) = (offset.to_string(), length.to_string());
    run("fallocate", &["-p", "-o", &offset, "-l", &length, text(path)]);
    File::open(path).unwrap().sync_all().unwrap();
}

fn sync(pool: &Pool) {
    run("btrfs", &["filesystem", "sync", text(pool.path())]);
}

/// Returns mapped and exclusive bytes of a file from `btrfs filesystem du --raw`. It counts the
/// mapped parts of extents, not whole extents.
fn du(path: &Path) -> (Bytes, Bytes) {
    let output = run("btrfs", &["filesystem", "du", "--raw", "-s", text(path)]);
    let line = output.lines().nth(1).unwrap();
    let mut numbers = line
        .split_whitespace()
        .map(|field| Bytes::new(field.parse().unwrap_or(0)));
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// Checks that the sum of the parts is within 1 % of the used space that btrfs reports.
fn check_total(pool: &Pool, accounts: &PoolUsage) {
    let (used, total) = (pool.space().unwrap().used.as_u64(), accounts.total().as_u64());
    assert!(
        used.abs_diff(total) * 100 <= used,
        "btrfs reports {used}, the parts sum up to {total}: {accounts:?}"
    );
}

fn measured(pool: &Pool) -> PoolUsage {
    sync(pool);
    let accounts = pool.measure().unwrap();
    check_total(pool, &accounts);
    accounts
}

#[test]
fn used_and_exclusive_match_btrfs() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    let [a, b, c] = ["vm-a", "vm-b", "vm-c"].map(|id| stocked.create(id, 1));
    // The writes go over the template's own blocks, and into a hole.
    write(&disk_path(pool, &a), 0, 64 * 1024);
    write(&disk_path(pool, &a), 300 * MIB, 100 * MIB);
    write(&disk_path(pool, &b), 500 * MIB, 40 * MIB);
    fs::write(pool.kernels_dir().join("vmlinuz"), vec![1; 8 << 20]).unwrap();
    let accounts = measured(pool);
    for id in [&a, &b, &c] {
        let usage = accounts.disks[id];
        assert_eq!((usage.used, usage.exclusive), du(&disk_path(pool, id)), "{id}");
        assert_eq!(usage.provisioned, Gib::new(1).bytes());
    }
    let template = accounts.templates[&stocked.template.name];
    assert_eq!(template.provisioned, stocked.template.size);
    // The template's usage includes its record.
    let record = template.used - stocked.template.used;
    assert!(record <= Bytes::new(4096), "{record}");
    assert_eq!(
        accounts.disks_exclusive,
        accounts.disks.values().map(|usage| usage.exclusive).sum()
    );
    assert_eq!(accounts.other, Bytes::from_mib(8));
    assert!(accounts.shared > Bytes::ZERO);
    // Only the disks' exclusive extents are reclaimable.
    assert_eq!(
        accounts.unreclaimable(),
        accounts.templates_exclusive + accounts.shared + accounts.other
    );
}

#[test]
fn a_deletion_frees_the_exclusive_bytes_also_after_a_partial_discard() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    let [a, b] = ["vm-a", "vm-b"].map(|id| stocked.create(id, 1));
    write(&disk_path(pool, &a), 300 * MIB, 64 * MIB);
    write(&disk_path(pool, &b), 300 * MIB, 16 * MIB);
    // A hole in the middle of an extent: the file maps less, the extent stays whole.
    punch(&disk_path(pool, &a), 310 * MIB, 32 * MIB);
    let accounts = measured(pool);
    let usage = accounts.disks[&a];
    assert!(
        usage.exclusive >= usage.used - Bytes::from_mib(2) + Bytes::from_mib(32),
        "{usage:?}"
    );
    assert!(
        accounts.unreclaimable() >= Bytes::from_mib(32),
        "no commitment covers the unmapped part of an extent"
    );

    let before = pool.space().unwrap().used;
    pool.delete_disk(&a).unwrap();
    pool.release(Gib::new(1).bytes());
    sync(pool);
    assert_eq!(before - pool.space().unwrap().used, usage.exclusive);
    let after = measured(pool);
    assert!(!after.disks.contains_key(&a));
    assert_eq!(after.disks[&b], accounts.disks[&b]);
}

#[test]
fn blocks_of_a_deleted_template_belong_to_its_clones() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("big.ext4");
    // The template has one large extent after ext4's own metadata.
    run("mke2fs", &["-q", "-t", "ext4", text(&source), "256M"]);
    let big = pool.import_template(&name("big"), &source, MAX, false).unwrap();
    let template = pool.path().join("templates/big.ext4");
    write(&template, 100 * MIB, 64 * MIB);
    let admitted = pool.admit(Gib::new(1).bytes()).unwrap();
    let (a, b) = (vm_id("vm-a"), vm_id("vm-b"));
    for id in [&a, &b] {
        pool.create_disk(id, &big.name, &admitted).unwrap();
    }
    admitted.commit();
    // Overwrite every second MiB: the writes go to new blocks, and the old extents stay because
    // they are larger than 1 MiB.
    for odd in (1..64).step_by(2) {
        write(&disk_path(pool, &a), (100 + odd) * MIB, MIB);
    }
    pool.delete_template(&big.name).unwrap();
    let accounts = measured(pool);
    assert!(accounts.shared >= Bytes::from_mib(56), "{accounts:?}");
    assert!(accounts.unreclaimable() >= Bytes::from_mib(56));

    // Only one clone is left, which maps half of each extent.
    pool.delete_disk(&b).unwrap();
    let accounts = measured(pool);
    let usage = accounts.disks[&a];
    assert!(usage.exclusive >= usage.used + Bytes::from_mib(24), "{usage:?}");
    assert!(accounts.unreclaimable() >= Bytes::from_mib(24), "{accounts:?}");
    let before = pool.space().unwrap().used;
    pool.delete_disk(&a).unwrap();
    sync(pool);
    assert_eq!(before - pool.space().unwrap().used, usage.exclusive);
}

#[test]
fn deleted_but_open_files_count_as_other() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    let id = stocked.create("vm-a", 1);
    write(&disk_path(pool, &id), 300 * MIB, 32 * MIB);
    let open = File::open(disk_path(pool, &id)).unwrap();
    let exclusive = measured(pool).disks[&id].exclusive;
    pool.delete_disk(&id).unwrap();
    assert_eq!(measured(pool).other, exclusive);
    drop(open);
    assert_eq!(measured(pool).other, Bytes::ZERO);
}

#[test]
fn a_measurement_is_valid_until_templates_change() {
    let stocked = Stocked::new(
        "30G",
        Bounds {
            buffer: Gib::new(2),
            overcommit_ratio: 1.0,
        },
    );
    let pool = &stocked.pool;
    let id = stocked.create("vm-a", 1);
    assert!(pool.needs_measuring(), "nothing was measured yet");
    write(&disk_path(pool, &id), 300 * MIB, 512 * MIB);
    sync(pool);
    assert_eq!(
        pool.space().unwrap().unreclaimable,
        pool.space().unwrap().used,
        "without a measurement, all of it may be unreclaimable"
    );
    let accounts = pool.measure().unwrap();
    assert!(!pool.needs_measuring());
    assert_eq!(pool.space().unwrap().unreclaimable, accounts.unreclaimable());
    assert!(
        accounts.unreclaimable() < Bytes::from_mib(64),
        "the commitment covers the blocks that the disk wrote: {accounts:?}"
    );
    // A disk from an existing base image changes nothing. Another size needs a new base image,
    // which is part of the templates.
    stocked.create("vm-b", 1);
    assert!(!pool.needs_measuring());
    let admitted = pool.admit(Gib::new(2).bytes()).unwrap();
    pool.create_disk(&vm_id("vm-c"), &stocked.template.name, &admitted)
        .unwrap();
    assert!(pool.needs_measuring());
    pool.measure().unwrap();
    pool.delete_template(&stocked.template.name).unwrap();
    assert!(pool.needs_measuring());
}
