//! Elastic storage with guests that write: no written data is lost, and deleted blocks are
//! returned.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{Vm, VmStatus};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use support::guest::{Key, wait_for_ssh};
use support::{Host, HostDisk, Options, eventually, guarantee, output_of, run, text};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Perl for the guests, because starting a program costs an emulated processor more than writing a
/// block. A block is 1 MiB, and its content is unique to its number.
const BLOCK: &str = "use strict; use Fcntl; use IO::Handle; \
    sub block { my $line = qq(number $_[0]\n); substr($line x (1 + (1 << 20) / length $line), 0, 1 << 20) } \
    sub put { my ($file, $n) = @_; sysopen(my $f, $file, O_RDWR | O_CREAT) or die qq($file: $!); \
        syswrite($f, block($n)) == 1 << 20 or die qq($file: $!); $f->sync or die qq($file: $!); } \
    sub check { my ($file, $n) = @_; open(my $f, q(<), $file) or die qq($file: $!); local $/; <$f> eq block($n) or die qq($file differs); }";

/// Writes blocks to 40 files in turn until stopped. Keeps the number of each flushed block outside
/// the disk.
const WRITER: &str = "my ($n, @last) = 0; mkdir q(data); until (-e q(/dev/shm/stop)) { put(q(data/) . $n % 40, $n); \
    $last[$n % 40] = $n; $n++; open(my $f, q(>), q(/dev/shm/written.new)); print $f qq($n @last\n); close $f; \
    rename q(/dev/shm/written.new), q(/dev/shm/written); }";

/// Writes 250 files of one block each, and flushes each of them.
const FILLER: &str = "mkdir q(fill); put(qq(fill/$_), $_) for 0 .. 249;";

/// Verifies the blocks of the writer; prints the number of files.
const VERIFY: &str = "open(my $f, q(<), q(/dev/shm/written)); my (undef, @last) = split q( ), <$f>; \
    check(qq(data/$_), $last[$_]) for 0 .. $#last; print scalar @last;";

/// Verifies the blocks of the filler.
const VERIFY_FILL: &str = "check(qq(fill/$_), $_) for 0 .. 249; print 250;";

/// Drops the caches, so that the guest reads from its disk and not from memory.
const DROP_CACHES: &str = "sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'; ";

fn perl(script: &str) -> String {
    format!("perl -e '{BLOCK} {script}'")
}

fn free(folder: &Path) -> u64 {
    let stat = rustix::fs::statvfs(folder).unwrap();
    stat.f_bavail * stat.f_frsize
}

/// Returns how many blocks the guest has written.
fn written(key: &Key, vm: &Vm) -> u64 {
    key.run(vm, "cut -d ' ' -f 1 /dev/shm/written 2>/dev/null || echo 0")
        .parse()
        .unwrap()
}

/// Waits until each guest has written `more` further blocks.
fn wait_for_writes(key: &Key, vms: &[Vm], more: u64) {
    let now: Vec<u64> = vms.iter().map(|vm| written(key, vm)).collect();
    for (vm, now) in vms.iter().zip(now) {
        eventually(&format!("{} to write more", vm.name), || {
            (written(key, vm) >= now + more).then_some(())
        });
    }
}

/// Starts the writer in each guest again.
fn start_writers(key: &Key, vms: &[Vm]) -> Vec<Child> {
    vms.iter()
        .map(|vm| {
            key.run(vm, "rm -f /dev/shm/stop /dev/shm/written");
            let mut writer = key.ssh(vm, &perl(WRITER));
            writer.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect()
}

/// Stops the writers. All they wrote must be on their disks, and their kernels must not have seen
/// an error.
fn stop_writers(key: &Key, vms: &[Vm], writers: Vec<Child>) {
    for vm in vms {
        key.run(vm, "touch /dev/shm/stop");
    }
    for (vm, writer) in vms.iter().zip(writers) {
        let ended = writer.wait_with_output().unwrap();
        assert!(ended.status.success(), "{}: {}", vm.name, output_of(&ended));
        let blocks = written(key, vm);
        assert_eq!(
            key.run(vm, &format!("{DROP_CACHES}{}", perl(VERIFY))),
            blocks.min(40).to_string(),
            "all of {}",
            vm.name
        );
        eprintln!("{}: {blocks} blocks written, those on the disk verified", vm.name);
        saw_no_error(key, vm);
    }
}

fn saw_no_error(key: &Key, vm: &Vm) {
    let kernel = key.run(vm, "sudo dmesg");
    assert!(
        !kernel.contains("I/O error") && !kernel.contains("Remounting filesystem read-only"),
        "{kernel}"
    );
}

/// Three booted guests on a pool of 60 GiB, most of which is taken by `ballast`.
struct Elastic {
    // The host is dropped before the disk, because the pool's image must be closed before the disk
    // can be unmounted.
    host: Host,
    disk: HostDisk,
    /// A file in the pool that takes space.
    ballast: PathBuf,
    key: Key,
    vms: Vec<Vm>,
}

#[test]
fn a_pool_shrinks_grows_and_runs_full_under_writing_guests_and_deleted_blocks_return_to_the_host() {
    let mut elastic = Elastic::boot();
    guarantee(&mut elastic, Elastic::a_pool_shrinks_and_grows_under_writing_guests);
    guarantee(&mut elastic, Elastic::deleted_blocks_return_to_the_host);
    guarantee(&mut elastic, Elastic::a_full_pool_pauses_only_the_guest_that_fills_it);
    guarantee(&mut elastic, Elastic::a_stopped_vm_is_not_trimmed_and_its_disk_is_sound);
}

impl Elastic {
    fn boot() -> Elastic {
        let disk = HostDisk::ext4("100G");
        let mut host = Host::new(&Options {
            pool_size: "60G",
            image_dir: Some(&disk.folder),
            ..Options::default()
        });
        host.import_debian();
        host.serve();
        // New writes are placed beyond the future end of the pool, so shrinking must move them
        // while guests write.
        let ballast = host.folder.join("pool/ballast");
        run("fallocate", &["-l", "42G", text(&ballast)]);
        let key = Key::new(&host, "key");
        let client = host.client();
        let vms: Vec<Vm> = ["one", "two", "three"]
            .iter()
            .map(|name| client.create_vm(&key.request(name)).unwrap())
            .collect();
        vms.iter().for_each(wait_for_ssh);
        Elastic {
            host,
            disk,
            ballast,
            key,
            vms,
        }
    }

    fn a_pool_shrinks_and_grows_under_writing_guests(&mut self) {
        let Elastic { disk, key, vms, .. } = self;
        let client = self.host.client();
        let writers = start_writers(key, vms);
        wait_for_writes(key, vms, 5);
        fs::remove_file(&self.ballast).unwrap();
        // The blocks of the ballast are free once btrfs has committed the deletion.
        run("btrfs", &["filesystem", "sync", text(&self.host.folder.join("pool"))]);

        let begun = Instant::now();
        assert_eq!(client.shrink_pool(40).unwrap().capacity_bytes, 40 * GIB);
        eprintln!("shrunk from 60 to 40 GiB in {:.1} s", begun.elapsed().as_secs_f64());
        assert_eq!(fs::metadata(disk.folder.join("pool.img")).unwrap().len(), 40 * GIB);
        wait_for_writes(key, vms, 5);
        let begun = Instant::now();
        assert_eq!(client.grow_pool(Some(80)).unwrap().capacity_bytes, 80 * GIB);
        eprintln!("grown from 40 to 80 GiB in {:.1} s", begun.elapsed().as_secs_f64());
        wait_for_writes(key, vms, 5);

        stop_writers(key, vms, writers);
    }

    /// Lets a guest write and delete 200 MiB. The guest keeps the blocks until it trims.
    fn deleted_blocks_return_to_the_host(&mut self) {
        let (client, folder) = (self.host.client(), &self.disk.folder);
        let guest = &self.vms[0];
        client.trim_vm("one").unwrap();
        client.trim_pool().unwrap();
        let before = free(folder);
        self.key.run(guest, "yes 0123456789abcdef | head -c 200M > big && sync");
        let full = free(folder);
        assert!(full < before - 150 * MIB, "{before} before, {full} with the file");
        self.key.run(guest, "rm big && sync");
        let trimmed = client.trim_vm("one").unwrap().trimmed_bytes;
        let begun = Instant::now();
        assert!(trimmed >= 200 * MIB, "{trimmed}");
        while free(folder) < before - 20 * MIB {
            let waited = begun.elapsed();
            assert!(
                waited < Duration::from_secs(60),
                "{before} before, {} now",
                free(folder)
            );
            std::thread::park_timeout(Duration::from_millis(50));
        }
        eprintln!(
            "of {trimmed} bytes trimmed, 200 MiB were returned to the host disk after {:.1} s",
            begun.elapsed().as_secs_f64()
        );
    }

    /// Fills the pool from one guest while two others write. That guest is paused before the last
    /// block is used, and resumes when there is space; the others continue.
    fn a_full_pool_pauses_only_the_guest_that_fills_it(&mut self) {
        let Elastic { key, vms, .. } = self;
        let client = self.host.client();
        let free_bytes = client.pool().unwrap().free_bytes;
        run(
            "fallocate",
            &["-l", &(free_bytes - 1150 * MIB).to_string(), text(&self.ballast)],
        );
        let workers = start_writers(key, &vms[1..]);
        wait_for_writes(key, &vms[1..], 3);
        let mut filler = key.ssh(&vms[0], &perl(FILLER));
        let filler = filler.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let paused = eventually("the filler to be paused", || {
            let vm = client.vm("one").unwrap();
            (vm.status == VmStatus::Paused).then_some(vm)
        });
        assert_eq!(paused.status_reason.as_deref(), Some("storage_full"));
        let left = client.pool().unwrap().free_bytes;
        assert!(left > 0);
        wait_for_writes(key, &vms[1..], 5);
        for name in ["two", "three"] {
            assert_eq!(
                client.vm(name).unwrap().status,
                VmStatus::Running,
                "{name} writes within its files"
            );
        }
        eprintln!("paused with {} MiB left, while the others continue", left / MIB);
        assert_eq!(client.grow_pool(Some(85)).unwrap().capacity_bytes, 85 * GIB);
        let filled = filler.wait_with_output().unwrap();
        assert!(filled.status.success(), "{}", output_of(&filled));
        stop_writers(key, &vms[1..], workers);
        assert_eq!(key.run(&vms[0], &format!("{DROP_CACHES}{}", perl(VERIFY_FILL))), "250");
        saw_no_error(key, &vms[0]);
    }

    fn a_stopped_vm_is_not_trimmed_and_its_disk_is_sound(&mut self) {
        let Elastic { host, vms, .. } = self;
        host.client().stop_vm("three").unwrap();
        let (status, refusal) = host.send("POST", "/vms/three/trim", b"");
        assert!(status == 409 && refusal.contains("VM three is stopped"), "{refusal}");
        assert_eq!(fs::metadata(host.disk(&vms[2])).unwrap().len(), 2 * GIB);
        run("e2fsck", &["-fn", text(&host.disk(&vms[2]))]);
    }
}
