//! Pools without an image: on a block device, and on an existing btrfs or XFS.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step ends the test"
)]

mod support;

use scalebox_storage::{ActualBacking, Backing, InitOutcome, StorageError, unmount};
use scalebox_units::{Bytes, Gib};
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use support::{HostDisk, MAX, Place, Stocked, USUAL, disk_path, ext4_image, name, run, text, write};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A loop device on a sparse file, detached on drop.
struct Device {
    file: PathBuf,
    path: PathBuf,
    _scratch: TempDir,
}

impl Device {
    fn new(size: &str) -> Device {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("disk");
        run("truncate", &["-s", size, text(&file)]);
        let path = run("losetup", &["--find", "--show", text(&file)]).trim().into();
        Device {
            file,
            path,
            _scratch: scratch,
        }
    }

    fn grow(&self, size: &str) {
        run("truncate", &["-s", size, text(&self.file)]);
        run("losetup", &["--set-capacity", text(&self.path)]);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        run("losetup", &["--detach", text(&self.path)]);
    }
}

/// Returns the plan of a pool on a device, in the device's scratch folder.
fn place_on(device: &Device, size: Option<&str>) -> Place {
    let mut place = Place::at(device.file.parent().unwrap(), size);
    place.plan.backing = Backing::Device(device.path.clone());
    place
}

/// Returns the plan of a pool in a folder on an existing file system.
fn place_in(folder: PathBuf) -> Place {
    let mut place = Place::at(&folder, None);
    place.plan.backing = Backing::Existing;
    place
}

/// Checks the operations of a pool that must work on every backing.
fn check_pool_operations(stocked: &Stocked) {
    let pool = &stocked.pool;
    let before = pool.space().unwrap();
    let [a, b] = ["vm-a", "vm-b"].map(|id| stocked.create(id, 2));
    for id in [&a, &b] {
        run("e2fsck", &["-fn", text(&disk_path(pool, id))]);
        assert_eq!(pool.provisioned(id).unwrap(), Gib::new(2).bytes());
    }
    assert!(
        before.free - pool.space().unwrap().free < Bytes::from_mib(32),
        "a clone takes no space"
    );

    // Exclusive, shared and freed bytes.
    write(&disk_path(pool, &a), 300 * MIB, 100 * MIB);
    run("sync", &["-f", text(pool.path())]);
    let accounts = pool.measure().unwrap();
    let usage = accounts.disks[&a];
    assert!(
        usage.exclusive >= Bytes::from_mib(100) && usage.exclusive < Bytes::from_mib(102),
        "{usage:?}"
    );
    assert!(accounts.disks[&b].exclusive < Bytes::from_mib(2), "{accounts:?}");
    assert!(accounts.shared > Bytes::ZERO);
    let (used, total) = (pool.space().unwrap().used.as_u64(), accounts.total().as_u64());
    assert!(
        used.abs_diff(total) * 100 <= used,
        "{used} are used, but {total} were measured"
    );
    assert!(accounts.unreclaimable() < pool.space().unwrap().used - Bytes::from_mib(90));

    pool.grow_disk(&b, Gib::new(3).bytes()).unwrap();
    run("e2fsck", &["-fn", text(&disk_path(pool, &b))]);
    let full = pool.space().unwrap().free;
    let unlinked = pool.unlink_disk(&a).unwrap().expect("there was a disk");
    pool.reclaim(unlinked).unwrap();
    pool.release(Gib::new(2).bytes());
    let freed = pool.space().unwrap().free - full;
    assert!(freed >= Bytes::from_mib(99), "{freed} are free again");

    // A request that does not fit is refused with the seed's message.
    let free = pool.space().unwrap().free.floor_gib();
    let refused = pool.admit(free.bytes()).unwrap_err().to_string();
    let need = free.as_u64() + 2;
    assert_eq!(
        refused,
        format!("Insufficient storage: {free}GB available, need {need}GB")
    );

    pool.sweep(&HashSet::new()).unwrap();
    assert_eq!(pool.disks().unwrap(), []);
    pool.delete_template(&stocked.template.name).unwrap();
    assert_eq!(fs::read_dir(pool.path().join("templates/.grown")).unwrap().count(), 0);
}

#[test]
fn a_pool_fills_its_device_and_is_mounted_by_fstab() {
    let device = Device::new("30G");
    let mut place = place_on(&device, None);
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);
    assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
    let plan = place.plan.clone();
    let uuid = run("blkid", &["-p", "-s", "UUID", "-o", "value", text(&device.path)]);
    assert_eq!(
        fs::read_to_string(plan.fstab.as_ref().unwrap()).unwrap(),
        format!(
            "UUID={} {} btrfs nofail,noatime,discard=async 0 0\n",
            uuid.trim(),
            text(&plan.data_dir)
        )
    );
    let steps = place.steps();
    assert!(
        steps[1].starts_with("Creating 30 GiB btrfs storage pool on /dev/loop"),
        "{steps:?}"
    );

    let stocked = Stocked::in_place(place, USUAL);
    assert_eq!(stocked.pool.backing(), &ActualBacking::Device(device.path.clone()));
    let space = stocked.pool.space().unwrap();
    assert_eq!((space.capacity, space.host_free), (Gib::new(30).bytes(), None));
    check_pool_operations(&stocked);

    let Stocked { pool, mut place, .. } = stocked;
    drop(pool);
    fs::write(plan.data_dir.join("vms/kept"), "kept").unwrap();
    assert!(unmount(&plan.data_dir, &plan.backing).unwrap());
    run(
        "mount",
        &["--fstab", text(plan.fstab.as_ref().unwrap()), text(&plan.data_dir)],
    );
    assert!(unmount(&plan.data_dir, &plan.backing).unwrap());
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);
    assert_eq!(fs::read_to_string(plan.data_dir.join("vms/kept")).unwrap(), "kept");
}

#[test]
fn a_pool_on_a_device_grows_and_shrinks() {
    let device = Device::new("40G");
    let mut place = place_on(&device, Some("30G"));
    place.init().unwrap();
    let pool = place.open(USUAL);
    let capacity = || pool.space().unwrap().capacity.floor_gib().as_u64();
    assert_eq!(capacity(), 30, "STORAGE_SIZE limits the pool on the device");
    pool.grow(None).unwrap();
    assert_eq!(capacity(), 40);
    device.grow("60G");
    pool.grow(Some(Gib::new(50))).unwrap();
    assert_eq!(capacity(), 50);
    assert!(pool.extend().unwrap());
    assert_eq!(capacity(), 60);
    assert!(!pool.extend().unwrap());
    pool.shrink(Gib::new(25)).unwrap();
    assert_eq!(capacity(), 25);
    // Reconciling at start does not grow a pool that is smaller than its device.
    pool.reconcile().unwrap();
    assert_eq!(capacity(), 25);
    for (refused, why) in [
        (pool.grow(Some(Gib::new(61))), "does not fit"),
        (pool.grow(Some(Gib::new(25))), "is not larger"),
        (pool.shrink(Gib::new(30)), "is not smaller"),
        (pool.shrink(Gib::new(1)), "GiB are needed"),
    ] {
        let error = refused.unwrap_err();
        assert!(
            matches!(error, StorageError::PoolSize(_)) && error.to_string().contains(why),
            "{error}"
        );
    }
}

#[test]
fn a_device_with_known_contents_is_not_formatted() {
    let device = Device::new("30G");
    let mut place = place_on(&device, None);
    let mut refused = |why: &str| {
        let error = place.init().unwrap_err();
        assert!(
            matches!(&error, StorageError::UnfitDevice { .. }) && error.to_string().contains(why),
            "{error}"
        );
    };
    run("mke2fs", &["-q", "-t", "ext4", text(&device.path)]);
    refused("it contains ext4");
    run("wipefs", &["-q", "--all", text(&device.path)]);
    run("mkfs.btrfs", &["-q", "-L", "mine", text(&device.path)]);
    refused("it contains btrfs (label \"mine\")");
    run("wipefs", &["-q", "--all", text(&device.path)]);
    // One Linux partition starting at sector 2048, with 1000 sectors.
    let mut sector = [0; 512];
    sector[446 + 4] = 0x83;
    sector[446 + 8..446 + 16].copy_from_slice(&[0, 8, 0, 0, 0xe8, 3, 0, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let disk = File::options().write(true).open(&device.path).unwrap();
    disk.write_all_at(&sector, 0).unwrap();
    disk.sync_all().unwrap();
    refused("a dos partition table");

    let small = Device::new("10G");
    let error = place_on(&small, None).init().unwrap_err().to_string();
    assert!(
        error.contains("it has 10 GiB, and a pool needs at least 20 GiB"),
        "{error}"
    );
    let error = place_on(&small, Some("11G")).init().unwrap_err().to_string();
    assert!(error.contains("it has 10 GiB, less than the requested 11G"), "{error}");
    let mut file = Place::new("30G");
    let plain = file.image().to_owned();
    fs::write(&plain, "a file").unwrap();
    file.plan.backing = Backing::Device(plain);
    let error = file.init().unwrap_err().to_string();
    assert!(error.contains("not a block device"), "{error}");
    assert!(!file.fstab().exists());
}

#[test]
fn a_pool_on_another_device_is_not_opened() {
    let (device, other) = (Device::new("30G"), Device::new("30G"));
    let mut place = place_on(&device, None);
    place.init().unwrap();
    let wrong = Backing::Device(other.path.clone());
    let error = scalebox_storage::Pool::open(&place.plan.data_dir, &wrong, USUAL).unwrap_err();
    assert!(matches!(error, StorageError::OtherDevice { .. }), "{error}");
    // Another name of the same device.
    let link = place.fstab().with_file_name("by-another-name");
    std::os::unix::fs::symlink(&device.path, &link).unwrap();
    scalebox_storage::Pool::open(&place.plan.data_dir, &Backing::Device(link), USUAL).unwrap();
}

#[test]
fn an_xfs_mounted_at_the_pool_s_folder_is_used() {
    let host = HostDisk::made("30G", "mkfs.xfs", &["-q"]);
    let mut place = Place::at(&host.folder, Some("100G"));
    place.plan.data_dir = host.folder.clone();
    // No image is created although one is configured: the mounted file system can clone files.
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);
    assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
    assert!(!place.image().exists() && !place.fstab().exists());
    assert_eq!(
        place.steps()[0],
        format!("Storage already mounted at {}", host.folder.display())
    );
    let stocked = Stocked::in_place(place, USUAL);
    assert_eq!(
        (stocked.pool.backing(), stocked.pool.file_system()),
        (&ActualBacking::Existing, "xfs")
    );
    check_pool_operations(&stocked);
    for refused in [stocked.pool.grow(None), stocked.pool.shrink(Gib::new(20))] {
        assert!(
            matches!(refused, Err(StorageError::ExistingFileSystem(_))),
            "{refused:?}"
        );
    }
    assert!(!stocked.pool.extend().unwrap());
    let Stocked { pool, place, .. } = stocked;
    drop(pool);
    assert!(
        !unmount(&place.plan.data_dir, &place.plan.backing).unwrap(),
        "an existing file system stays mounted"
    );
}

#[test]
fn a_folder_on_xfs_or_btrfs_can_be_a_pool() {
    for (program, args) in [("mkfs.xfs", &["-q"][..]), ("mkfs.btrfs", &["-q"])] {
        let host = HostDisk::made("30G", program, args);
        fs::write(host.folder.join("somebody-else-s"), vec![7; 64 << 20]).unwrap();
        let mut place = place_in(host.folder.join("scalebox"));
        assert_eq!(place.init().unwrap(), InitOutcome::Ready);
        assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
        assert!(!place.fstab().exists());
        let stocked = Stocked::in_place(place, USUAL);
        check_pool_operations(&stocked);
        let accounts = stocked.pool.measure().unwrap();
        assert!(
            accounts.other >= Bytes::from_mib(64),
            "data outside the pool: {accounts:?}"
        );
        assert_eq!(
            fs::metadata(host.folder.join("somebody-else-s")).unwrap().len(),
            64 << 20
        );
    }
}

#[test]
fn file_systems_without_reflinks_and_foreign_folders_are_rejected() {
    let ext4 = HostDisk::ext4(Gib::new(1).bytes());
    let error = place_in(ext4.folder.join("pool")).init().unwrap_err();
    assert!(
        matches!(&error, StorageError::NotAPool { fs_type, .. } if fs_type == "ext4"),
        "{error}"
    );

    let old = HostDisk::made("2G", "mkfs.xfs", &["-q", "-m", "reflink=0"]);
    let mut place = place_in(old.folder.join("pool"));
    let error = place.init().unwrap_err();
    assert!(error.to_string().contains("XFS made with reflink=1"), "{error}");
    assert_eq!(
        fs::read_dir(&place.plan.data_dir).unwrap().count(),
        0,
        "nothing was created"
    );

    let xfs = HostDisk::made("2G", "mkfs.xfs", &["-q"]);
    let mut place = place_in(xfs.folder.clone());
    place.plan.data_dir = xfs.folder.join("home");
    fs::create_dir(&place.plan.data_dir).unwrap();
    fs::write(place.plan.data_dir.join("precious"), "data").unwrap();
    let error = place.init().unwrap_err();
    assert!(matches!(error, StorageError::OtherFolder(_)), "{error}");
    assert_eq!(fs::read_dir(&place.plan.data_dir).unwrap().count(), 1);
}

#[test]
fn an_unnecessary_image_is_a_warning_and_nocow() {
    let host = HostDisk::made("30G", "mkfs.btrfs", &["-q"]);
    let mut place = Place::at(&host.folder, None);
    place.init().unwrap();
    let warnings = place.warnings();
    assert!(
        warnings.len() == 1 && warnings[0].contains("can clone files itself"),
        "{warnings:?}"
    );
    let attributes = run("lsattr", &[text(place.image())]);
    assert!(attributes.split(' ').next().unwrap().contains('C'), "{attributes}");
}

#[test]
fn templates_are_imported_to_xfs_from_outside_and_inside_the_pool() {
    let host = HostDisk::made("30G", "mkfs.xfs", &["-q"]);
    let mut place = place_in(host.folder.join("pool"));
    place.init().unwrap();
    let pool = place.open(USUAL);
    let scratch = tempfile::tempdir().unwrap();
    let image = ext4_image(scratch.path(), "64M");
    let outside = pool.import_template(&name("outside"), &image, MAX, false).unwrap();
    let inside = place.plan.data_dir.join("templates/outside.ext4");
    let again = pool.import_template(&name("inside"), &inside, MAX, false).unwrap();
    assert_eq!((outside.size, again.size), (Bytes::from_mib(64), Bytes::from_mib(64)));
    assert_eq!(pool.templates().unwrap().len(), 2);
}
