//! A pool in which btrfs runs out of what `df` does not show: metadata, with every chunk given to
//! data.

#![allow(clippy::unwrap_used, reason = "a test stops where it cannot go on")]

mod support;

use scalebox_storage::{Bounds, Bytes, Gib, Pool, StorageError};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use support::{MAX, Place, disk_path, fill, name, run, text};

/// The most that a pool lets in: no buffer, and promises as good as without end.
const RECKLESS: Bounds = Bounds {
    buffer: Gib::new(0),
    overcommit_ratio: 1000.0,
};

/// Fills the pool until every chunk is taken, mostly by data, and deletes half of that again: `df`
/// shows hundreds of MiB free, and metadata cannot grow.
fn give_every_chunk_to_data(pool: &Pool) {
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

/// An ext4 whose blocks lie scattered: each clone of it takes half a MiB of metadata and no data.
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

fn takes_writes(pool: &Pool) {
    let options = run("findmnt", &["-n", "-o", "OPTIONS", text(pool.path())]);
    assert!(options.starts_with("rw"), "{options}");
    let probe = pool.path().join("probe");
    fs::write(&probe, "written").unwrap();
    fs::File::open(&probe).unwrap().sync_all().unwrap();
    fs::remove_file(&probe).unwrap();
}

#[test]
fn small_files_and_clones_that_eat_the_metadata_are_refused_before_the_pool_turns_read_only() {
    let scratch = tempfile::tempdir().unwrap();
    let mut place = Place::new("2G");
    place.init().unwrap();
    let pool = place.open(RECKLESS);
    let template = pool
        .import_template(&name("scattered"), &scattered_image(scratch.path()), MAX, false)
        .unwrap();
    give_every_chunk_to_data(&pool);
    let space = pool.space().unwrap();
    assert!(space.free > Bytes::from_mib(256), "{space:?}");

    // Small files lie in the metadata altogether.
    let left = |pool: &Pool| {
        let space = pool.space().unwrap();
        space.metadata_total - space.metadata_used
    };
    let folder = pool.path().join("kernel");
    let mut files = 0;
    while left(&pool) > Bytes::from_mib(48) {
        for _ in 0..1000 {
            fs::write(folder.join(format!("small-{files}")), [7; 2000]).unwrap();
            files += 1;
        }
        run("btrfs", &["filesystem", "sync", text(pool.path())]);
    }
    assert!(files >= 5000, "{files} files");

    // So does the map of a clone. A refusal that only the transaction under way is the reason of is
    // asked again after it.
    let mut clones = Vec::new();
    let mut committed = false;
    let refusal = loop {
        match pool.admit(Bytes::from_mib(64)) {
            Ok(admitted) => {
                let id = name(&format!("vm-{}", clones.len()));
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
    takes_writes(&pool);

    // What was made can be deleted, and then there is room again.
    for id in &clones {
        assert!(disk_path(&pool, id).exists());
        pool.delete_disk(id).unwrap();
        pool.release(Bytes::from_mib(64));
    }
    run("btrfs", &["filesystem", "sync", text(pool.path())]);
    drop(pool.admit(Bytes::from_mib(64)).unwrap());
    takes_writes(&pool);
}
