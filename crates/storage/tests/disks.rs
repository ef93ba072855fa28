//! Templates and disks in a real pool.

#![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

mod support;

use scalebox_storage::{Bounds, StorageError};
use scalebox_units::{Bytes, Gib};
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;
use support::{HostDisk, MAX, Place, Stocked, USUAL, disk_path, ext4_image, fill, name, run, text, vm_id};

fn file_system_size(image: &std::path::Path) -> Bytes {
    let header = run("dumpe2fs", &["-h", text(image)]);
    let field = |key: &str| -> u64 {
        header
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    Bytes::from_blocks(field("Block count:"), field("Block size:"))
}

#[test]
fn a_disk_is_a_sound_clone_of_the_requested_size() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    for (id, size) in [("vm-1", 1), ("vm-10", 10), ("vm-10-again", 10)] {
        let admitted = pool.admit(Gib::new(size).bytes()).unwrap();
        pool.create_disk(&vm_id(id), &stocked.template.name, &admitted).unwrap();
        admitted.commit();
        let path = disk_path(pool, &vm_id(id));
        assert_eq!(file_system_size(&path), Gib::new(size).bytes());
        assert_eq!(fs::metadata(&path).unwrap().len(), size << 30);
        run("e2fsck", &["-fn", text(&path)]);
        assert_eq!(run("debugfs", &["-R", "cat /marker", text(&path)]), "here\n");
    }
    assert_eq!(pool.commitments().committed, Gib::new(21).bytes());
    assert_eq!(pool.commitments().reserved, Bytes::ZERO);
    assert!(
        pool.space().unwrap().used < Bytes::from_mib(64),
        "clones share their blocks"
    );
}

#[test]
fn a_created_disk_survives_a_power_cut() {
    let stocked = Stocked::new("30G", USUAL);
    let make = |id: &str, size: u64| {
        let admitted = stocked.pool.admit(Gib::new(size).bytes()).unwrap();
        let made = stocked.pool.create_disk(&vm_id(id), &stocked.template.name, &admitted);
        made.unwrap();
        admitted.commit();
    };
    // Makes the base image and commits it: the following disks are only in the log.
    make("vm-before", 3);
    run("btrfs", &["filesystem", "sync", text(stocked.pool.path())]);
    make("vm-1", 3);
    make("vm-2", 3);

    let cut = HostDisk::after_power_cut(stocked.pool.image().unwrap());
    let disk = disk_path(&stocked.pool, &vm_id("vm-1"));
    let vms = disk
        .parent()
        .unwrap()
        .strip_prefix(stocked.pool.path())
        .unwrap()
        .to_owned();
    drop(stocked);
    let host = cut();
    for id in ["vm-before", "vm-1", "vm-2"] {
        let disk = host.folder.join(&vms).join(format!("{}.ext4", vm_id(id)));
        assert_eq!(file_system_size(&disk), Gib::new(3).bytes());
        run("e2fsck", &["-fn", text(&disk)]);
        assert_eq!(run("debugfs", &["-R", "cat /marker", text(&disk)]), "here\n");
    }
}

#[test]
fn disks_of_one_template_are_independent() {
    let stocked = Stocked::new("30G", USUAL);
    for id in ["vm-a", "vm-b"] {
        let admitted = stocked.pool.admit(Gib::new(2).bytes()).unwrap();
        stocked
            .pool
            .create_disk(&vm_id(id), &stocked.template.name, &admitted)
            .unwrap();
    }
    let open = |id| {
        File::options()
            .read(true)
            .write(true)
            .open(disk_path(&stocked.pool, &vm_id(id)))
            .unwrap()
    };
    open("vm-a").write_all_at(b"written by a", 1 << 30).unwrap();
    let mut seen = [0; 12];
    open("vm-b").read_exact_at(&mut seen, 1 << 30).unwrap();
    assert_eq!(seen, [0; 12]);
}

#[test]
fn a_disk_smaller_than_its_template_is_rejected() {
    let stocked = Stocked::new("30G", USUAL);
    let scratch = tempfile::tempdir().unwrap();
    let large = stocked
        .pool
        .import_template(&name("large"), &ext4_image(scratch.path(), "3G"), MAX, false)
        .unwrap();
    let size = |asked: Option<u64>| scalebox_storage::Pool::disk_size(&large, asked.map(Gib::new), Gib::new(2));
    assert_eq!(
        size(Some(2)).unwrap_err().to_string(),
        "disk_size_gib must be at least 3: the template large has 3 GiB"
    );
    assert_eq!(size(Some(3)).unwrap(), Gib::new(3));
    assert_eq!(
        size(None).unwrap(),
        Gib::new(3),
        "a larger template overrides the default size"
    );
    let admitted = stocked.pool.admit(Gib::new(2).bytes()).unwrap();
    assert!(
        stocked
            .pool
            .create_disk(&vm_id("vm-small"), &large.name, &admitted)
            .is_err()
    );
    assert!(!disk_path(&stocked.pool, &vm_id("vm-small")).exists());
}

#[test]
fn eight_concurrent_requests_never_exceed_a_bound() {
    let stocked = Stocked::new(
        "30G",
        Bounds {
            buffer: Gib::new(2),
            overcommit_ratio: 1.0,
        },
    );
    let (pool, template) = (&stocked.pool, &stocked.template);
    let start = Barrier::new(8);
    let attempt = |id: usize| {
        start.wait();
        let admitted = pool.admit(Gib::new(20).bytes())?;
        pool.create_disk(&vm_id(&format!("vm-{id}")), &template.name, &admitted)?;
        admitted.commit();
        Ok::<_, StorageError>(())
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|id| scope.spawn(move || attempt(id))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    for refused in results.into_iter().filter_map(Result::err) {
        // The 10 GiB that are not committed also cover the metadata for 20 GiB of scattered blocks.
        // The remaining figures depend on the first request, which may still be running.
        let StorageError::Insufficient { available, need } = refused else {
            panic!("{refused}")
        };
        assert!(
            (5..=7).contains(&available.as_u64()) && need == Gib::new(22),
            "{available} of {need}"
        );
    }
    pool.release(Gib::new(20).bytes());
    assert!(
        pool.admit(Gib::new(20).bytes()).is_ok(),
        "a deletion makes the space available again"
    );
}

#[test]
fn a_nearly_full_pool_refuses_disks() {
    let stocked = Stocked::new("30G", USUAL);
    let free = stocked.pool.space().unwrap().free;
    // Slightly less than five GiB stay free, which is four, rounded down.
    fill(
        stocked.pool.path(),
        "vms/ballast",
        free - Gib::new(5).bytes() + Bytes::from_mib(256),
    );
    let error = stocked.pool.admit(Gib::new(4).bytes()).unwrap_err().to_string();
    assert_eq!(error, "Insufficient storage: 4GB available, need 6GB");
    assert!(stocked.pool.admit(Gib::new(2).bytes()).is_ok());
}

#[test]
fn free_blocks_of_the_image_count_on_a_full_host_disk() {
    let host = HostDisk::ext4(Gib::new(40).bytes());
    let stocked = Stocked::in_place(Place::at(&host.folder, Some("30G")), USUAL);
    // The image owns 8 GiB that the pool has freed: the mount does not discard them.
    run("mount", &["-o", "remount,nodiscard", text(stocked.pool.path())]);
    let ballast = stocked.pool.path().join("vms/ballast");
    run(
        "dd",
        &[
            "if=/dev/zero",
            &format!("of={}", text(&ballast)),
            "bs=1M",
            "count=1024",
            "conv=fsync",
            "status=none",
        ],
    );
    fs::remove_file(&ballast).unwrap();
    run("btrfs", &["filesystem", "sync", text(stocked.pool.path())]);
    let space = stocked.pool.space().unwrap();
    let host_free = space.host_free.unwrap();
    fill(&host.folder, "ballast", host_free - Bytes::from_mib(100));
    let space = stocked.pool.space().unwrap();
    assert!(space.host_free.unwrap() < Bytes::from_mib(110), "{space:?}");
    assert!(space.free > Bytes::from_mib(1000), "{space:?}");
    assert!(space.free < Bytes::from_mib(1400), "{space:?}");
}

/// Writes files and folders that are not templates, named after their kind.
fn write_rejected_sources(folder: &Path, sound: &Path) {
    let file = |name: &str| folder.join(name);
    let sparse = |path: &Path, mib: u64| File::create_new(path).unwrap().set_len(mib << 20).unwrap();

    fs::copy(sound, file("cut")).unwrap();
    File::options()
        .write(true)
        .open(file("cut"))
        .unwrap()
        .set_len(20 << 20)
        .unwrap();
    sparse(&file("xfs"), 512);
    run("mkfs.xfs", &["-q", text(&file("xfs"))]);
    sparse(&file("empty"), 64);
    sparse(&file("nothing"), 0);
    fs::write(file("packed.gz"), [0x1f, 0x8b, 8, 0]).unwrap();
    fs::write(
        file("form"),
        "--1234\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n",
    )
    .unwrap();
    run("tar", &["-cf", text(&file("tar")), "-C", text(folder), "packed.gz"]);
    fs::write(
        file("twice"),
        zstd::encode_all(&zstd::encode_all(&b"x"[..], 1).unwrap()[..], 1).unwrap(),
    )
    .unwrap();
    let unknown = |name: &str, feature: &str| {
        fs::copy(sound, file(name)).unwrap();
        run(
            "debugfs",
            &["-w", "-R", &format!("feature {feature}"), text(&file(name))],
        );
    };
    unknown("unknown", "FEATURE_I31");
    unknown("shared", "shared_blocks");
    fs::write(file("qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    let mut table = vec![0; 1 << 20];
    table[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 2, 0, 1, 0, 0, 0, 0xff, 7, 0, 0]);
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(file("disk"), &table).unwrap();
    fs::create_dir(file("folder")).unwrap();
    run("mkfifo", &[text(&file("fifo"))]);
}

#[test]
fn only_a_sound_bare_ext4_image_is_imported() {
    let stocked = Stocked::new("30G", USUAL);
    let scratch = tempfile::tempdir().unwrap();
    let sound = ext4_image(scratch.path(), "64M");
    write_rejected_sources(scratch.path(), &sound);
    let file = |name: &str| scratch.path().join(name);

    for (source, reason) in [
        ("cut", "its file system is damaged"),
        ("xfs", "it contains xfs"),
        ("empty", "it contains no file system"),
        ("nothing", "it contains no file system"),
        ("packed.gz", "compressed with gzip"),
        ("qcow2", "qemu-img convert"),
        ("form", "curl --data-binary"),
        ("tar", "a tar archive"),
        ("twice", "compressed twice"),
        ("unknown", "cannot check: FEATURE_I31"),
        ("shared", "cannot check: shared_blocks"),
        ("disk", "it is a whole disk with a dos partition table"),
        ("folder", "it is neither a regular file"),
        ("fifo", "it is neither a regular file"),
    ] {
        let error = stocked
            .pool
            .import_template(&name("bad"), &file(source), MAX, false)
            .unwrap_err();
        assert!(matches!(error, StorageError::NotATemplate { .. }), "{source}: {error}");
        assert!(error.to_string().contains(reason), "{source}: {error}");
    }
    let names: Vec<_> = stocked
        .pool
        .templates()
        .unwrap()
        .into_iter()
        .map(|template| template.name.to_string())
        .collect();
    assert_eq!(names, ["tiny"]);
    let left = fs::read_dir(stocked.pool.path().join("templates")).unwrap().count();
    assert_eq!(left, 2, "besides the image and its record, an unfinished file is left");
}

#[test]
fn block_devices_are_imported_unless_in_use_or_too_large() {
    let stocked = Stocked::new("30G", USUAL);
    let scratch = tempfile::tempdir().unwrap();
    let image = ext4_image(scratch.path(), "64M");
    let device = run("losetup", &["--find", "--show", text(&image)]);
    let device = Path::new(device.trim());
    let folder = scratch.path().join("mnt");
    fs::create_dir(&folder).unwrap();
    let import = |max: Bytes| stocked.pool.import_template(&name("device"), device, max, false);

    run("mount", &["-o", "ro", text(device), text(&folder)]);
    let used = import(MAX);
    run("umount", &[text(&folder)]);
    let (small, made) = (import(Bytes::from_mib(63)), import(MAX));
    run("losetup", &["--detach", text(device)]);

    let used = used.unwrap_err();
    assert!(
        matches!(used, StorageError::NotATemplate { .. }) && used.to_string().contains("unmount it first"),
        "{used}"
    );
    let small = small.unwrap_err().to_string();
    assert!(small.contains("larger than the maximum disk size of 63 MiB"), "{small}");
    let made = made.unwrap();
    assert_eq!(made.size, Bytes::from_mib(64));
    assert!(made.used < Bytes::from_mib(16), "zeros become holes: {made:?}");
    let template = stocked.pool.path().join("templates/device.ext4");
    assert_eq!(run("debugfs", &["-R", "cat /marker", text(&template)]), "here\n");
}

#[test]
fn a_file_system_smaller_than_its_image_is_grown_in_its_clones() {
    let stocked = Stocked::new("30G", USUAL);
    let scratch = tempfile::tempdir().unwrap();
    let image = ext4_image(scratch.path(), "64M");
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(2 << 30)
        .unwrap();
    let template = stocked.pool.import_template(&name("wide"), &image, MAX, false).unwrap();
    assert_eq!(template.size, Gib::new(2).bytes());
    for (id, size) in [("vm-a", 2), ("vm-b", 2), ("vm-c", 3)] {
        let admitted = stocked.pool.admit(Gib::new(size).bytes()).unwrap();
        stocked.pool.create_disk(&vm_id(id), &template.name, &admitted).unwrap();
        let disk = disk_path(&stocked.pool, &vm_id(id));
        assert_eq!(file_system_size(&disk), Gib::new(size).bytes());
        run("e2fsck", &["-fn", text(&disk)]);
        assert_eq!(run("debugfs", &["-R", "cat /marker", text(&disk)]), "here\n");
    }
    let grown = fs::read_dir(stocked.pool.path().join("templates/.grown"))
        .unwrap()
        .count();
    assert_eq!(grown, 2, "a base image for each size, including the template's");
}

#[test]
fn a_disk_with_an_unknown_feature_is_rejected_and_not_changed() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    let disk = stocked.create("vm-a", 1);
    let path = disk_path(pool, &disk);
    // Root in a guest can do the same.
    run("debugfs", &["-w", "-R", "feature FEATURE_I31 FEATURE_R29", text(&path)]);
    let grown = pool.grow_disk(&disk, Gib::new(2).bytes()).unwrap_err();
    let snapshot = pool.begin_snapshot(&name("derived")).and_then(|mut snapshot| {
        pool.take_snapshot(&mut snapshot, &disk)?;
        pool.finish_snapshot(snapshot, &Default::default())
    });
    let snapshot = snapshot.unwrap_err();
    assert!(matches!(grown, StorageError::FileSystem(_)), "{grown}");
    assert!(matches!(snapshot, StorageError::UnfitDisk(_)), "{snapshot}");
    for error in [grown, snapshot] {
        let message = error.to_string();
        assert!(
            message.contains("FEATURE_I31, FEATURE_R29") && !message.contains('/'),
            "{message}"
        );
    }
    assert_eq!(pool.provisioned(&disk).unwrap(), Gib::new(1).bytes());
    assert_eq!(fs::read_dir(pool.path().join("vms")).unwrap().count(), 1);
}

#[test]
fn imports_replay_the_journal_of_the_copy_and_keep_the_source() {
    let stocked = Stocked::new("30G", USUAL);
    let scratch = tempfile::tempdir().unwrap();
    let (image, folder) = (ext4_image(scratch.path(), "64M"), scratch.path().join("mnt"));
    fs::create_dir(&folder).unwrap();
    run("mount", &["-o", "loop", text(&image), text(&folder)]);
    fs::write(folder.join("late"), "late\n").unwrap();
    run("sync", &["-f", text(&folder)]);
    let torn = scratch.path().join("torn.ext4");
    fs::copy(&image, &torn).unwrap();
    run("umount", &[text(&folder)]);
    assert!(run("dumpe2fs", &["-h", text(&torn)]).contains("needs_recovery"));

    let before = fs::read(&torn).unwrap();
    stocked.pool.import_template(&name("torn"), &torn, MAX, false).unwrap();
    assert!(fs::read(&torn).unwrap() == before);
    let template = stocked.pool.path().join("templates/torn.ext4");
    assert!(!run("dumpe2fs", &["-h", text(&template)]).contains("needs_recovery"));
    assert_eq!(run("debugfs", &["-R", "cat /late", text(&template)]), "late\n");
}

#[test]
fn templates_are_replaced_only_on_request_and_used_for_new_disks() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    let create = |id: &str| {
        let admitted = pool.admit(Gib::new(4).bytes()).unwrap();
        let template = pool.template(&name("tiny")).unwrap();
        pool.create_disk(&vm_id(id), &template.name, &admitted).unwrap();
        disk_path(pool, &vm_id(id))
    };
    let old = create("vm-old");
    let scratch = tempfile::tempdir().unwrap();
    let image = ext4_image(scratch.path(), "64M");
    run("debugfs", &["-w", "-R", "rm /marker", text(&image)]);
    assert!(matches!(
        pool.import_template(&name("tiny"), &image, MAX, false),
        Err(StorageError::TemplateExists(_))
    ));
    pool.import_template(&name("tiny"), &image, MAX, true).unwrap();
    let new = create("vm-new");
    assert_eq!(run("debugfs", &["-R", "cat /marker", text(&old)]), "here\n");
    assert_eq!(run("debugfs", &["-R", "cat /marker", text(&new)]), "");
    let grown: Vec<_> = fs::read_dir(pool.path().join("templates/.grown")).unwrap().collect();
    assert_eq!(grown.len(), 1, "the old base image is removed: {grown:?}");

    pool.delete_template(&name("tiny")).unwrap();
    assert_eq!(fs::read_dir(pool.path().join("templates/.grown")).unwrap().count(), 0);
    assert!(matches!(
        pool.delete_template(&name("tiny")),
        Err(StorageError::NoTemplate(_))
    ));
    run("e2fsck", &["-fn", text(&old)]);
}

#[test]
fn replacing_or_deleting_a_template_leaves_no_base_image() {
    let stocked = Stocked::new("100G", USUAL);
    let pool = &stocked.pool;
    let scratch = tempfile::tempdir().unwrap();
    let image = ext4_image(scratch.path(), "64M");
    std::thread::scope(|scope| {
        for worker in 0..4 {
            scope.spawn(move || {
                for n in 0..6 {
                    let admitted = pool.admit(Gib::new(2 + n % 3).bytes()).unwrap();
                    match pool.create_disk(&vm_id(&format!("vm-{worker}-{n}")), &name("tiny"), &admitted) {
                        Ok(()) | Err(StorageError::NoTemplate(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        for _ in 0..5 {
            pool.delete_template(&name("tiny")).unwrap();
            pool.import_template(&name("tiny"), &image, MAX, false).unwrap();
            pool.import_template(&name("tiny"), &image, MAX, true).unwrap();
        }
    });
    pool.delete_template(&name("tiny")).unwrap();
    let left: Vec<_> = fs::read_dir(pool.path().join("templates/.grown"))
        .into_iter()
        .flatten()
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn failed_creations_leave_nothing_behind() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    pool.delete_template(&name("tiny")).unwrap();
    let admitted = pool.admit(Gib::new(4).bytes()).unwrap();
    assert!(matches!(
        pool.create_disk(&vm_id("vm-a"), &stocked.template.name, &admitted),
        Err(StorageError::NoTemplate(_))
    ));
    drop(admitted);
    assert!(!disk_path(pool, &vm_id("vm-a")).exists());
    assert_eq!(pool.commitments(), Default::default());
}

#[test]
fn a_sweep_removes_only_orphaned_files() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    for id in ["vm-kept", "vm-stray"] {
        let admitted = pool.admit(Gib::new(2).bytes()).unwrap();
        pool.create_disk(&vm_id(id), &stocked.template.name, &admitted).unwrap();
    }
    let half = pool.path().join("templates/.half.partial");
    fs::write(&half, "half").unwrap();
    let half_grown = pool.path().join("vms/vm-kept.ext4.partial");
    fs::write(&half_grown, "half").unwrap();
    let foreign = ["notes.txt", "backup.ext4"].map(|file| pool.path().join("vms").join(file));
    for file in &foreign {
        fs::write(file, "the operator's").unwrap();
    }
    let stale = pool.path().join("templates/.grown/gone@1.4294967296.ext4");
    fs::write(&stale, "of a deleted template").unwrap();
    let keep: HashSet<_> = [vm_id("vm-kept"), vm_id("vm-lost")].into();
    let swept = pool.sweep(&keep).unwrap();
    assert_eq!(swept.missing, [vm_id("vm-lost")]);
    assert_eq!(
        swept.removed,
        [
            half.clone(),
            half_grown.clone(),
            stale.clone(),
            disk_path(pool, &vm_id("vm-stray"))
        ]
    );
    assert!(disk_path(pool, &vm_id("vm-kept")).exists());
    assert!(foreign.iter().all(|file| file.exists()));
    assert!(!half.exists() && !half_grown.exists() && !stale.exists());
    assert!(pool.template(&name("tiny")).is_ok());
}

#[test]
fn growing_a_disk_grows_its_file_system_and_keeps_its_files() {
    let stocked = Stocked::new("30G", USUAL);
    let (pool, disk) = (&stocked.pool, vm_id("vm-a"));
    let admitted = pool.admit(Gib::new(2).bytes()).unwrap();
    pool.create_disk(&disk, &stocked.template.name, &admitted).unwrap();
    pool.grow_disk(&disk, Gib::new(5).bytes()).unwrap();
    pool.grow_disk(&disk, Gib::new(3).bytes()).unwrap();
    let path = disk_path(pool, &disk);
    assert_eq!(pool.provisioned(&disk).unwrap(), Gib::new(5).bytes());
    assert_eq!(file_system_size(&path), Gib::new(5).bytes());
    run("e2fsck", &["-fn", text(&path)]);
    assert_eq!(run("debugfs", &["-R", "cat /marker", text(&path)]), "here\n");
}

/// Returns the number of extents of an image, which determines the cost of each clone.
fn extents(image: &Path) -> usize {
    let listed = run("filefrag", &["-v", text(image)]);
    let numbered = |line: &&str| {
        line.split_once(':')
            .is_some_and(|(number, _)| number.trim().parse::<u32>().is_ok())
    };
    listed.lines().filter(numbered).count()
}

#[test]
fn a_base_image_has_fewer_extents_than_a_grown_disk() {
    let stocked = Stocked::new("30G", USUAL);
    let pool = &stocked.pool;
    let make = |id: &str, size: u64| {
        let admitted = pool.admit(Gib::new(size).bytes()).unwrap();
        pool.create_disk(&vm_id(id), &stocked.template.name, &admitted).unwrap();
        disk_path(pool, &vm_id(id))
    };
    let cloned = make("vm-cloned", 20);
    let grown = make("vm-grown", 1);
    pool.grow_disk(&vm_id("vm-grown"), Gib::new(20).bytes()).unwrap();
    assert!(
        extents(&cloned) < extents(&grown),
        "{} and {}",
        extents(&cloned),
        extents(&grown)
    );
    assert_eq!(file_system_size(&cloned), Gib::new(20).bytes());
    run("e2fsck", &["-fn", text(&cloned)]);
    assert_eq!(run("debugfs", &["-R", "cat /marker", text(&cloned)]), "here\n");
}

#[test]
fn a_damaged_disk_is_neither_grown_nor_changed() {
    let stocked = Stocked::new("30G", USUAL);
    let (pool, disk) = (&stocked.pool, vm_id("vm-a"));
    let admitted = pool.admit(Gib::new(2).bytes()).unwrap();
    pool.create_disk(&disk, &stocked.template.name, &admitted).unwrap();
    let path = disk_path(pool, &disk);
    // Damages the superblock and the first group descriptors.
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .write_all_at(&[0xff; 8192], 1024)
        .unwrap();
    let head = || {
        let mut head = vec![0; 65536];
        File::open(&path).unwrap().read_exact_at(&mut head, 0).unwrap();
        head
    };
    let before = head();
    assert!(matches!(
        pool.grow_disk(&disk, Gib::new(5).bytes()),
        Err(StorageError::FileSystem(_))
    ));
    assert_eq!(pool.provisioned(&disk).unwrap(), Gib::new(2).bytes());
    assert!(head() == before);
    assert_eq!(
        fs::read_dir(pool.path().join("vms")).unwrap().count(),
        1,
        "an unfinished file is left"
    );
}

#[test]
fn deleting_a_disk_twice_succeeds() {
    let stocked = Stocked::new("30G", USUAL);
    let admitted = stocked.pool.admit(Gib::new(2).bytes()).unwrap();
    stocked
        .pool
        .create_disk(&vm_id("vm-a"), &stocked.template.name, &admitted)
        .unwrap();
    stocked.pool.delete_disk(&vm_id("vm-a")).unwrap();
    stocked.pool.delete_disk(&vm_id("vm-a")).unwrap();
    assert!(!disk_path(&stocked.pool, &vm_id("vm-a")).exists());
}
