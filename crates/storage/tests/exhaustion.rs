//! Exhaustion of btrfs metadata, which `df` does not show, when all chunks are data chunks.

#![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

mod support;

use scalebox_storage::{Bounds, Pool, StorageError};
use scalebox_units::{Bytes, Gib};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use support::{MAX, Place, disk_path, fill, name, run, text, vm_id};

/// Bounds without a buffer, and with a practically unlimited ratio.
const UNLIMITED: Bounds = Bounds {
    buffer: Gib::new(0),
    overcommit_ratio: 1000.0,
};

/// Fills the pool until every chunk is allocated, mostly for data, and deletes half of the data.
/// `df` then shows hundreds of MiB free, but metadata cannot grow.
fn allocate_every_chunk_for_data(pool: &Pool) {
    let folder = pool.path().join("vms");
    let mut pieces: Vec<PathBuf> = Vec::new();
    while pool.space().unwrap().free > Bytes::from_mib(96) {
        let piece = format!("piece-{}", pieces.len());
        fill(&folder, &piece, Bytes::from_mib(64));
        pieces.push(folder.join(piece));
    }
    for piece in pieces.iter().skip(1).step_by(2) {
        fs::remove_file(piece).unwrap();
    }
    run("btrfs", &["filesystem", "sync", text(pool.path())]);
}

/// Creates an image with scattered blocks: each clone takes half a MiB of metadata and no data.
fn scattered_image(folder: &std::path::Path) -> PathBuf {
    let image = folder.join("scattered.ext4");
    run(
        "mke2fs",
        &[
            "-q",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-O",
            "^has_journal",
            text(&image),
            "64M",
        ],
    );
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    for block in (4096..16384).step_by(2) {
        file.write_all_at(&[7; 4096], block * 4096).unwrap();
    }
    image
}

fn check_writable(pool: &Pool) {
    let options = run("findmnt", &["-n", "-o", "OPTIONS", text(pool.path())]);
    assert!(options.starts_with("rw"), "{options}");
    let probe = pool.path().join("probe");
    fs::write(&probe, "written").unwrap();
    fs::File::open(&probe).unwrap().sync_all().unwrap();
    fs::remove_file(&probe).unwrap();
}

#[test]
fn admission_refuses_before_exhausted_metadata_makes_the_pool_read_only() {
    let scratch = tempfile::tempdir().unwrap();
    let mut place = Place::new("2G");
    place.init().unwrap();
    let pool = place.open(UNLIMITED);
    let template = pool
        .import_template(&name("scattered"), &scattered_image(scratch.path()), MAX, false)
        .unwrap();
    allocate_every_chunk_for_data(&pool);
    let space = pool.space().unwrap();
    assert!(space.free > Bytes::from_mib(256), "{space:?}");

    // Small files are stored in the metadata.
    let left = |pool: &Pool| {
        let space = pool.space().unwrap();
        space.metadata_total - space.metadata_used
    };
    let folder = pool.kernels_dir();
    let mut files = 0;
    while left(&pool) > Bytes::from_mib(48) {
        for _ in 0..1000 {
            fs::write(folder.join(format!("small-{files}")), [7; 2000]).unwrap();
            files += 1;
        }
        run("btrfs", &["filesystem", "sync", text(pool.path())]);
    }
    assert!(files >= 5000, "{files} files");

    // A clone's extent map is metadata too. Retry after a commit: only the current transaction may
    // have caused the refusal.
    let mut clones = Vec::new();
    let mut committed = false;
    let refusal = loop {
        match pool.admit(Bytes::from_mib(64)) {
            Ok(admitted) => {
                let id = vm_id(&format!("vm-{}", clones.len()));
                pool.create_disk(&id, &template.name, &admitted).unwrap();
                admitted.commit();
                clones.push(id);
                committed = false;
            }
            Err(error) if committed => break error,
            Err(_) => {
                run("btrfs", &["filesystem", "sync", text(pool.path())]);
                committed = true;
            }
        }
    };
    assert!(matches!(refusal, StorageError::Insufficient { .. }), "{refusal}");
    assert!(clones.len() > 5, "{} clones", clones.len());
    check_writable(&pool);

    // After deleting the clones there is space again.
    for id in &clones {
        assert!(disk_path(&pool, id).exists());
        pool.delete_disk(id).unwrap();
        pool.release(Bytes::from_mib(64));
    }
    run("btrfs", &["filesystem", "sync", text(pool.path())]);
    drop(pool.admit(Bytes::from_mib(64)).unwrap());
    check_writable(&pool);
}
