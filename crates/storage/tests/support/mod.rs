//! Real pools for tests, each in its own scratch folder and unmounted on drop.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step ends the test"
)]

use scalebox_images::scrub;
use scalebox_storage::{
    Backing, Bounds, EditedFile, InitEvent, InitOutcome, PendingSnapshot, Pool, PoolPlan, Scrub, StorageError,
    Template, init, unmount,
};
use scalebox_units::{Bytes, Gib, TemplateName, VmId};
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Runs a program, and panics if it fails.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .output()
        .expect(program);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Writes to a file and flushes it.
pub(crate) fn write(path: &Path, offset: u64, length: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&vec![0x5a; length as usize], offset).unwrap();
    file.sync_all().unwrap();
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// A mounted file system of `size` in a sparse file: represents a host's disk.
pub(crate) struct HostDisk {
    pub folder: PathBuf,
    _scratch: TempDir,
}

impl HostDisk {
    pub(crate) fn ext4(size: Bytes) -> HostDisk {
        let scratch = tempfile::tempdir().unwrap();
        let (image, folder) = (scratch.path().join("host.img"), scratch.path().join("host"));
        File::create_new(&image).unwrap().set_len(size.as_u64()).unwrap();
        run("mke2fs", &["-q", "-t", "ext4", "-m", "0", text(&image)]);
        HostDisk::mount(scratch, &image, folder)
    }

    /// Creates a disk and formats it with the given program.
    pub(crate) fn made(size: &str, program: &str, args: &[&str]) -> HostDisk {
        let scratch = tempfile::tempdir().unwrap();
        let (image, folder) = (scratch.path().join("host.img"), scratch.path().join("host"));
        run("truncate", &["-s", size, text(&image)]);
        run(program, &[args, &[text(&image)]].concat());
        HostDisk::mount(scratch, &image, folder)
    }

    /// Copies the file system in `image` as a power cut would leave it now. Mount it only after the
    /// original is unmounted: the kernel treats two btrfs with one UUID as the same.
    pub(crate) fn after_power_cut(image: &Path) -> impl FnOnce() -> HostDisk + use<> {
        let scratch = tempfile::tempdir().unwrap();
        let (copy, folder) = (scratch.path().join("host.img"), scratch.path().join("host"));
        run("cp", &["--sparse=always", "--reflink=never", text(image), text(&copy)]);
        move || HostDisk::mount(scratch, &copy, folder)
    }

    fn mount(scratch: TempDir, image: &Path, folder: PathBuf) -> HostDisk {
        fs::create_dir(&folder).unwrap();
        run("mount", &["-o", "loop", text(image), text(&folder)]);
        HostDisk {
            folder,
            _scratch: scratch,
        }
    }
}

impl Drop for HostDisk {
    fn drop(&mut self) {
        run("umount", &[text(&self.folder)]);
    }
}

/// The location of a pool; [`Place::init`] creates it.
pub(crate) struct Place {
    pub plan: PoolPlan,
    pub events: Vec<InitEvent>,
    _scratch: Option<TempDir>,
}

impl Place {
    /// Creates a location in a scratch folder, for a pool of `size` such as `30G`.
    pub(crate) fn new(size: &str) -> Place {
        let scratch = tempfile::tempdir().unwrap();
        let mut place = Place::at(scratch.path(), Some(size));
        place._scratch = Some(scratch);
        place
    }

    pub(crate) fn at(folder: &Path, size: Option<&str>) -> Place {
        let plan = PoolPlan {
            data_dir: folder.join("pool"),
            backing: Backing::Image(folder.join("pool.img")),
            fstab: Some(folder.join("fstab")),
            expected_disks: 0,
            size: size.map(|size| size.parse().unwrap()),
            buffer: Gib::new(2),
        };
        Place {
            plan,
            events: Vec::new(),
            _scratch: None,
        }
    }

    /// Returns the path of the pool's image.
    pub(crate) fn image(&self) -> &Path {
        match &self.plan.backing {
            Backing::Image(image) => image,
            other => panic!("{other:?} is not an image"),
        }
    }

    /// Returns the fstab in which the mount is registered.
    pub(crate) fn fstab(&self) -> &Path {
        self.plan.fstab.as_deref().expect("an fstab")
    }

    pub(crate) fn init(&mut self) -> Result<InitOutcome, StorageError> {
        let events = &mut self.events;
        init(&self.plan, &mut |event| events.push(event))
    }

    pub(crate) fn open(&self, bounds: Bounds) -> Pool {
        Pool::open(&self.plan.data_dir, &self.plan.backing, bounds).unwrap()
    }

    pub(crate) fn steps(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter_map(|event| {
                if let InitEvent::Step(step) = event {
                    Some(step.as_str())
                } else {
                    None
                }
            })
            .collect()
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        self.events
            .iter()
            .filter_map(|event| {
                if let InitEvent::Warning(warning) = event {
                    Some(warning.to_string())
                } else {
                    None
                }
            })
            .collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.plan.data_dir, &self.plan.backing) {
            eprintln!("the test's pool is still mounted: {error}");
        }
    }
}

/// Limit for imports, larger than any image in the tests.
pub(crate) const MAX: Bytes = Bytes::from_mib(1 << 20);

pub(crate) const USUAL: Bounds = Bounds {
    buffer: Gib::new(2),
    overcommit_ratio: 4.0,
};

/// A pool with a small template `tiny` of 64 MiB.
pub(crate) struct Stocked {
    // The pool is dropped before the place, because its folder must be closed before it can be
    // unmounted.
    pub pool: Pool,
    pub template: Template,
    pub place: Place,
}

impl Stocked {
    /// Creates and commits the disk labelled `label`, of `size` GiB, from the template.
    pub(crate) fn create(&self, label: &str, size: u64) -> VmId {
        let id = vm_id(label);
        let admitted = self.pool.admit(Gib::new(size).bytes()).unwrap();
        self.pool.create_disk(&id, &self.template.name, &admitted).unwrap();
        admitted.commit();
        id
    }

    pub(crate) fn new(size: &str, bounds: Bounds) -> Stocked {
        Stocked::in_place(Place::new(size), bounds)
    }

    pub(crate) fn in_place(mut place: Place, bounds: Bounds) -> Stocked {
        place.init().unwrap();
        let pool = place.open(bounds);
        let scratch = tempfile::tempdir().unwrap();
        let image = ext4_image(scratch.path(), "64M");
        let template = pool.import_template(&name("tiny"), &image, MAX, false).unwrap();
        Stocked { pool, template, place }
    }
}

pub(crate) fn name(text: &str) -> TemplateName {
    text.parse().unwrap()
}

/// Returns the id that belongs to a label: tests distinguish disks by labels such as `vm-kept`.
pub(crate) fn vm_id(label: &str) -> VmId {
    let hash = label.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("vm-{:012x}", hash & 0xffff_ffff_ffff).parse().unwrap()
}

/// Finishes a snapshot without the identity of its guest, as the daemon does.
pub(crate) fn finish_snapshot(
    pool: &Pool,
    snapshot: PendingSnapshot,
    host_name: &str,
    ssh_public_key: &str,
) -> Result<Template, StorageError> {
    let hosts = |line: &[u8]| scrub::without_host(line, host_name.as_bytes());
    let keys = |line: &[u8]| scrub::without_key(line, ssh_public_key);
    let mut edited = vec![EditedFile {
        path: scrub::HOSTS,
        edit: &hosts,
    }];
    edited.extend(scrub::AUTHORIZED_KEYS.map(|path| EditedFile { path, edit: &keys }));
    let identity = Scrub {
        removed_files: &scrub::REMOVED_FILES,
        emptied_files: &scrub::EMPTIED_FILES,
        removed_by_prefix: &scrub::REMOVED_BY_PREFIX,
        removed_trees: &scrub::REMOVED_TREES,
        recreated_folders: &scrub::RECREATED_FOLDERS,
        edited_files: &edited,
    };
    pool.finish_snapshot(snapshot, &identity)
}

/// Creates a bare ext4 image with one file, `/marker`.
pub(crate) fn ext4_image(folder: &Path, size: &str) -> PathBuf {
    let (root, image) = (folder.join("root"), folder.join("image.ext4"));
    fs::create_dir(&root).unwrap();
    fs::write(root.join("marker"), "here\n").unwrap();
    run("mke2fs", &["-q", "-t", "ext4", "-d", text(&root), text(&image), size]);
    image
}

pub(crate) fn disk_path(pool: &Pool, id: &VmId) -> PathBuf {
    match pool.disk_location(id) {
        scalebox_units::DiskLocation::File(path) => path,
        other => panic!("{other:?} is not a file"),
    }
}

/// Returns the texts of `needles` that occur anywhere in an image, including unused space. Holes
/// are skipped.
pub(crate) fn found_in<'n>(image: &Path, needles: &[&'n str]) -> Vec<&'n str> {
    let scratch = tempfile::tempdir().unwrap();
    let (data, patterns) = (scratch.path().join("data"), scratch.path().join("patterns"));
    fs::write(&patterns, needles.join("\n")).unwrap();
    let (mut from, mut to) = (File::open(image).unwrap(), File::create(&data).unwrap());
    let size = from.metadata().unwrap().len();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&from, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&from, rustix::fs::SeekFrom::Hole(start))
            .unwrap()
            .min(size);
        from.seek(std::io::SeekFrom::Start(start)).unwrap();
        std::io::copy(&mut (&from).take(at - start), &mut to).unwrap();
    }
    let found = Command::new("grep")
        .args(["-aoF", "-f", text(&patterns), text(&data)])
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    assert_ne!(found.status.code(), Some(2), "grep");
    let found = String::from_utf8_lossy(&found.stdout).into_owned();
    let found: std::collections::HashSet<&str> = found.lines().collect();
    needles
        .iter()
        .copied()
        .filter(|needle| found.contains(needle))
        .collect()
}

/// Allocates blocks of a file system without writing them.
pub(crate) fn fill(folder: &Path, name: &str, size: Bytes) {
    run(
        "fallocate",
        &["-l", &size.as_u64().to_string(), text(&folder.join(name))],
    );
}
