//! Unusual hosts: large sectors, quotas, a read-only fstab, foreign files in the pool.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step ends the test"
)]

mod support;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use scalebox_storage::{
    Backing, DeviceRefusal, InitEvent, InitOutcome, InitWarning, Pool, StorageError, registered_source, unmount,
};
use scalebox_units::{Bytes, Gib};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{HostDisk, Place, Stocked, USUAL, fill, name, run, text};
use tempfile::TempDir;

/// A host disk with sectors of 4 KiB.
struct LargeSectors {
    device: String,
    folder: PathBuf,
    _scratch: TempDir,
}

impl LargeSectors {
    fn made(program: &str, args: &[&str]) -> LargeSectors {
        let scratch = tempfile::tempdir().unwrap();
        let (file, folder) = (scratch.path().join("disk"), scratch.path().join("host"));
        run("truncate", &["-s", "60G", text(&file)]);
        let device = run("losetup", &["--find", "--show", "--sector-size", "4096", text(&file)]);
        let device = device.trim().to_owned();
        run(program, &[args, &[&device]].concat());
        fs::create_dir(&folder).unwrap();
        run("mount", &[&device, text(&folder)]);
        LargeSectors {
            device,
            folder,
            _scratch: scratch,
        }
    }
}

impl Drop for LargeSectors {
    fn drop(&mut self) {
        run("umount", &[text(&self.folder)]);
        run("losetup", &["--detach", &self.device]);
    }
}

/// Returns sector size and direct I/O of the loop device on an image, and checks that there is only
/// one.
fn loop_device(image: &Path) -> Vec<String> {
    let listed = run("losetup", &["-n", "-O", "LOG-SEC,DIO", "-j", text(image)]);
    assert_eq!(listed.lines().count(), 1, "{listed}");
    listed.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn pools_on_host_disks_with_large_sectors_use_direct_io() {
    for (program, args) in [("mke2fs", &["-q", "-t", "ext4"][..]), ("mkfs.xfs", &["-q"])] {
        let host = LargeSectors::made(program, args);
        let mut place = Place::at(&host.folder, Some("30G"));
        assert_eq!(place.init().unwrap(), InitOutcome::Ready);
        assert_eq!(loop_device(place.image()), ["4096", "1"], "{program}");
        let warned = place.warnings().iter().any(|warning| warning.contains("direct I/O"));
        assert!(!warned, "{:?}", place.warnings());

        // This is the mount after a reboot: fstab does not contain the sector size.
        fs::write(place.plan.data_dir.join("vms/kept"), "kept").unwrap();
        unmount(&place.plan.data_dir, &place.plan.backing).unwrap();
        assert_eq!(
            run("losetup", &["-j", text(place.image())]),
            "",
            "the loop device is removed with the mount"
        );
        run("mount", &["--fstab", text(place.fstab()), text(&place.plan.data_dir)]);
        assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
        assert_eq!(loop_device(place.image()), ["4096", "1"], "{program}");
        assert_eq!(fs::read(place.plan.data_dir.join("vms/kept")).unwrap(), b"kept");

        let stocked = Stocked::in_place(place, USUAL);
        let id = stocked.create("vm-a", 2);
        run("e2fsck", &["-fn", text(&support::disk_path(&stocked.pool, &id))]);
        stocked.pool.grow(Some(Gib::new(40))).unwrap();
        assert_eq!(stocked.pool.space().unwrap().capacity, Gib::new(40).bytes());
    }
}

#[test]
fn a_pool_in_use_is_not_remounted_for_direct_io() {
    let host = LargeSectors::made("mke2fs", &["-q", "-t", "ext4"]);
    let mut place = Place::at(&host.folder, Some("30G"));
    place.init().unwrap();
    unmount(&place.plan.data_dir, &place.plan.backing).unwrap();
    run("mount", &["--fstab", text(place.fstab()), text(&place.plan.data_dir)]);
    let before = loop_device(place.image());
    let pool = place.open(USUAL);
    place.init().unwrap();
    if before[1] == "0" && loop_device(place.image())[1] == "0" {
        assert!(
            place.warnings()[0].contains("does not use direct I/O"),
            "{:?}",
            place.warnings()
        );
    }
    drop(pool.admit(Gib::new(1).bytes()).unwrap());
}

#[test]
fn a_symbolic_link_as_image_is_rejected() {
    let mut place = Place::new("30G");
    symlink("/nonexistent/elsewhere.img", place.image()).unwrap();
    let error = place.init().unwrap_err();
    assert!(
        matches!(&error, StorageError::LinkedImage { target, .. } if target == "/nonexistent/elsewhere.img"),
        "{error}"
    );
}

#[test]
fn an_unwritable_fstab_is_a_warning() {
    let host = HostDisk::ext4(Bytes::from_mib(64));
    let read_only = host.folder.join("fstab");
    fs::write(&read_only, "# nothing\n").unwrap();
    run("mount", &["-o", "remount,ro", text(&host.folder)]);
    let scratch = tempfile::tempdir().unwrap();
    let null = scratch.path().join("null");
    // A separate device node, so that a failure does not change the machine's.
    let mode = Mode::from_raw_mode(0o666);
    mknodat(CWD, &null, FileType::CharacterDevice, mode, rustix::fs::makedev(1, 3)).unwrap();
    fs::set_permissions(&null, fs::Permissions::from_mode(0o666)).unwrap();

    for (table, why) in [(&read_only, "Read-only file system"), (&null, "not a regular file")] {
        let mut place = Place::new("30G");
        place.plan.fstab = Some(table.clone());
        assert_eq!(place.init().unwrap(), InitOutcome::Ready);
        let missing = format!(
            "{} {} btrfs loop,nofail,noatime,discard=async 0 0",
            text(place.image()),
            text(&place.plan.data_dir)
        );
        let warnings = place.warnings();
        assert!(warnings.len() == 1 && warnings[0].contains(why), "{warnings:?}");
        assert!(
            place.events.iter().any(|event| matches!(
                event,
                InitEvent::Warning(InitWarning::NotRegistered { line, .. }) if *line == missing
            )),
            "{:?}",
            place.events
        );
        drop(place.open(USUAL).admit(Gib::new(1).bytes()).unwrap());
        assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
    }
    assert_eq!(fs::metadata(&null).unwrap().permissions().mode() & 0o777, 0o666);
}

#[test]
fn the_registration_in_fstab_is_optional() {
    let mut place = Place::new("30G");
    let table = place.fstab().to_owned();
    place.plan.fstab = None;
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);
    assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
    assert!(!table.exists() && place.warnings().is_empty());
    place.open(USUAL);
}

#[test]
fn a_mount_point_in_use_in_fstab_is_rejected_before_anything_is_created() {
    let mut place = Place::new("30G");
    let line = format!("UUID=1234 {}/ ext4 defaults 0 2\n", text(&place.plan.data_dir));
    fs::write(place.fstab(), &line).unwrap();
    let error = place.init().unwrap_err().to_string();
    assert!(error.contains("already the mount point of UUID=1234"), "{error}");
    assert!(!place.image().exists() && !place.plan.data_dir.exists());
    assert_eq!(fs::read_to_string(place.fstab()).unwrap(), line);
}

#[test]
fn another_spelling_of_the_path_is_not_registered_again() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let mut slash = place.plan.data_dir.clone().into_os_string();
    slash.push("/");
    place.plan.data_dir = slash.into();
    assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
    assert_eq!(fs::read_to_string(place.fstab()).unwrap().lines().count(), 1);
    let source = registered_source(place.fstab(), &place.plan.data_dir).unwrap();
    assert_eq!(source.as_deref(), Some(text(place.image())));
}

#[test]
fn a_size_that_differs_from_the_existing_pool_is_a_warning() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    assert!(place.warnings().is_empty());
    place.plan.size = Some("40G".parse().unwrap());
    assert_eq!(place.init().unwrap(), InitOutcome::AlreadyThere);
    assert_eq!(
        place.warnings(),
        ["The requested size 40G has no effect: the pool already exists with 30 GiB"]
    );
}

#[test]
fn a_missing_pool_with_expected_disks_is_not_replaced() {
    let mut place = Place::new("30G");
    place.plan.expected_disks = 3;
    let error = place.init().unwrap_err();
    assert!(matches!(error, StorageError::PoolMissing { disks: 3, .. }), "{error}");
    assert!(!place.image().exists());
    // An existing pool is mounted.
    place.plan.expected_disks = 0;
    place.init().unwrap();
    unmount(&place.plan.data_dir, &place.plan.backing).unwrap();
    place.plan.expected_disks = 3;
    assert_eq!(place.init().unwrap(), InitOutcome::Ready);

    let host = HostDisk::made("2G", "mkfs.xfs", &["-q"]);
    let mut folder = Place::at(&host.folder, None);
    (folder.plan.backing, folder.plan.expected_disks) = (Backing::Existing, 1);
    assert!(matches!(folder.init(), Err(StorageError::PoolMissing { .. })));
    assert!(!folder.plan.data_dir.join("vms").exists());
}

/// Writes near the end of an image or device, where the pool may store guests' data.
type Disguise = fn(&File, u64);

/// Writes the uberblocks of a ZFS: blkid then reports several contradictory signatures.
fn as_zfs(file: &File, size: u64) {
    let mut uberblock = [0; 1024];
    uberblock[..8].copy_from_slice(&0x00ba_b10c_u64.to_le_bytes());
    for at in (size - (512 << 10)..size).step_by(1024) {
        file.write_all_at(&uberblock, at).unwrap();
    }
}

/// Writes the superblock of a Linux RAID, version 1.0: blkid then reports only that.
fn as_raid(file: &File, size: u64) {
    let sector = ((size >> 9) - 16) & !7;
    let mut superblock = [0; 256];
    superblock[..4].copy_from_slice(&0xa92b_4efc_u32.to_le_bytes());
    superblock[4] = 1;
    superblock[16..32].fill(7);
    superblock[144..152].copy_from_slice(&sector.to_le_bytes());
    file.write_all_at(&superblock, sector << 9).unwrap();
}

/// Writes a foreign signature, and checks that blkid detects it.
fn disguise(path: &Path, put_on: Disguise) {
    let file = File::options().write(true).open(path).unwrap();
    put_on(&file, 30 << 30);
    file.sync_all().unwrap();
    let blkid = Command::new("blkid").args(["-p", text(path)]).output().unwrap();
    let found = String::from_utf8_lossy(&blkid.stdout).into_owned();
    assert!(
        blkid.status.code() == Some(8) || found.contains("linux_raid_member"),
        "{found}"
    );
}

#[test]
fn guest_data_at_the_end_of_an_image_does_not_hide_the_pool() {
    for put_on in [as_zfs as Disguise, as_raid] {
        let mut place = Place::new("30G");
        place.init().unwrap();
        fs::write(place.plan.data_dir.join("vms/kept"), "kept").unwrap();
        unmount(&place.plan.data_dir, &place.plan.backing).unwrap();
        disguise(place.image(), put_on);
        assert_eq!(place.init().unwrap(), InitOutcome::Ready);
        assert_eq!(fs::read(place.plan.data_dir.join("vms/kept")).unwrap(), b"kept");
    }
}

#[test]
fn guest_data_at_the_end_of_a_device_does_not_hide_the_pool() {
    for put_on in [as_zfs as Disguise, as_raid] {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("disk");
        run("truncate", &["-s", "30G", text(&file)]);
        let device = run("losetup", &["--find", "--show", text(&file)]).trim().to_owned();
        let mut place = Place::at(scratch.path(), None);
        place.plan.backing = Backing::Device(device.clone().into());
        place.init().unwrap();
        let registered = fs::read_to_string(place.fstab()).unwrap();
        fs::write(place.plan.data_dir.join("vms/kept"), "kept").unwrap();
        unmount(&place.plan.data_dir, &place.plan.backing).unwrap();
        disguise(Path::new(&device), put_on);
        assert_eq!(place.init().unwrap(), InitOutcome::Ready);
        assert_eq!(fs::read(place.plan.data_dir.join("vms/kept")).unwrap(), b"kept");
        assert_eq!(fs::read_to_string(place.fstab()).unwrap(), registered);
        unmount(&place.plan.data_dir, &place.plan.backing).unwrap();

        // Ambiguous contents are not changed, and the error differs from that of other contents,
        // which may be erased.
        run("btrfs", &["filesystem", "label", &device, "somebody-else-s"]);
        let error = place.init().unwrap_err();
        assert!(
            matches!(
                &error,
                StorageError::UnfitDevice { reason: DeviceRefusal::Ambiguous(found), .. }
                    if found.contains("signatures of other contents")
            ),
            "{error}"
        );
        run("losetup", &["--detach", &device]);
    }
}

/// Enables quotas with simple accounting (kernel 6.7), which btrfs-progs of Debian 12 does not
/// support. Returns whether the kernel does.
fn enable_simple_quotas(folder: &Path) -> bool {
    #[repr(C)]
    struct QuotaCtl {
        command: u64,
        status: u64,
    }
    const QUOTA_CTL: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<QuotaCtl>(0x94, 40);
    let folder = File::open(folder).unwrap();
    let mut enable = QuotaCtl { command: 4, status: 0 };
    // SAFETY: the argument has the size and layout of `btrfs_ioctl_quota_ctl_args`.
    unsafe { rustix::ioctl::ioctl(&folder, rustix::ioctl::Updater::<QUOTA_CTL, QuotaCtl>::new(&mut enable)) }.is_ok()
}

/// Creates a btrfs with quotas, and in it a subvolume limited to 32 GiB.
fn limited_subvolume(simple: bool) -> Option<(HostDisk, PathBuf)> {
    let host = HostDisk::made("60G", "mkfs.btrfs", &["-q"]);
    if !simple {
        run("btrfs", &["quota", "enable", text(&host.folder)]);
    } else if !enable_simple_quotas(&host.folder) {
        return None;
    }
    let subvolume = host.folder.join("limited");
    run("btrfs", &["subvolume", "create", text(&subvolume)]);
    run("btrfs", &["qgroup", "limit", "32G", text(&subvolume)]);
    Some((host, subvolume))
}

/// Creates one subvolume for each kind of accounting that the kernel supports.
fn limited_subvolumes() -> impl Iterator<Item = (HostDisk, PathBuf)> {
    let both = [false, true].map(|simple| move || limited_subvolume(simple));
    both.into_iter().filter_map(|make| {
        let made = make();
        if made.is_none() {
            println!("skipped: this kernel has no simple quotas");
        }
        made
    })
}

#[test]
fn a_quota_under_the_image_limits_the_free_space() {
    for (host, subvolume) in limited_subvolumes() {
        let mut place = Place::at(&subvolume, Some("50G"));
        place.init().unwrap();
        assert!(
            place.warnings()[0].contains("larger than the free space on its host disk (31GB)"),
            "{:?}",
            place.warnings()
        );
        let pool = place.open(USUAL);
        let free = |pool: &Pool| pool.space().unwrap().free;
        assert!(
            free(&pool) < Gib::new(32).bytes() && free(&pool) > Gib::new(31).bytes(),
            "{}",
            free(&pool)
        );

        // The free space is the same before and after btrfs commits the data.
        fill(&subvolume, "ballast", Gib::new(20).bytes());
        for _ in 0..2 {
            assert!(
                free(&pool) < Gib::new(12).bytes() && free(&pool) > Gib::new(11).bytes(),
                "{}",
                free(&pool)
            );
            run("btrfs", &["filesystem", "sync", text(&host.folder)]);
        }
        let refused = pool.admit(Gib::new(11).bytes()).unwrap_err().to_string();
        assert_eq!(refused, "Insufficient storage: 11GB available, need 13GB");
        let refused = pool.grow(Some(Gib::new(55))).unwrap_err().to_string();
        assert!(refused.contains("can hold a pool of at most 9 GiB"), "{refused}");
        assert!(!pool.extend().unwrap());

        // A parent group of the subvolume's group counts too.
        run("btrfs", &["qgroup", "create", "1/100", text(&host.folder)]);
        let group = run("btrfs", &["subvolume", "show", text(&subvolume)]);
        let id = group
            .lines()
            .find_map(|line| line.trim().strip_prefix("Subvolume ID:"))
            .unwrap()
            .trim()
            .to_owned();
        run(
            "btrfs",
            &["qgroup", "assign", &format!("0/{id}"), "1/100", text(&host.folder)],
        );
        run("btrfs", &["qgroup", "limit", "25G", "1/100", text(&host.folder)]);
        run("btrfs", &["filesystem", "sync", text(&host.folder)]);
        assert!(free(&pool) < Gib::new(5).bytes(), "{}", free(&pool));
    }
}

#[test]
fn a_quota_on_the_pools_folder_is_its_capacity() {
    for (host, subvolume) in limited_subvolumes() {
        fill(&host.folder, "somebody-else-s", Gib::new(10).bytes());
        let mut place = Place::at(&subvolume, None);
        place.plan.backing = Backing::Existing;
        place.init().unwrap();
        let pool = place.open(USUAL);
        let space = pool.space().unwrap();
        assert_eq!(space.capacity, Gib::new(32).bytes());
        assert!(
            space.free < Gib::new(32).bytes() && space.free > Gib::new(31).bytes(),
            "{space:?}"
        );
        assert!(
            space.used < Gib::new(1).bytes(),
            "data outside the pool is not counted: {space:?}"
        );
        fill(&place.plan.data_dir.join("vms"), "disk", Gib::new(20).bytes());
        for _ in 0..2 {
            let space = pool.space().unwrap();
            assert!(
                space.free < Gib::new(12).bytes() && space.free > Gib::new(11).bytes(),
                "{space:?}"
            );
            run("btrfs", &["filesystem", "sync", text(&host.folder)]);
        }
        let refused = pool.admit(Gib::new(11).bytes()).unwrap_err().to_string();
        assert_eq!(refused, "Insufficient storage: 11GB available, need 13GB");
        run("btrfs", &["quota", "disable", text(&host.folder)]);
        assert!(pool.space().unwrap().capacity > Gib::new(55).bytes(), "quotas are off");
    }
}

#[test]
fn a_quota_inside_the_pool_limits_the_free_space() {
    let mut place = Place::new("30G");
    place.init().unwrap();
    let pool = place.open(USUAL);
    run("btrfs", &["quota", "enable", text(&place.plan.data_dir)]);
    assert!(
        pool.space().unwrap().free > Gib::new(20).bytes(),
        "a quota without a limit has no effect"
    );
    run("btrfs", &["qgroup", "limit", "10G", text(&place.plan.data_dir)]);
    let space = pool.space().unwrap();
    assert!(
        space.free <= Gib::new(10).bytes() && space.capacity == Gib::new(10).bytes(),
        "{space:?}"
    );
    // The file system itself keeps its size and can be resized.
    pool.shrink(Gib::new(25)).unwrap();
    assert_eq!(fs::metadata(place.image()).unwrap().len(), 25 << 30);
}

#[test]
fn an_xfs_project_quota_under_the_image_limits_the_free_space() {
    let scratch = tempfile::tempdir().unwrap();
    let (image, folder) = (scratch.path().join("host.img"), scratch.path().join("host"));
    run("truncate", &["-s", "60G", text(&image)]);
    run("mkfs.xfs", &["-q", text(&image)]);
    fs::create_dir(&folder).unwrap();
    let mounted = Command::new("mount")
        .args(["-o", "loop,prjquota", text(&image), text(&folder)])
        .output()
        .unwrap();
    if !mounted.status.success() {
        println!("skipped: this kernel has no XFS quotas");
        return;
    }
    let limited = folder.join("limited");
    fs::create_dir(&limited).unwrap();
    run(
        "xfs_quota",
        &[
            "-x",
            "-c",
            &format!("project -s -p {} 42", text(&limited)),
            text(&folder),
        ],
    );
    run("xfs_quota", &["-x", "-c", "limit -p bhard=32g 42", text(&folder)]);
    {
        let mut place = Place::at(&limited, Some("50G"));
        place.init().unwrap();
        let pool = place.open(USUAL);
        assert!(pool.space().unwrap().free <= Gib::new(32).bytes(), "{:?}", pool.space());
        fill(&limited, "ballast", Gib::new(20).bytes());
        assert!(pool.space().unwrap().free <= Gib::new(12).bytes(), "{:?}", pool.space());
    }
    run("umount", &[text(&folder)]);
}

/// Creates foreign entries in the pool's folders.
fn make_odd_entries(pool: &Path) -> Vec<PathBuf> {
    let mut odd = Vec::new();
    let grown = pool.join("templates/.grown");
    fs::create_dir_all(&grown).unwrap();
    for folder in [pool.join("vms"), pool.join("templates"), grown] {
        let at = |name: &str| folder.join(name);
        for name in ["folder.ext4", "folder.partial", "tiny@1.2.ext4"] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("inside"), "kept").unwrap();
        }
        for name in ["pipe.ext4", "pipe.partial", "pipe@1.2.ext4"] {
            mknodat(CWD, at(name), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        }
        for name in ["link.ext4", "link.partial"] {
            symlink("/etc/passwd", at(name)).unwrap();
        }
        drop(UnixListener::bind(at("socket.ext4")).unwrap());
        let not_utf8 = folder.join(OsStr::from_bytes(b"f\xfcr.folder"));
        fs::create_dir(&not_utf8).unwrap();
        let names = [
            "folder.ext4",
            "folder.partial",
            "tiny@1.2.ext4",
            "pipe.ext4",
            "pipe.partial",
            "pipe@1.2.ext4",
            "link.ext4",
            "link.partial",
            "socket.ext4",
        ];
        odd.extend(names.map(at));
        odd.push(not_utf8);
    }
    odd
}

#[test]
fn foreign_entries_in_the_pools_folders_are_left_alone() {
    for on_xfs in [false, true] {
        let host = on_xfs.then(|| HostDisk::made("30G", "mkfs.xfs", &["-q"]));
        let place = match &host {
            None => Place::new("30G"),
            Some(host) => {
                let mut place = Place::at(&host.folder, None);
                place.plan.backing = Backing::Existing;
                place
            }
        };
        let stocked = Stocked::in_place(place, USUAL);
        let pool = &stocked.pool;
        let kept = stocked.create("vm-kept", 2);
        let stray = stocked.create("vm-stray", 2);
        fs::write(pool.path().join("vms").join(OsStr::from_bytes(b"f\xfcr.ext4")), "kept").unwrap();
        let odd = make_odd_entries(pool.path());

        let disks: HashSet<_> = pool.disks().unwrap().into_iter().collect();
        assert_eq!(disks, HashSet::from([kept.clone(), stray.clone()]));
        let swept = pool.sweep(&HashSet::from([kept.clone()])).unwrap();
        assert_eq!(swept.removed, [support::disk_path(pool, &stray)]);
        assert_eq!(swept.missing, []);
        let templates: Vec<_> = pool
            .templates()
            .unwrap()
            .into_iter()
            .map(|template| template.name)
            .collect();
        assert_eq!(templates, [name("tiny")]);
        pool.measure().unwrap();
        stocked.create("vm-more", 3);
        for path in odd {
            assert!(path.symlink_metadata().is_ok(), "{}", path.display());
        }
        assert_eq!(fs::read(pool.path().join("vms/folder.ext4/inside")).unwrap(), b"kept");
        assert!(pool.path().join("vms").join(OsStr::from_bytes(b"f\xfcr.ext4")).exists());
    }
}

#[test]
fn a_failed_resize_is_rolled_back_and_can_be_retried() {
    let host = HostDisk::ext4(Gib::new(100).bytes());
    let mut place = Place::at(&host.folder, Some("30G"));
    place.init().unwrap();
    let pool = place.open(USUAL);
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
    // Image and loop device grow, but a read-only file system does not.
    run("mount", &["-o", "remount,ro", text(&place.plan.data_dir)]);
    for change in [
        |pool: &Pool| pool.grow(Some(Gib::new(60))),
        |pool: &Pool| pool.extend().map(drop),
        |pool: &Pool| pool.shrink(Gib::new(20)),
    ] {
        let error = change(&pool).unwrap_err();
        assert!(matches!(error, StorageError::Program(_)), "{error}");
        assert_eq!(layers(), [30; 3]);
        pool.reconcile().unwrap();
        assert_eq!(layers(), [30; 3], "a failure is not completed later");
    }
    run("mount", &["-o", "remount,rw", text(&place.plan.data_dir)]);
    pool.grow(Some(Gib::new(60))).unwrap();
    assert_eq!(layers(), [60; 3]);
}

#[test]
fn growth_is_relative_to_the_file_system_not_to_a_larger_image() {
    let host = HostDisk::ext4(Gib::new(100).bytes());
    let mut place = Place::at(&host.folder, Some("30G"));
    place.init().unwrap();
    let pool = place.open(USUAL);
    run("truncate", &["-s", "60G", text(place.image())]);
    pool.grow(Some(Gib::new(60))).unwrap();
    assert_eq!(pool.space().unwrap().capacity, Gib::new(60).bytes());
    run("truncate", &["-s", "79G", text(place.image())]);
    pool.grow(Some(Gib::new(70))).unwrap();
    assert_eq!(pool.space().unwrap().capacity, Gib::new(70).bytes());
    assert_eq!(fs::metadata(place.image()).unwrap().len(), 70 << 30);
    run("truncate", &["-s", "79G", text(place.image())]);
    assert!(pool.extend().unwrap());
    assert!(pool.space().unwrap().capacity > Gib::new(75).bytes());
}

#[test]
fn an_unmounted_pool_is_reported_instead_of_a_missing_template() {
    let stocked = Stocked::new("30G", USUAL);
    let (pool, id) = (&stocked.pool, stocked.create("vm-a", 2));
    run("umount", &["--lazy", text(pool.path())]);
    let not_mounted =
        |result: Result<(), StorageError>| assert!(matches!(result, Err(StorageError::NotMounted(_))), "{result:?}");
    not_mounted(pool.template(&name("tiny")).map(drop));
    not_mounted(pool.delete_template(&name("tiny")));
    not_mounted(pool.unlink_disk(&id).map(drop));
}
