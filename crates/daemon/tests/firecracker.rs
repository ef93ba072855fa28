//! The service with Firecracker. Guests run if KVM is available; otherwise only the host's side is
//! tested. The output names the parts that did not run, and the reason.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use rustix::process::{Pid, Signal, kill_process};
use scalebox_api::{SnapshotVm, UpdateVm, Vm, VmStatus};
use scalebox_vmm::{Accel, AccelSetting, FirecrackerDriver, accelerator};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use support::guest::{Key, machines, wait_for_ssh};
use support::{Host, Options, eventually, output_of};

/// Returns why Firecracker cannot run on this machine, if so.
fn missing() -> Option<String> {
    let kvm = accelerator(AccelSetting::Kvm).map_err(|error| error.to_string());
    let found = kvm.and_then(|_| FirecrackerDriver::find(Path::new("/nonexistent")).map_err(|error| error.to_string()));
    found.err()
}

/// Returns why no guest can run on this machine, if so.
fn no_guests() -> Option<String> {
    match accelerator(AccelSetting::Auto) {
        Ok(choice) if choice.accel == Accel::Kvm => None,
        Ok(choice) => Some(choice.reason),
        Err(error) => Some(error.to_string()),
    }
}

/// Returns the process of a VM, if there is one.
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

/// Checks that the machine runs as its own user and sees only its own files.
fn is_jailed(host: &Host, vm: &Vm) {
    let pid = process_of(vm).unwrap();
    let process = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    assert_eq!(
        process.metadata().unwrap().uid(),
        1_900_000_000 + u32::from(vm.ssh_port)
    );
    assert!(process.join("root/disk").exists() && !process.join("root/etc").exists());
    let disk = host.disk(vm).metadata().unwrap();
    assert_eq!(process.join("root/disk").metadata().unwrap().ino(), disk.ino());

    // Kernel and initramfs are hard-linked into the jail, so that the host's page cache holds them
    // once for all VMs.
    let kernels = host.folder.join("pool/kernels");
    let (initramfs, kernel) = (kernels.join("initramfs"), other_than(&kernels, "initramfs"));
    let with_agent = other_than(&initramfs, "");
    for file in [&kernel.join("vmlinuz"), &kernel.join("modules.img"), &with_agent] {
        let found = file.metadata().unwrap();
        assert_eq!((found.nlink(), found.mode() & 0o777), (2, 0o644), "{file:?}");
    }
}

/// Returns the only entry of a folder besides the one called `name`.
fn other_than(folder: &Path, name: &str) -> PathBuf {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut others: Vec<_> = entries
        .filter(|path| name.is_empty() || !path.ends_with(name))
        .collect();
    assert_eq!(others.len(), 1, "{others:?}");
    others.remove(0)
}

#[test]
fn machines_are_jailed_grown_limited_copied_adopted_and_cleaned_up() {
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

    let pid = process_of(&vm).unwrap();
    is_jailed(&host, &vm);
    // The following checks the host's side of every change; the guest may still be booting.
    let grown = host.client().update_vm("one", &UpdateVm::grow(5)).unwrap();
    assert_eq!(grown.disk_size_gib, 5);
    assert_eq!(host.disk(&vm).metadata().unwrap().len(), 5 << 30);
    let refused = host.client().trim_vm("one").unwrap_err().to_string();
    assert!(refused.contains("not support discard"), "{refused}");
    let limited = UpdateVm {
        disk_iops: Some(Some(100)),
        ..UpdateVm::default()
    };
    host.client().update_vm("one", &limited).unwrap();
    let template_name = "copy".parse().unwrap();
    host.client().snapshot_vm("one", &SnapshotVm { template_name }).unwrap();

    // The next daemon adopts it.
    host.crash();
    host.serve();
    let found = host.client().vm("one").unwrap();
    assert_eq!((found.status, process_of(&vm)), (VmStatus::Running, Some(pid)));

    // A machine that died can be started again.
    kill_process(pid, Signal::KILL).unwrap();
    eventually("the failure to be seen", || {
        (host.client().vm("one").unwrap().status == VmStatus::Failed).then_some(())
    });
    assert_eq!(jails(&host), Vec::<PathBuf>::new());
    let started = eventually("its end to be recorded", || host.client().start_vm("one").ok());
    assert_eq!(started.status, VmStatus::Running);

    // After machine and daemon die together, as in a crash of the host, the leftovers are removed.
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

/// Checks the behaviour of guests under Firecracker.
#[test]
fn guests_boot_grow_are_copied_power_off_and_survive_a_daemon_restart() {
    if let Some(why) = missing().or_else(no_guests) {
        println!("not run: {why}");
        return;
    }
    let mut host = Host::new(&Options {
        env: &[("VMM", "firecracker")],
        ..Options::default()
    });
    host.import_debian();
    host.serve();
    let key = Key::new(&host, "key");
    let begun = Instant::now();
    let vm = host.client().create_vm(&key.request("one")).unwrap();
    wait_for_ssh(&vm);
    key.run(&vm, "true");
    println!("POST to SSH: {:.1} s", begun.elapsed().as_secs_f64());
    println!("memory of its process: {} MB", resident_mb(process_of(&vm).unwrap()));

    let begun = Instant::now();
    let mut size = 2;
    // The agent confirms a growth, and starts after sshd: until then each attempt grows the disk
    // without a confirmation.
    eventually("a growth that the agent confirms", || {
        size += 1;
        let grown = host.client().update_vm("one", &UpdateVm::grow(size)).unwrap();
        grown.disk.filter(|disk| disk.confirmed)
    });
    println!("growth confirmed: {:.1} s", begun.elapsed().as_secs_f64());
    let seen: u64 = key.run(&vm, "df --output=size -B1 / | tail -n 1").parse().unwrap();
    assert!(seen > (size - 1) << 30, "{seen} of {size} GiB");

    let template_name = "copy".parse().unwrap();
    let snapshot = host.client().snapshot_vm("one", &SnapshotVm { template_name }).unwrap();
    assert_eq!(snapshot.held, "frozen");
    println!("paused for the snapshot: {} ms", snapshot.stood_still_ms);

    host.crash();
    host.serve();
    key.run(&vm, "true");

    // A guest's power-off ends its machine at once, not after the time limit.
    let begun = Instant::now();
    let _cut = key.ssh(&vm, "sudo systemctl poweroff").output().unwrap();
    eventually("the power-off", || {
        (host.client().vm("one").unwrap().status == VmStatus::Stopped).then_some(())
    });
    assert!(begun.elapsed() < Duration::from_secs(45), "{:?}", begun.elapsed());
    println!("power-off: {:.1} s", begun.elapsed().as_secs_f64());
    host.client().start_vm("one").unwrap();
    wait_for_ssh(&vm);
    let begun = Instant::now();
    host.client().stop_vm("one").unwrap();
    assert!(begun.elapsed() < Duration::from_secs(45), "{:?}", begun.elapsed());
    println!("stop: {:.1} s", begun.elapsed().as_secs_f64());
    host.client().delete_vm("one").unwrap();
    assert_eq!((jails(&host), host.leftovers()), (Vec::new(), Vec::new()));
}

fn resident_mb(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1000
}

/// Checks that `auto` selects the hypervisor for new VMs only, and that existing VMs keep theirs.
#[test]
fn existing_vms_keep_their_hypervisor_when_new_vms_get_another() {
    if let Some(why) = missing() {
        println!("not run: {why}");
        return;
    }
    let mut host = Host::new(&Options {
        env: &[("VMM", "qemu")],
        ..Options::default()
    });
    host.import_debian();
    host.serve();
    let key = Key::new(&host, "key");
    let old = host.client().create_vm(&key.request("old")).unwrap();
    let (before, vmm) = (machines(&host), no_guests().map_or("auto", |_| "firecracker"));
    assert_eq!(before.len(), 1);
    assert!(host.terminate().success());
    host.set("VMM", vmm);
    host.serve();
    assert_eq!(host.client().info().unwrap().vmm, "firecracker");
    assert_eq!(host.client().vm("old").unwrap().status, VmStatus::Running);
    assert_eq!(machines(&host), before);
    let new = host.client().create_vm(&key.request("new")).unwrap();
    assert!(process_of(&new).is_some() && process_of(&old).is_none());
    let doctor = output_of(&host.scaleboxd(&["doctor"]).output().unwrap());
    assert!(doctor.contains("1 VMs use qemu, new VMs use firecracker"), "{doctor}");

    // With the first setting again, the machine under Firecracker is adopted too.
    assert!(host.terminate().success());
    host.set("VMM", "qemu");
    host.serve();
    assert_eq!(host.client().vm("new").unwrap().status, VmStatus::Running);
    assert!(process_of(&new).is_some());
    host.client().delete_vm("new").unwrap();
    host.client().delete_vm("old").unwrap();
    assert_eq!((jails(&host), host.leftovers()), (Vec::new(), Vec::new()));
}
