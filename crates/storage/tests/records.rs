//! The records of templates, the kernels that they name, and pools of releases that had neither.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step ends the test"
)]

mod support;

use scalebox_storage::{ConvertedImage, KernelFiles, Pool, PulledImage, SimulatedSpace, StorageError, TemplateSource};
use scalebox_units::{Bytes, Gib, ImageConfig, Init, KernelId};
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use support::{MAX, Stocked, USUAL, disk_path, name, run, text, vm_id};
use tempfile::TempDir;

fn simulated() -> (TempDir, Pool) {
    let folder = tempfile::tempdir().unwrap();
    let pool = folder.path().join("pool");
    fs::create_dir(&pool).unwrap();
    let pool = Pool::simulated(&pool, USUAL, SimulatedSpace::new(Gib::new(100).bytes())).unwrap();
    (folder, pool)
}

/// Writes a file and returns its path.
fn file(folder: &Path, file: &str, content: &str) -> PathBuf {
    let path = folder.join(file);
    fs::write(&path, content).unwrap();
    path
}

fn kernel(folder: &Path, content: &str, modules: bool) -> KernelFiles {
    KernelFiles {
        vmlinuz: file(folder, "a-kernel", content),
        initrd: file(folder, "an-initramfs", "the same"),
        modules: modules.then(|| file(folder, "modules", "modules")),
    }
}

fn files_in(folder: &Path) -> Vec<String> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|file| file != ".grown")
        .collect();
    files.sort();
    files
}

fn no_vms() -> HashSet<KernelId> {
    HashSet::new()
}

#[test]
fn a_pulled_image_keeps_its_reference_settings_and_init() {
    let (folder, pool) = simulated();
    let image = file(folder.path(), "image", "content");
    let pulled = PulledImage {
        reference: "docker.io/library/box:1".to_owned(),
        digest: format!("sha256:{}", "a".repeat(64)),
    };
    let config = ImageConfig {
        cmd: vec!["/bin/sh".to_owned()],
        ..ImageConfig::default()
    };
    let converted = ConvertedImage {
        path: &image,
        pulled: Some(pulled.clone()),
        config: Some(config.clone()),
        init: Some(Init::Agent),
        edited_files: &[],
    };
    pool.import_converted(&name("box"), converted.clone(), false).unwrap();
    let template = pool.template(&name("box")).unwrap();
    assert_eq!(template.source, Some(TemplateSource::Pull(pulled)));
    assert_eq!((template.config, template.init), (Some(config), Some(Init::Agent)));
    let again = pool.import_converted(&name("box"), converted.clone(), false);
    assert!(matches!(again, Err(StorageError::TemplateExists(_))));
    let imported = ConvertedImage {
        pulled: None,
        ..converted
    };
    let replaced = pool.import_converted(&name("box"), imported, true).unwrap();
    assert_eq!(replaced.source, Some(TemplateSource::Import));
}

#[test]
fn a_record_names_source_kernel_and_digest() {
    let (folder, pool) = simulated();
    let image = file(folder.path(), "image", "content");
    let early = pool.import_template(&name("early"), &image, MAX, false).unwrap();
    assert_eq!((&early.source, &early.kernel), (&Some(TemplateSource::Import), &None));
    let first = pool.install_kernel(&kernel(folder.path(), "first", true)).unwrap();
    let built = pool.import_built(&name("built"), &image, &first).unwrap();
    assert_eq!(
        (built.source, built.kernel),
        (Some(TemplateSource::Build), Some(first.clone()))
    );
    let second = pool.install_kernel(&kernel(folder.path(), "second", true)).unwrap();
    let imported = pool.import_template(&name("imported"), &image, MAX, false).unwrap();
    assert_eq!(imported.kernel, Some(second), "the newest");
    assert_eq!((&imported.digest, &built.digest), (&early.digest, &early.digest));
    assert!(early.digest.unwrap().starts_with("blocks-sha256:"));

    let admitted = pool.admit(Bytes::from_mib(1)).unwrap();
    let vm = vm_id("vm-a");
    pool.create_disk(&vm, &name("built"), &admitted).unwrap();
    let mut snapshot = pool.begin_snapshot(&name("base")).unwrap();
    snapshot.set_kernel(Some(first.clone()));
    pool.take_snapshot(&mut snapshot, &vm).unwrap();
    let base = pool.finish_snapshot(snapshot, &Default::default()).unwrap();
    assert_eq!(base.source, Some(TemplateSource::Snapshot(vm)));
    assert_eq!((&base.kernel, &base.digest), (&Some(first), &None));
    assert_eq!(pool.template(&name("base")).unwrap(), base);
}

#[test]
fn a_replaced_template_has_the_new_image_and_leaves_none() {
    let (folder, pool) = simulated();
    let templates = pool.path().join("templates");
    let import = |content: &str, replace| {
        let image = file(folder.path(), "image", content);
        pool.import_template(&name("box"), &image, MAX, replace)
            .map(|made| made.digest)
    };
    let first = import("first", true).unwrap();
    assert_eq!(files_in(&templates), ["box.ext4", "box.json"]);
    assert!(matches!(import("second", false), Err(StorageError::TemplateExists(_))));
    for content in ["second", "third"] {
        let replaced = import(content, true).unwrap();
        assert_ne!(replaced, first);
        assert_eq!(pool.template(&name("box")).unwrap().digest, replaced);
        assert_eq!(files_in(&templates).len(), 2, "{:?}", files_in(&templates));
        assert_eq!(pool.sweep_partials().unwrap(), Vec::<PathBuf>::new());
    }
    pool.delete_template(&name("box")).unwrap();
    assert_eq!(files_in(&templates), Vec::<String>::new());
}

#[test]
fn images_that_no_record_names_are_swept() {
    let (folder, pool) = simulated();
    let templates = pool.path().join("templates");
    let image = file(folder.path(), "image", "content");
    for template in ["kept", "damaged", "lost"] {
        pool.import_template(&name(template), &image, MAX, false).unwrap();
    }
    let stale = file(&templates, "kept@7.ext4", "replaced");
    let unrecorded = file(&templates, "unrecorded.ext4", "its record was never written");
    file(&templates, "damaged.json", "{");
    fs::remove_file(templates.join("lost.ext4")).unwrap();
    let mut swept = pool.sweep_partials().unwrap();
    swept.sort();
    assert_eq!(swept, [stale, unrecorded]);
    let listed: Vec<_> = pool.templates().unwrap().into_iter().map(|it| it.name).collect();
    assert_eq!(listed, [name("kept")]);
    let error = pool.template(&name("damaged")).unwrap_err();
    assert!(matches!(error, StorageError::DamagedRecord { .. }), "{error}");
    assert!(matches!(pool.template(&name("lost")), Err(StorageError::NoTemplate(_))));

    // Both templates can be made again.
    pool.delete_template(&name("damaged")).unwrap();
    assert_eq!(pool.sweep_partials().unwrap(), [templates.join("damaged.ext4")]);
    for template in ["damaged", "lost"] {
        pool.import_template(&name(template), &image, MAX, false).unwrap();
    }
    assert_eq!(pool.templates().unwrap().len(), 3);
}

#[test]
fn a_kernel_is_installed_once_and_named_after_its_files() {
    let (folder, pool) = simulated();
    let first = pool.install_kernel(&kernel(folder.path(), "first", true)).unwrap();
    let second = pool.install_kernel(&kernel(folder.path(), "second", true)).unwrap();
    let bare = pool.install_kernel(&kernel(folder.path(), "first", false)).unwrap();
    assert_ne!(first, bare, "without modules it is another");
    assert_eq!(pool.kernels().unwrap(), [bare.clone(), second.clone(), first.clone()]);
    assert_eq!(
        pool.install_kernel(&kernel(folder.path(), "first", true)).unwrap(),
        first
    );
    assert_eq!(pool.kernels().unwrap(), [first.clone(), bare.clone(), second.clone()]);
    let files = pool.kernel(&first).unwrap().files;
    assert_eq!(fs::read_to_string(files.vmlinuz).unwrap(), "first");
    assert_eq!(fs::read_to_string(files.modules.unwrap()).unwrap(), "modules");
    assert_eq!(pool.kernel(&bare).unwrap().files.modules, None);

    let gone: KernelId = "0123456789abcdef".parse().unwrap();
    let chosen = |id: &KernelId| pool.kernel_or_newest(Some(id)).unwrap().unwrap().id;
    assert_eq!((chosen(&second), chosen(&gone)), (second, first));
}

#[test]
fn kernels_that_nothing_uses_are_removed_except_the_newest() {
    let (folder, pool) = simulated();
    let image = file(folder.path(), "image", "content");
    let install = |content: &str| pool.install_kernel(&kernel(folder.path(), content, true)).unwrap();
    let [of_template, of_vm, unused, newest] = ["template", "vm", "unused", "newest"].map(install);
    pool.import_built(&name("box"), &image, &of_template).unwrap();
    let used: HashSet<_> = [of_vm.clone()].into();
    assert_eq!(pool.remove_unused_kernels(&used).unwrap(), [unused]);
    // A record that cannot be read may name any kernel.
    let record = pool.path().join("templates/box.json");
    let intact = fs::read(&record).unwrap();
    fs::write(&record, "{").unwrap();
    assert_eq!(pool.remove_unused_kernels(&no_vms()).unwrap(), Vec::<KernelId>::new());
    fs::write(&record, intact).unwrap();
    assert_eq!(pool.remove_unused_kernels(&no_vms()).unwrap(), [of_vm]);
    pool.delete_template(&name("box")).unwrap();
    assert_eq!(pool.remove_unused_kernels(&no_vms()).unwrap(), [of_template]);
    assert_eq!(pool.kernels().unwrap(), [newest]);

    // A crash can leave these folders.
    let half = pool.kernels_dir().join(".fedcba9876543210.partial");
    fs::create_dir(&half).unwrap();
    file(&half, "vmlinuz", "half");
    assert_eq!(pool.sweep_partials().unwrap(), std::slice::from_ref(&half));
    assert!(!half.exists());
}

/// Turns the pool into one of the release before records and several kernels.
fn downgrade(pool: &Path) {
    let kernels = pool.join("kernels");
    fs::create_dir(pool.join("kernel")).unwrap();
    for folder in files_in(&kernels) {
        for file in ["vmlinuz", "initrd.img"] {
            fs::rename(kernels.join(&folder).join(file), pool.join("kernel").join(file)).unwrap();
        }
    }
    fs::remove_dir_all(kernels).unwrap();
    for file in files_in(&pool.join("templates")) {
        if file.ends_with(".json") {
            fs::remove_file(pool.join("templates").join(file)).unwrap();
        }
    }
}

#[test]
fn a_pool_of_an_earlier_release_is_upgraded_without_copying_anything() {
    let Stocked {
        pool,
        template,
        mut place,
    } = Stocked::new("30G", USUAL);
    let scratch = tempfile::tempdir().unwrap();
    pool.install_kernel(&kernel(scratch.path(), "kernel", false)).unwrap();
    let admitted = pool.admit(Gib::new(2).bytes()).unwrap();
    pool.create_disk(&vm_id("vm-a"), &name("tiny"), &admitted).unwrap();
    let root = pool.path().to_owned();
    drop((admitted, pool));
    downgrade(&root);
    let inode = |path: &str| root.join(path).metadata().unwrap().ino();
    let before = [inode("templates/tiny.ext4"), inode("kernel/vmlinuz")];

    // `pool init` runs before the daemon of the new release.
    place.init().unwrap();
    let pool = place.open(USUAL);
    assert!(!pool.is_upgraded());
    let keep = [vm_id("vm-a")].into();
    assert_eq!(pool.sweep(&keep).unwrap().removed.len(), 1, "only the base image");
    assert!(root.join("templates/tiny.ext4").exists());

    pool.lock().unwrap();
    pool.upgrade().unwrap();
    assert!(pool.is_upgraded() && !root.join("kernel").exists());
    let upgraded = pool.template(&name("tiny")).unwrap();
    let kernel = upgraded.kernel.clone().unwrap();
    assert_eq!(
        (upgraded.size, &upgraded.source, &upgraded.digest),
        (template.size, &None, &None)
    );
    assert_eq!(pool.kernels().unwrap(), std::slice::from_ref(&kernel));
    let vmlinuz = format!("kernels/{kernel}/vmlinuz");
    assert_eq!([inode("templates/tiny.ext4"), inode(&vmlinuz)], before);
    pool.upgrade().unwrap();
    assert_eq!(pool.sweep(&keep).unwrap().removed, Vec::<PathBuf>::new());
    // A folder of that name that is not of an earlier release.
    let notes = root.join("kernel/notes.txt");
    fs::create_dir(root.join("kernel")).unwrap();
    fs::write(&notes, "the operator's").unwrap();
    assert!(pool.is_upgraded());
    pool.upgrade().unwrap();
    assert!(notes.exists());
    let admitted = pool.admit(Gib::new(3).bytes()).unwrap();
    pool.create_disk(&vm_id("vm-b"), &name("tiny"), &admitted).unwrap();
    run("e2fsck", &["-fn", text(&disk_path(&pool, &vm_id("vm-b")))]);
}

#[test]
fn images_in_a_pool_without_any_record_are_recorded_and_not_swept() {
    let (folder, pool) = simulated();
    let image = file(folder.path(), "image", "content");
    pool.import_template(&name("box"), &image, MAX, false).unwrap();
    fs::remove_file(pool.path().join("templates/box.json")).unwrap();
    assert!(!pool.is_upgraded());
    assert_eq!(pool.sweep_partials().unwrap(), Vec::<PathBuf>::new());
    pool.upgrade().unwrap();
    assert!(pool.is_upgraded());
    assert_eq!(pool.template(&name("box")).unwrap().size, Bytes::new(7));
    // Since another template has a record, an image without a record is a leftover.
    pool.import_template(&name("other"), &image, MAX, false).unwrap();
    fs::remove_file(pool.path().join("templates/box.json")).unwrap();
    assert_eq!(pool.sweep_partials().unwrap(), [pool.path().join("templates/box.ext4")]);
}
