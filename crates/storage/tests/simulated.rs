//! A simulated pool, as the tests of other crates use it: by an ordinary user, in any folder.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step ends the test"
)]

use scalebox_storage::{Bounds, Pool, SimulatedSpace, StorageError, TemplateExport, UnlinkedDisk};
use scalebox_units::{Bytes, DiskLocation, Gib, TemplateName, VmId};
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::thread;

/// An account that owns nothing.
const NOBODY: u32 = 65534;
const BOUNDS: Bounds = Bounds {
    buffer: Gib::new(2),
    overcommit_ratio: 4.0,
};
const MAX: Bytes = Bytes::from_mib(1);
const CONTENTS: &[u8] = b"the contents of a template";

/// Runs `test` in an empty folder of an unprivileged user, in a thread of its own.
fn as_an_ordinary_user(test: impl FnOnce(&Path) + Send) {
    // The folder is not in TMPDIR, which may be in a folder that only root can enter.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    thread::scope(|scope| {
        let running = scope.spawn(|| {
            if rustix::process::geteuid().is_root() {
                chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
                let (uid, gid) = (rustix::fs::Uid::from_raw(NOBODY), rustix::fs::Gid::from_raw(NOBODY));
                rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
                rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            }
            test(folder.path());
        });
        running.join().unwrap();
    });
}

fn name(text: &str) -> TemplateName {
    text.parse().unwrap()
}

fn vm(n: u32) -> VmId {
    format!("vm-{n:012x}").parse().unwrap()
}

fn path_of(pool: &Pool, id: &VmId) -> PathBuf {
    match pool.disk_location(id) {
        DiskLocation::File(path) => path,
        other => panic!("{other:?} is not a file"),
    }
}

/// Opens the pool in `folder`, with the template `tiny` of a few bytes.
fn pool_in(folder: &Path, space: &SimulatedSpace) -> Pool {
    let pool = Pool::simulated(folder, BOUNDS, space.clone()).unwrap();
    let image = folder.join("image");
    fs::write(&image, CONTENTS).unwrap();
    pool.import_template(&name("tiny"), &image, MAX, false).unwrap();
    pool
}

fn create(pool: &Pool, id: &VmId, template: &str, size: Bytes) -> Result<(), StorageError> {
    let admitted = pool.admit(size)?;
    pool.create_disk(id, &name(template), &admitted)?;
    admitted.commit();
    Ok(())
}

#[test]
fn disks_templates_and_snapshots_work_without_root() {
    as_an_ordinary_user(|folder| {
        let space = SimulatedSpace::new(Gib::new(100).bytes());
        let pool = pool_in(folder, &space);
        pool.lock().unwrap();
        let size = Gib::new(10).bytes();
        create(&pool, &vm(1), "tiny", size).unwrap();
        let disk = path_of(&pool, &vm(1));
        assert_eq!(pool.provisioned(&vm(1)).unwrap(), size);
        assert!(pool.disk_used(&vm(1)).unwrap() < MAX, "the disk is sparse");
        pool.grow_disk(&vm(1), Gib::new(20).bytes()).unwrap();
        assert_eq!(fs::metadata(&disk).unwrap().len(), 20 << 30);

        let mut snapshot = pool.begin_snapshot(&name("base")).unwrap();
        pool.flush_disk(&vm(1)).unwrap();
        pool.take_snapshot(&mut snapshot, &vm(1)).unwrap();
        let base = pool.finish_snapshot(snapshot, &Default::default()).unwrap();
        assert_eq!(base.size, Gib::new(20).bytes());
        create(&pool, &vm(2), "base", base.size).unwrap();
        let mut head = vec![0; CONTENTS.len()];
        let clone = fs::File::open(path_of(&pool, &vm(2))).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&clone, &mut head, 0).unwrap();
        assert_eq!(head, CONTENTS);

        let exported: TemplateExport = pool.pack_template(&name("tiny")).unwrap();
        let mut packed = Vec::new();
        exported.write_to(&mut packed, |_| {}).unwrap();
        pool.unpack_template(&name("again"), &packed[..], MAX, false).unwrap();
        pool.delete_template(&name("base")).unwrap();
        let names: Vec<_> = pool.templates().unwrap().into_iter().map(|it| it.name).collect();
        assert_eq!(names, [name("again"), name("tiny")]);

        let unlinked: UnlinkedDisk = pool.unlink_disk(&vm(2)).unwrap().unwrap();
        pool.reclaim(unlinked).unwrap();
        assert!(!pool.has_disk(&vm(2)).unwrap());
    });
}

#[test]
fn admission_follows_the_space_that_the_test_sets() {
    as_an_ordinary_user(|folder| {
        let space = SimulatedSpace::new(Gib::new(12).bytes());
        let pool = pool_in(folder, &space);
        let refused = create(&pool, &vm(1), "tiny", Gib::new(11).bytes()).unwrap_err();
        assert!(matches!(refused, StorageError::Insufficient { .. }), "{refused}");
        space.set(Gib::new(100).bytes(), Gib::new(50).bytes());
        create(&pool, &vm(1), "tiny", Gib::new(11).bytes()).unwrap();
        assert_eq!(pool.space().unwrap().used, Gib::new(50).bytes());
        space.set_free(Gib::new(5).bytes());
        assert!(pool.admit(Gib::new(4).bytes()).is_err());
        assert_eq!(pool.space().unwrap().free, Gib::new(5).bytes());
    });
}

#[test]
fn a_pool_that_is_opened_again_has_its_disks_and_loses_the_orphaned_ones() {
    as_an_ordinary_user(|folder| {
        let space = SimulatedSpace::new(Gib::new(100).bytes());
        let size = Gib::new(1).bytes();
        let pool = pool_in(folder, &space);
        pool.set_owner("this test").unwrap();
        create(&pool, &vm(1), "tiny", size).unwrap();
        create(&pool, &vm(2), "tiny", size).unwrap();
        drop(pool);

        let pool = Pool::simulated(folder, BOUNDS, space.clone()).unwrap();
        assert_eq!(pool.owner().unwrap().as_deref(), Some("this test"));
        assert_eq!(pool.commitments().committed, Bytes::ZERO);
        pool.restore(size);
        let swept = pool.sweep(&HashSet::from([vm(1), vm(3)])).unwrap();
        assert_eq!(swept.removed, [path_of(&pool, &vm(2))]);
        assert_eq!(swept.missing, [vm(3)]);
        let usage = pool.measure().unwrap();
        assert_eq!(usage.disks[&vm(1)].provisioned, size);
        assert!(!pool.needs_measuring());
        assert_eq!(pool.discard_free_blocks().unwrap(), Bytes::ZERO);
        assert!(matches!(pool.grow(None), Err(StorageError::ExistingFileSystem(_))));
    });
}
