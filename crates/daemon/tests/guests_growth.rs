//! Checks the advice in the response for a guest whose file system cannot grow while mounted.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{CreateVm, UpdateVm, VmSource};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::guest::{Key, wait_for_ssh};
use support::{Host, Options, run, text};

/// Returns the size of the guest's root file system in GiB.
fn size(key: &Key, vm: &scalebox_api::Vm) -> f64 {
    let bytes: f64 = key.run(vm, "df --output=size -B1 / | tail -1").trim().parse().unwrap();
    bytes / f64::from(1 << 30)
}

/// A template's file system, mounted read-only.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, at: &Path) -> Mounted {
        run("mount", &["-o", "loop,ro,noload", text(image), text(at)]);
        Mounted(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0).status();
        assert!(
            unmounted.is_ok_and(|status| status.success()),
            "{} is still mounted",
            self.0.display()
        );
    }
}

#[test]
fn a_file_system_that_cannot_grow_while_mounted_grows_as_advised() {
    let mut host = Host::new(&Options::default());
    host.import_debian();
    // The same Debian in a file system with a feature that Linux does not grow while mounted.
    let (base, root) = (
        host.folder.join("pool/templates/debian-base.ext4"),
        host.folder.join("root"),
    );
    let image = host.folder.join("rigid.image");
    fs::create_dir(&root).unwrap();
    let mounted = Mounted::new(&base, &root);
    run(
        "mke2fs",
        &[
            "-q",
            "-t",
            "ext4",
            "-O",
            "sparse_super2",
            "-d",
            text(&root),
            text(&image),
            "2G",
        ],
    );
    drop(mounted);
    host.scaleboxd_ok(&["template", "import", "rigid", text(&image)]);
    host.serve();

    let key = Key::new(&host, "key");
    let client = host.client();
    let vm = client
        .create_vm(&CreateVm {
            source: VmSource::Template("rigid".parse().unwrap()),
            disk_size_gib: Some(2),
            ..key.request("rigid")
        })
        .unwrap();
    wait_for_ssh(&vm);
    let grown = client.update_vm(&vm.id, &UpdateVm::grow(12)).unwrap();
    let disk = grown.disk.expect("the state of the file system");
    assert!(!disk.confirmed, "{disk:?}");
    let note = disk.note.expect("the advice");
    assert!(note.contains("sparse_super2") && note.contains("Stop the VM"), "{note}");
    assert!(size(&key, &vm) < 2.0);

    client.stop_vm(&vm.id).unwrap();
    assert!(
        client
            .update_vm(&vm.id, &UpdateVm::grow(13))
            .unwrap()
            .disk
            .unwrap()
            .confirmed
    );
    client.start_vm(&vm.id).unwrap();
    wait_for_ssh(&vm);
    assert!(size(&key, &vm) > 12.0, "{} GiB", size(&key, &vm));
}
