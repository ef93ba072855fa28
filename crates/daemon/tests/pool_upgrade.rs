//! Tests the upgrade of a pool of the release before template records and kernels by id. The daemon
//! upgrades it when it starts, and is killed or gets an error at each step.
//!
//! This test is built only with the feature `fault-points`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

#[path = "../../vmm/tests/support/guest.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "the tests of the hypervisor use the rest")]
mod bare_guest;
mod support;

use bare_guest::Guest;
use scalebox_api::{CreateVm, Vm, VmStatus};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use support::{Host, Options, eventually, output_of};

/// Prefixes of the names of an upgrade's steps, including those that install a kernel and write a
/// record.
const PREFIXES: [&str; 3] = ["upgrade: ", "kernel: ", "template: "];

fn names_in(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| ![".grown", "initramfs"].contains(&name.as_str()))
        .collect()
}

/// Turns the pool and the state of a stopped daemon into those of the earlier release.
fn downgrade(host: &Host) {
    let (pool, kernels) = (host.folder.join("pool"), host.folder.join("pool/kernels"));
    fs::create_dir(pool.join("kernel")).unwrap();
    for id in names_in(&kernels) {
        for file in ["vmlinuz", "initrd.img"] {
            fs::rename(kernels.join(&id).join(file), pool.join("kernel").join(file)).unwrap();
        }
    }
    fs::remove_dir_all(kernels).unwrap();
    for file in names_in(&pool.join("templates"))
        .iter()
        .filter(|file| file.ends_with(".json"))
    {
        fs::remove_file(pool.join("templates").join(file)).unwrap();
    }
    let state = rusqlite::Connection::open(host.folder.join("state/state.db")).unwrap();
    state.execute("UPDATE vms SET kernel = NULL", []).unwrap();
}

/// Creates a host of the earlier release, with two templates and a VM that has run.
fn earlier_host() -> (Host, Vm) {
    let mut host = Host::new(&Options::default());
    Guest::Obedient.write_to(&host.kernel_folder().join("vmlinuz"));
    fs::write(host.kernel_folder().join("initrd.img"), b"none").unwrap();
    host.import_tiny("tiny");
    host.import_tiny("other");
    host.serve();
    let request = CreateVm {
        start: true,
        ..host.stopped("tiny")
    };
    let vm = host.client().create_vm(&request).unwrap();
    host.client().stop_vm(&vm.id).unwrap();
    assert!(host.terminate().success());
    downgrade(&host);
    (host, vm)
}

/// Checks that the upgrade is complete, and has left nothing behind.
fn check_upgraded(host: &Host, vm: &Vm, inode: u64) {
    let pool = host.folder.join("pool");
    let kernels = names_in(&pool.join("kernels"));
    let [kernel] = &kernels.iter().collect::<Vec<_>>()[..] else {
        panic!("{kernels:?}")
    };
    let templates = host.client().templates().unwrap();
    let found: Vec<_> = templates
        .iter()
        .map(|it| (it.name.as_str(), it.kernel.as_ref()))
        .collect();
    assert_eq!(found, [("other", Some(*kernel)), ("tiny", Some(*kernel))]);
    let files = ["other.ext4", "other.json", "tiny.ext4", "tiny.json"];
    assert_eq!(names_in(&pool.join("templates")), files.map(str::to_owned).into());
    assert_eq!(
        pool.join("templates/tiny.ext4").metadata().unwrap().ino(),
        inode,
        "not copied"
    );
    let folders = names_in(&pool);
    assert!(
        folders.iter().all(|name| !name.starts_with('.') && name != "kernel"),
        "{folders:?}"
    );
    let state = rusqlite::Connection::open(host.folder.join("state/state.db")).unwrap();
    let recorded: String = state
        .query_row("SELECT kernel FROM vms WHERE id = ?", [&vm.id], |row| row.get(0))
        .unwrap();
    assert_eq!(&recorded, *kernel);
}

/// Returns the steps of an upgrade, in the order in which they are first reached.
fn trace(host: &mut Host) -> Vec<String> {
    let trace = host.faults().join("trace");
    fs::write(&trace, "").unwrap();
    host.serve();
    assert!(host.terminate().success());
    let mut steps: Vec<String> = Vec::new();
    for step in fs::read_to_string(&trace).unwrap().lines() {
        if PREFIXES.iter().any(|prefix| step.starts_with(prefix)) && !steps.iter().any(|known| known == step) {
            steps.push(step.to_owned());
        }
    }
    fs::remove_file(trace).unwrap();
    steps
}

/// Returns the steps in the sources that only an upgrade reaches.
fn steps_in_the_sources() -> BTreeSet<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../storage/src/upgrade.rs");
    let source = fs::read_to_string(source).unwrap();
    let steps = source.split("_point(\"").skip(1);
    steps.map(|rest| rest.split('"').next().unwrap().to_owned()).collect()
}

#[test]
fn an_upgrade_that_is_killed_or_fails_at_any_step_is_completed_by_the_next_start() {
    let (mut host, vm) = earlier_host();
    let inode = host.folder.join("pool/templates/tiny.ext4").metadata().unwrap().ino();
    let steps = trace(&mut host);
    let reached: BTreeSet<String> = steps.iter().cloned().collect();
    assert!(reached.is_superset(&steps_in_the_sources()), "{reached:?}");
    for step in &steps {
        downgrade(&host);
        host.arm(Some(&format!("kill 1 {step}")));
        let ended = host.scaleboxd(&["serve"]).output().unwrap();
        assert_eq!(ended.status.signal(), Some(9), "{step}: {}", output_of(&ended));
        host.arm(None);
        host.serve();
        check_upgraded(&host, &vm, inode);
        assert!(host.terminate().success());

        // After the last step nothing can fail.
        if step == "upgrade: complete" {
            continue;
        }
        downgrade(&host);
        host.arm(Some(&format!("once 1 {step}")));
        host.serve();
        assert!(host.log().contains("cannot upgrade the pool"), "{step}");
        assert_eq!(
            host.client().vms().unwrap().len(),
            1,
            "{step}: the daemon serves all the same"
        );
        assert!(host.terminate().success());
        host.arm(None);
        host.serve();
        check_upgraded(&host, &vm, inode);
        assert!(host.terminate().success());
    }
    host.serve();
    assert_eq!(host.client().start_vm(&vm.id).unwrap().status, VmStatus::Running);
    host.client().create_vm(&host.stopped("other")).unwrap();
    eventually("the stop", || host.client().stop_vm(&vm.id).ok());
}
