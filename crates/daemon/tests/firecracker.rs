//! The service over Firecracker: what it does on the host, for the guest needs a KVM that runs guests. It says so where Firecracker is not.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops where it cannot go on")]

mod support;

use rustix::process::{Pid, Signal, kill_process};
use scalebox_client::{SnapshotVm, UpdateVm, Vm, VmStatus};
use scalebox_vmm::{AccelSetting, FirecrackerDriver, accelerator};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use support::guest::Key;
use support::{Host, Options, eventually};

/// Why it cannot run here, if it cannot.
fn missing() -> Option<String> {
    let kvm = accelerator(AccelSetting::Kvm).map_err(|error| error.to_string());
    let found = kvm.and_then(|_| FirecrackerDriver::find(Path::new("/nonexistent")).map_err(|error| error.to_string()));
    found.err()
}

/// The process of a VM, if there is one.
fn process_of(vm: &Vm) -> Option<Pid> {
    let processes = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let ours = |pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments);
        arguments.starts_with("/firecracker\0") && arguments.contains(&vm.id)
    };
    processes.into_iter().find(ours).and_then(Pid::from_raw)
}

fn jails(host: &Host) -> Vec<PathBuf> {
    let folder = host.folder.join("pool/jails/firecracker");
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}

#[test]
fn machines_are_jailed_grown_limited_copied_adopted_and_leave_nothing() {
    if let Some(why) = missing() {
        println!("not run: {why}");
        return;
    }
    let mut host = Host::new(&Options {
        env: &[("VMM", "firecracker")],
        ..Options::default()
    });
    host.import_debian();
    host.serve();
    assert_eq!(host.client().info().unwrap().vmm, "firecracker");
    let key = Key::new(&host, "key");
    let vm = host.client().create_vm(&key.request("one")).unwrap();
    assert_eq!(vm.status, VmStatus::Running);

    // It runs as its own user, among its own files.
    let pid = process_of(&vm).unwrap();
    let process = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    assert_eq!(
        process.metadata().unwrap().uid(),
        1_900_000_000 + u32::from(vm.ssh_port)
    );
    assert!(process.join("root/disk").exists() && !process.join("root/etc").exists());
    let disk = host.disk(&vm).metadata().unwrap();
    assert_eq!(process.join("root/disk").metadata().unwrap().ino(), disk.ino());

    // The host's side of every change; the guest, which does not boot, confirms none.
    let grown = host.client().update_vm("one", &UpdateVm::grow(5)).unwrap();
    assert_eq!(grown.disk_size_gib, 5);
    assert!(!grown.disk.unwrap().confirmed);
    assert_eq!(host.disk(&vm).metadata().unwrap().len(), 5 << 30);
    let limited = UpdateVm {
        disk_iops: Some(Some(100)),
        ..UpdateVm::default()
    };
    host.client().update_vm("one", &limited).unwrap();
    let template_name = "copy".parse().unwrap();
    host.client().snapshot_vm("one", &SnapshotVm { template_name }).unwrap();

    // The next daemon has it again.
    host.crash();
    host.serve();
    let found = host.client().vm("one").unwrap();
    assert_eq!((found.status, process_of(&vm)), (VmStatus::Running, Some(pid)));

    // It can die, and be started again.
    kill_process(pid, Signal::KILL).unwrap();
    eventually("the failure to be seen", || {
        (host.client().vm("one").unwrap().status == VmStatus::Failed).then_some(())
    });
    assert_eq!(jails(&host), Vec::<PathBuf>::new());
    let started = eventually("its end to be noted", || host.client().start_vm("one").ok());
    assert_eq!(started.status, VmStatus::Running);

    // What is left when machine and daemon die together, as when the host does, is removed.
    host.crash();
    kill_process(process_of(&vm).unwrap(), Signal::KILL).unwrap();
    eventually("its end", || process_of(&vm).is_none().then_some(()));
    assert_eq!(jails(&host).len(), 1);
    host.serve();
    assert_eq!(jails(&host), Vec::<PathBuf>::new());
    assert_eq!(host.client().vm("one").unwrap().status, VmStatus::Stopped);

    host.client().start_vm("one").unwrap();
    host.client().delete_vm("one").unwrap();
    assert_eq!((process_of(&vm), jails(&host)), (None, Vec::new()));
    assert_eq!(host.leftovers(), Vec::<String>::new());
}
