//! Creating and resizing pools on real file systems.

mod support;

use scalebox_storage::{Backing, InitOutcome, KernelFiles, Pool, StorageError, unmount};
use scalebox_units::{Bytes, Gib};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use support::{HostDisk, Place, USUAL, ext4_image, run, text};

fn attributes(path: &Path) -> String {
    run("lsattr", &["-d", text(path)])
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn loop_devices_of(image: &Path) -> String {
    run("losetup", &["-n", "-O", "NAME,DIO", "-j", text(image)])
}

#[test]
fn a_new_pool_is_mounted_registered_and_nocow() {
    let mut place = Place::new("30G");
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);

    let plan = place.plan.clone();
    let image = place.image().to_owned();
    let image = image.as_path();
    assert_eq!(
        run("findmnt", &["-n", "-o", "FSTYPE", text(&plan.data_dir)]).trim(),
        "btrfs"
    );
    assert_eq!(fs::metadata(image).unwrap().len(), 30 << 30);
    assert!(attributes(&plan.data_dir.join("templates")).contains('C'));
    assert!(attributes(&plan.data_dir.join("vms")).contains('C'));
    assert!(!attributes(&plan.data_dir.join("kernels")).contains('C'));
    assert!(loop_devices_of(image).trim().ends_with('1'), "direct I/O is on");
    let line = format!(
        "{} {} btrfs loop,nofail,noatime,discard=async 0 0\n",
        text(image),
        text(&plan.data_dir)
    );
    assert_eq!(fs::read_to_string(plan.fstab.as_ref().unwrap()).unwrap(), line);
    let steps = place.steps();
    assert_eq!(steps[0], "Setting up btrfs storage...");
    assert!(
        steps[1].starts_with("Creating 30G btrfs storage pool (") && steps[1].ends_with("GB available on host)...")
    );
}

#[test]
fn a_second_init_changes_nothing() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let before = (
        fs::read(place.fstab()).unwrap(),
        fs::metadata(place.image()).unwrap().ino(),
    );
    place.events.clear();
    assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
    assert_eq!(
        place.steps(),
        [format!("Storage already mounted at {}", place.plan.data_dir.display())]
    );
    assert_eq!(
        (
            fs::read(place.fstab()).unwrap(),
            fs::metadata(place.image()).unwrap().ino()
        ),
        before
    );
}

#[test]
fn fstab_mounts_the_pool_with_its_data() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let plan = place.plan.clone();
    let image = place.image().to_owned();
    let image = image.as_path();
    fs::write(plan.data_dir.join("vms/kept"), "kept").unwrap();
    assert!(unmount(&plan.data_dir, &plan.backing).unwrap());
    assert_eq!(loop_devices_of(image), "", "the loop device is removed with the mount");

    run(
        "mount",
        &["--fstab", text(plan.fstab.as_ref().unwrap()), text(&plan.data_dir)],
    );
    assert_eq!(fs::read_to_string(plan.data_dir.join("vms/kept")).unwrap(), "kept");
    // The next run enables direct I/O, which a mount by fstab lacks.
    assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
    assert!(loop_devices_of(image).trim().ends_with('1'), "direct I/O is on");
}

#[test]
fn an_interrupted_init_is_finished_by_the_next() {
    let mut place = Place::new("30G");
    let plan = place.plan.clone();
    let image = place.image().to_owned();
    let image = image.as_path();

    // The first run was killed while it created the file system.
    let partial = image.with_extension("img.partial");
    fs::write(&partial, "half a file system").unwrap();
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);
    assert!(!partial.exists());

    // The first run was killed after it created the image and before it mounted it.
    fs::write(plan.data_dir.join("vms/kept"), "kept").unwrap();
    unmount(&plan.data_dir, &plan.backing).unwrap();
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);
    assert_eq!(fs::read_to_string(plan.data_dir.join("vms/kept")).unwrap(), "kept");

    // The first run was killed after it mounted the pool, before it created the folders and
    // registered it.
    fs::remove_file(plan.fstab.as_ref().unwrap()).unwrap();
    fs::remove_dir(plan.data_dir.join("kernels")).unwrap();
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);
    assert!(place.fstab().exists() && plan.data_dir.join("kernels").is_dir());
    assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
}

#[test]
fn an_unformatted_image_is_created_again() {
    let mut place = Place::new("30G");
    File::create_new(place.image()).unwrap().set_len(5 << 30).unwrap();
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);
    assert_eq!(fs::metadata(place.image()).unwrap().len(), 30 << 30);
}

#[test]
fn foreign_data_at_the_image_s_path_is_never_formatted() {
    let scratch = tempfile::tempdir().unwrap();
    let ext4 = fs::read(ext4_image(scratch.path(), "16M")).unwrap();
    for (content, found) in [
        (ext4.as_slice(), "ext4"),
        (b"somebody's data".as_slice(), "data without a file system"),
    ] {
        let mut place = Place::new("30G");
        fs::write(place.image(), content).unwrap();
        let error = place.init().unwrap_err();
        assert!(
            matches!(&error, StorageError::ForeignImage { found: actual, .. } if actual == found),
            "{error}"
        );
        assert!(fs::read(place.image()).unwrap() == content);
    }
}

#[test]
fn a_folder_with_files_is_not_used_as_mount_point() {
    let mut place = Place::new("30G");
    fs::create_dir(&place.plan.data_dir).unwrap();
    fs::write(place.plan.data_dir.join("precious"), "data").unwrap();
    assert!(matches!(place.init(), Err(StorageError::NotEmpty(_))));
    assert!(!place.image().exists());
}

#[test]
fn a_mounted_ext4_is_rejected() {
    let host = HostDisk::ext4(Gib::new(1).bytes());
    let mut place = Place::new("30G");
    place.plan.data_dir = host.folder.clone();
    assert!(matches!(place.init(), Err(StorageError::NotAPool { .. })));
    // The host disk unmounts itself; the pool's guard must not unmount it.
    place.plan.data_dir = "/nonexistent".into();
}

#[test]
fn a_pool_takes_eighty_percent_of_a_500_gib_host_disk() {
    let host = HostDisk::ext4(Gib::new(500).bytes());
    let available = run("df", &["-B1", "--output=avail", text(&host.folder)]);
    let available: u64 = available.lines().last().unwrap().trim().parse().unwrap();
    let mut place = Place::at(&host.folder, None);
    place.init().unwrap();
    let size = fs::metadata(place.image()).unwrap().len();
    assert_eq!(size, ((available >> 30) * 80 / 100) << 30);
    assert!((385..=400).contains(&(size >> 30)), "{} GiB", size >> 30);
    assert!(place.warnings().is_empty());
}

#[test]
fn a_host_disk_with_24_gib_free_is_rejected_with_the_message_of_the_seed() {
    let host = HostDisk::ext4(Gib::new(25).bytes());
    for size in [None, Some("100G")] {
        let mut place = Place::at(&host.folder, size);
        let error = place.init().unwrap_err();
        assert_eq!(
            error.to_string(),
            "Insufficient disk space. Need at least 25GB free, found 24GB"
        );
        assert!(
            matches!(&error, StorageError::TooLittleSpace { folder, .. } if *folder == host.folder),
            "{error:?}"
        );
        assert!(!place.image().exists() && !place.fstab().exists());
    }
}

#[test]
fn a_requested_size_over_the_host_disk_is_used_with_a_warning() {
    let host = HostDisk::ext4(Gib::new(40).bytes());
    let mut place = Place::at(&host.folder, Some("100G"));
    place.init().unwrap();
    let pool = place.open(USUAL);
    assert_eq!(pool.space().unwrap().capacity, Gib::new(100).bytes());
    assert!(pool.space().unwrap().free < Gib::new(40).bytes());
    assert!(
        place.warnings()[0].contains("new VMs will be refused"),
        "{:?}",
        place.warnings()
    );
}

#[test]
fn concurrent_inits_create_one_pool() {
    let place = Place::new("30G");
    let runs: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| scalebox_storage::init(&place.plan, &mut |_| {})))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(runs.iter().any(|run| matches!(run, Ok(InitOutcome::Ready))));
    for run in &runs {
        assert!(matches!(run, Ok(_) | Err(StorageError::Busy(_))), "{run:?}");
    }
    assert_eq!(fs::read_to_string(place.fstab()).unwrap().lines().count(), 1);
    assert_eq!(loop_devices_of(place.image()).lines().count(), 1);
}

#[test]
fn an_image_mounted_elsewhere_is_not_mounted_again() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let mut other = Place::at(place.image().parent().unwrap(), Some("30G"));
    other.plan.data_dir = place.plan.data_dir.with_file_name("second");
    other.plan.fstab = Some(place.fstab().with_file_name("second-fstab"));
    let error = other.init().unwrap_err();
    assert!(
        matches!(&error, StorageError::MountedElsewhere { at, .. } if *at == place.plan.data_dir),
        "{error}"
    );
    assert!(!other.fstab().exists());
}

#[test]
fn a_pool_is_locked_for_one_program_and_records_its_owner() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let (first, second) = (place.open(USUAL), place.open(USUAL));
    first.lock().unwrap();
    assert!(matches!(second.lock(), Err(StorageError::Busy(_))));
    assert_eq!(first.owner().unwrap(), None);
    first.set_owner("somebody").unwrap();
    first.set_owner("somebody-else").unwrap();
    assert_eq!(second.owner().unwrap().as_deref(), Some("somebody-else"));
    drop(first);
    second.lock().unwrap();
}

#[test]
fn kernel_and_initramfs_are_readable_for_every_account() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let pool = place.open(USUAL);
    pool.make_kernels_readable().unwrap();
    let made = tempfile::NamedTempFile::new().unwrap();
    let files = KernelFiles {
        vmlinuz: made.path().to_owned(),
        initrd: made.path().to_owned(),
        modules: None,
    };
    let id = pool.install_kernel(&files).unwrap();
    let KernelFiles { vmlinuz, initrd, .. } = pool.kernel(&id).unwrap().files;
    let modes = || [&vmlinuz, &initrd].map(|file| file.metadata().unwrap().mode() & 0o777);
    assert_eq!(modes(), [0o644; 2]);
    // Earlier releases created the image with this mode.
    for file in [&vmlinuz, &initrd] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    pool.make_kernels_readable().unwrap();
    assert_eq!(modes(), [0o644; 2]);
}

#[test]
fn an_unmounted_pool_is_not_treated_as_empty() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let pool = place.open(USUAL);
    run("umount", &["--lazy", text(&place.plan.data_dir)]);
    assert!(matches!(pool.templates(), Err(StorageError::NotMounted(_))));
    assert!(matches!(
        pool.admit(Gib::new(1).bytes()),
        Err(StorageError::NotMounted(_))
    ));
}

#[test]
fn uncommitted_writes_are_not_free() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let pool = place.open(USUAL);
    let before = pool.space().unwrap().free;
    let file = format!("of={}", text(&place.plan.data_dir.join("vms/written")));
    run(
        "dd",
        &[
            "if=/dev/zero",
            &file,
            "bs=1M",
            "count=512",
            "oflag=direct",
            "status=none",
        ],
    );
    let taken = before - pool.space().unwrap().free;
    assert!(
        (Bytes::from_mib(500)..Bytes::from_mib(600)).contains(&taken),
        "{taken} before the commit"
    );
    run("btrfs", &["filesystem", "sync", text(&place.plan.data_dir)]);
    let taken = before - pool.space().unwrap().free;
    assert!(
        (Bytes::from_mib(500)..Bytes::from_mib(600)).contains(&taken),
        "{taken} after the commit"
    );
}

#[test]
fn a_resize_changes_all_layers_and_keeps_the_data() {
    let host = HostDisk::ext4(Gib::new(100).bytes());
    let mut place = Place::at(&host.folder, Some("30G"));
    place.init().unwrap();
    let pool = place.open(USUAL);
    let file = place.plan.data_dir.join("vms/kept");
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={}", text(&file)),
            "bs=1M",
            "count=200",
            "status=none",
        ],
    );
    let sum = run("sha256sum", &[text(&file)]);
    let layers = || {
        let device = run("losetup", &["-n", "-O", "NAME", "-j", text(place.image())]);
        let device: u64 = run("blockdev", &["--getsize64", device.trim()]).trim().parse().unwrap();
        let image = fs::metadata(place.image()).unwrap().len();
        [
            image >> 30,
            device >> 30,
            pool.space().unwrap().capacity.floor_gib().as_u64(),
        ]
    };

    pool.grow(Some(Gib::new(60))).unwrap();
    assert_eq!(layers(), [60; 3]);
    pool.shrink(Gib::new(40)).unwrap();
    assert_eq!(layers(), [40; 3]);
    // The default size is 80 % of the host disk; the image's own blocks count as free.
    pool.grow(None).unwrap();
    assert!((75..=80).contains(&layers()[0]), "{:?}", layers());
    assert_eq!(run("sha256sum", &[text(&file)]), sum);

    for (refused, why) in [
        (pool.grow(Some(Gib::new(60))), "is not larger"),
        (pool.grow(Some(Gib::new(200))), "at most"),
        (pool.shrink(Gib::new(90)), "is not smaller"),
        (pool.shrink(Gib::new(1)), "GiB are needed"),
    ] {
        let error = refused.unwrap_err();
        assert!(
            matches!(error, StorageError::PoolSize(_)) && error.to_string().contains(why),
            "{error}"
        );
    }
    drop(pool);
    unmount(&place.plan.data_dir, &place.plan.backing).unwrap();
    run("btrfs", &["check", "--quiet", text(place.image())]);
}

#[test]
fn a_pool_is_not_shrunk_below_its_commitments() {
    let host = HostDisk::ext4(Gib::new(100).bytes());
    let mut place = Place::at(&host.folder, Some("60G"));
    place.init().unwrap();
    let pool = place.open(scalebox_storage::Bounds {
        buffer: Gib::new(2),
        overcommit_ratio: 1.0,
    });
    pool.admit(Gib::new(45).bytes()).unwrap().commit();
    let error = pool.shrink(Gib::new(40)).unwrap_err().to_string();
    assert!(error.contains("45 GiB are committed"), "{error}");
    assert_eq!(pool.space().unwrap().capacity, Gib::new(60).bytes());
    // With a ratio of 1, 45 GiB also need the buffer and space for metadata.
    let error = pool.shrink(Gib::new(50)).unwrap_err().to_string();
    assert!(
        error.contains("the used data and the committed disks") && error.contains("at least 5"),
        "{error}"
    );
    pool.shrink(Gib::new(55)).unwrap();
}

#[test]
fn reconcile_completes_a_resize_interrupted_by_a_crash() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let pool = place.open(USUAL);
    // A growth that resized only the image: no client got a response.
    run("truncate", &["-s", "35G", text(place.image())]);
    pool.reconcile().unwrap();
    assert_eq!(pool.space().unwrap().capacity, Gib::new(35).bytes());
    // A shrink that resized only the file system.
    run("btrfs", &["filesystem", "resize", "20G", text(&place.plan.data_dir)]);
    assert_eq!(pool.space().unwrap().capacity, Gib::new(20).bytes());
    pool.reconcile().unwrap();
    assert_eq!(pool.space().unwrap().capacity, Gib::new(35).bytes());
}

#[test]
fn trimming_returns_freed_blocks_to_the_host_disk() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let pool = place.open(USUAL);
    run("mount", &["-o", "remount,nodiscard", text(&place.plan.data_dir)]);
    let file = place.plan.data_dir.join("vms/written");
    let blocks = || fs::metadata(place.image()).unwrap().blocks() * 512;
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={}", text(&file)),
            "bs=1M",
            "count=200",
            "conv=fsync",
            "status=none",
        ],
    );
    assert!(blocks() > 200 << 20);
    fs::remove_file(&file).unwrap();
    run("btrfs", &["filesystem", "sync", text(&place.plan.data_dir)]);
    assert!(blocks() > 200 << 20);
    assert!(pool.trim().unwrap() > Bytes::from_mib(200));
    assert!(blocks() < 50 << 20, "{} MiB are left", blocks() >> 20);
}

#[test]
fn the_error_for_an_unmounted_pool_names_its_folder() {
    let scratch = tempfile::tempdir().unwrap();
    let error = Pool::open(scratch.path(), &Backing::Image("/nonexistent".into()), USUAL).unwrap_err();
    assert!(
        matches!(&error, StorageError::NotMounted(folder) if folder == scratch.path()),
        "{error}"
    );
}

#[test]
fn free_space_is_limited_by_the_host_disk() {
    let host = HostDisk::ext4(Gib::new(40).bytes());
    let mut place = Place::at(&host.folder, Some("30G"));
    place.init().unwrap();
    let pool = place.open(USUAL);
    let before = pool.space().unwrap();
    assert!(before.free > Gib::new(25).bytes(), "{before:?}");

    support::fill(&host.folder, "ballast", Gib::new(34).bytes());
    let after = pool.space().unwrap();
    assert_eq!(after.pool_free, before.pool_free);
    assert!(after.free < Gib::new(6).bytes(), "{after:?}");
    assert_eq!(
        pool.admit(Gib::new(10).bytes()).unwrap_err().to_string(),
        format!(
            "Insufficient storage: {}GB available, need 12GB",
            after.free.floor_gib()
        )
    );
    assert_eq!(pool.commitments().reserved, Bytes::ZERO);
}
