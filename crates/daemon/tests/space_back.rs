//! Freed blocks are returned to the host disk. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Instant;
use support::{Host, HostDisk, Options, eventually};

const MIB: u64 = 1 << 20;

fn free(folder: &Path) -> u64 {
    let stat = rustix::fs::statvfs(folder).unwrap();
    stat.f_bavail * stat.f_frsize
}

#[test]
fn a_deleted_vm_s_blocks_return_to_the_host_disk_and_stay_committed_until_they_are_free() {
    let disk = HostDisk::ext4("60G");
    let mut host = Host::with_tiny_template(&Options {
        image_dir: Some(&disk.folder),
        env: &[("OVERCOMMIT_RATIO", "1")],
        ..Options::default()
    });
    let vm = host.create_stopped("tiny", Some(20));
    let (empty, path) = (free(&disk.folder), host.disk(&vm));
    let mut written = File::options().write(true).open(&path).unwrap();
    // The disk has many extents, which take the kernel time to free.
    for _ in 0..300 {
        written.write_all(&[7; MIB as usize]).unwrap();
        written.sync_data().unwrap();
    }
    drop(written);
    assert!(
        free(&disk.folder) < empty - 250 * MIB,
        "the disk uses space on the host disk"
    );

    host.client().delete_vm(&vm.id).unwrap();
    let answered = Instant::now();
    // The whole pool is still committed to the deleted disk, but the request is not rejected.
    let next = host.create_stopped("tiny", Some(20));
    eventually("the host disk's free space", || {
        (free(&disk.folder) > empty - 20 * MIB).then_some(())
    });
    eprintln!(
        "300 MiB were returned to the host disk {:.1} s after the response",
        answered.elapsed().as_secs_f64()
    );

    // A daemon that ends during a deletion frees its blocks too.
    host.client().delete_vm(&next.id).unwrap();
    assert!(host.terminate().success());
    assert_eq!(host.leftovers(), Vec::<String>::new());
    host.serve();
    assert_eq!(host.client().pool().unwrap().committed_bytes, 0);
    assert!(fs::read_dir(host.folder.join("pool/vms")).unwrap().next().is_none());
}
