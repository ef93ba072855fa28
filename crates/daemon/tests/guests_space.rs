//! Elastic storage under guests that write: nothing they wrote is lost, and what they delete comes back.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

mod support;

use scalebox_client::Vm;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use support::guest::{Key, wait_for_ssh};
use support::{Host, HostDisk, Options, eventually, run, said, text};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Writes blocks of 1 MiB over and over in 40 files until told to stop, and keeps the sum of each outside the disk once it is flushed.
const WRITER: &str = "mkdir -p data /dev/shm/sums && n=0 && while [ ! -e /dev/shm/stop ]; do \
    head -c 1M /dev/urandom > /dev/shm/block && \
    dd if=/dev/shm/block of=data/$((n % 40)) bs=1M conv=notrunc,fsync status=none && \
    (sha256sum < /dev/shm/block) > /dev/shm/sums/$((n % 40)) || exit 1; \
    n=$((n + 1)); echo $n > /dev/shm/written.new; mv /dev/shm/written.new /dev/shm/written; done";

/// Reads what is on the disk, not in the guest's memory, and compares.
const VERIFY: &str = "sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'; \
    for f in data/*; do [ \"$(sha256sum < $f)\" = \"$(cat /dev/shm/sums/${f#data/})\" ] || { echo $f differs; exit 1; }; done; \
    ls data | wc -l";

fn free(folder: &Path) -> u64 {
    let stat = rustix::fs::statvfs(folder).unwrap();
    stat.f_bavail * stat.f_frsize
}

/// How many blocks the guest has written.
fn written(key: &Key, vm: &Vm) -> u64 {
    key.run(vm, "cat /dev/shm/written 2>/dev/null || echo 0")
        .parse()
        .unwrap()
}

/// Waits until each guest has written `more` blocks after now.
fn wait_for_writes(key: &Key, vms: &[Vm], more: u64) {
    let now: Vec<u64> = vms.iter().map(|vm| written(key, vm)).collect();
    for (vm, now) in vms.iter().zip(now) {
        eventually(&format!("{} to write on", vm.name), || {
            (written(key, vm) >= now + more).then_some(())
        });
    }
}

#[test]
fn a_pool_shrinks_and_grows_under_three_writing_guests_and_a_guest_s_deletions_come_back_to_the_host() {
    let disk = HostDisk::ext4("100G");
    let mut host = Host::new(&Options {
        pool_size: "60G",
        image_dir: Some(&disk.folder),
        ..Options::default()
    });
    host.import_debian();
    host.serve();
    let client = host.client();
    // What guests write now lies behind the end that the pool will have: it must be moved while they go on.
    let ballast = host.folder.join("pool/ballast");
    run("fallocate", &["-l", "42G", text(&ballast)]);
    let key = Key::new(&host, "key");
    let vms: Vec<Vm> = ["one", "two", "three"]
        .iter()
        .map(|name| client.create_vm(&key.request(name)).unwrap())
        .collect();
    let writers: Vec<_> = vms
        .iter()
        .map(|vm| {
            wait_for_ssh(vm);
            let mut writer = key.ssh(vm, WRITER);
            writer.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    wait_for_writes(&key, &vms, 5);
    fs::remove_file(&ballast).unwrap();
    // Its blocks are free when btrfs has committed that.
    run("btrfs", &["filesystem", "sync", text(&host.folder.join("pool"))]);

    let begun = Instant::now();
    assert_eq!(client.shrink_pool(40).unwrap().capacity_bytes, 40 * GIB);
    eprintln!("shrunk from 60 to 40 GiB in {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(fs::metadata(disk.folder.join("pool.img")).unwrap().len(), 40 * GIB);
    wait_for_writes(&key, &vms, 5);
    let begun = Instant::now();
    assert_eq!(client.grow_pool(Some(80)).unwrap().capacity_bytes, 80 * GIB);
    eprintln!("grown from 40 to 80 GiB in {:.1} s", begun.elapsed().as_secs_f64());
    wait_for_writes(&key, &vms, 5);

    for vm in &vms {
        key.run(vm, "touch /dev/shm/stop");
    }
    for (vm, writer) in vms.iter().zip(writers) {
        let ended = writer.wait_with_output().unwrap();
        assert!(ended.status.success(), "{}: {}", vm.name, said(&ended));
        let blocks = written(&key, vm);
        assert_eq!(key.run(vm, VERIFY), blocks.min(40).to_string(), "all of {}", vm.name);
        eprintln!("{}: {blocks} blocks written, those on the disk verified", vm.name);
        let kernel = key.run(vm, "sudo dmesg");
        assert!(
            !kernel.contains("I/O error") && !kernel.contains("Remounting filesystem read-only"),
            "{kernel}"
        );
    }

    // 200 MiB, written and deleted: the guest keeps the blocks until it trims.
    let guest = &vms[0];
    client.trim_vm("one").unwrap();
    client.trim_pool().unwrap();
    let before = free(&disk.folder);
    key.run(guest, "yes 0123456789abcdef | head -c 200M > big && sync");
    let full = free(&disk.folder);
    assert!(full < before - 150 * MIB, "{before} before, {full} with the file");
    key.run(guest, "rm big && sync");
    let trimmed = client.trim_vm("one").unwrap().trimmed_bytes;
    let begun = Instant::now();
    assert!(trimmed >= 200 * MIB, "{trimmed}");
    while free(&disk.folder) < before - 20 * MIB {
        let waited = begun.elapsed();
        assert!(
            waited < Duration::from_secs(60),
            "{before} before, {} now",
            free(&disk.folder)
        );
        std::thread::park_timeout(Duration::from_millis(50));
    }
    eprintln!(
        "of {trimmed} bytes trimmed, 200 MiB were back on the host disk after {:.1} s",
        begun.elapsed().as_secs_f64()
    );

    client.stop_vm("three").unwrap();
    let (status, refusal) = host.send("POST", "/vms/three/trim", b"");
    assert!(status == 409 && refusal.contains("VM three is stopped"), "{refusal}");
    assert_eq!(fs::metadata(host.disk(&vms[2])).unwrap().len(), 2 * GIB);
    run("e2fsck", &["-fn", text(&host.disk(&vms[2]))]);
}
