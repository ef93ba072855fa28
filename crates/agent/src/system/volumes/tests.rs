//! Tests with real file systems on loop devices. They run as root.

use super::*;
use crate::system::grow::grow;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

/// A file system on a loop device, mounted twice.
struct Disk {
    folder: tempfile::TempDir,
    device: String,
}

impl Disk {
    fn new() -> Disk {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let device = run("losetup", &["--find", "--show", image.to_str().unwrap()]);
        let disk = Disk {
            folder,
            device: device.trim().to_owned(),
        };
        run("mke2fs", &["-q", "-t", "ext4", "-b", "4096", &disk.device, "32M"]);
        for target in [disk.target(), disk.other_target()] {
            fs::create_dir(&target).unwrap();
            mount(disk.device.as_str(), &target, "ext4", MountFlags::empty(), c"").unwrap();
        }
        disk
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("target")
    }

    fn other_target(&self) -> PathBuf {
        self.folder.path().join("other")
    }

    /// Opens this file system only: the others belong to the host.
    fn volumes(&self) -> Vec<Volume> {
        let mounts = scalebox_mounts::all().unwrap();
        let own: Vec<&Mount> = mounts
            .iter()
            .filter(|mount| mount.target.starts_with(self.folder.path()))
            .collect();
        assert_eq!(own.len(), 2);
        open(&own).unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for target in [self.target(), self.other_target()] {
            let _ = unmount(&target, UnmountFlags::DETACH);
        }
        run("losetup", &["--detach", &self.device]);
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn write_apart(path: PathBuf) -> mpsc::Receiver<()> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        fs::write(path, "content").unwrap();
        sender.send(()).unwrap();
    });
    receiver
}

#[test]
fn frozen_file_systems_keep_writers_waiting_until_the_thaw() {
    let (disk, frozen) = (Disk::new(), Frozen::default());
    let volumes = disk.volumes();
    assert_eq!(volumes.len(), 1, "one file system, although it is mounted twice");
    frozen.thaw(&volumes).unwrap();
    frozen.freeze(&volumes).unwrap();
    let written = write_apart(disk.target().join("file"));
    assert!(written.recv_timeout(Duration::from_millis(300)).is_err());
    assert_eq!(frozen.freeze(&volumes).unwrap_err().0.code, FailureCode::Busy);
    assert_eq!(frozen.trim(&volumes).unwrap_err().0.code, FailureCode::Busy);
    frozen.thaw(&volumes).unwrap();
    written.recv_timeout(Duration::from_secs(30)).unwrap();
    frozen.thaw(&volumes).unwrap();
    frozen.freeze(&volumes).unwrap();
    frozen.thaw(&volumes).unwrap();
}

#[test]
fn a_freeze_that_fails_thaws_what_it_has_frozen() {
    let (first, second) = (Disk::new(), Disk::new());
    let mut volumes = first.volumes();
    volumes.extend(second.volumes());
    ioctl::freeze(&volumes[1].folder).unwrap();
    let frozen = Frozen::default();
    assert_eq!(frozen.freeze(&volumes).unwrap_err().0.code, FailureCode::Busy);
    fs::write(first.target().join("file"), "content").unwrap();
    // Also a file system that another program froze.
    frozen.thaw(&volumes).unwrap();
    fs::write(second.target().join("file"), "content").unwrap();
}

#[test]
fn unused_blocks_are_discarded() {
    let (disk, frozen) = (Disk::new(), Frozen::default());
    assert!(frozen.trim(&disk.volumes()).unwrap() > 1 << 20);
    assert_eq!(frozen.trim(&[]).unwrap_err().0.code, FailureCode::Unsupported);
}

#[test]
fn file_systems_grow_to_the_size_of_their_disk_while_mounted() {
    let disk = Disk::new();
    let before = crate::system::grow::size(&disk.target()).unwrap();
    let capabilities = rustix::thread::capabilities(None).unwrap();
    if !capabilities
        .effective
        .contains(rustix::thread::CapabilitySet::SYS_RESOURCE)
    {
        eprintln!("not tested without CAP_SYS_RESOURCE: the growth itself");
        assert_eq!(grow(&disk.target()).unwrap_err().0.code, FailureCode::Denied);
        return;
    }
    let after = grow(&disk.target()).unwrap();
    assert!(
        before.total < 32 << 20 && after.total > 48 << 20,
        "{before:?} {after:?}"
    );
    assert_eq!(grow(&disk.target()).unwrap().total, after.total, "nothing to do");
}

#[test]
fn file_systems_without_a_disk_do_not_grow() {
    assert_eq!(grow(Path::new("/proc")).unwrap_err().0.code, FailureCode::Unsupported);
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(grow(folder.path()).unwrap_err().0.code, FailureCode::NotFound);
}
