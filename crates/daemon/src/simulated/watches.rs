//! Tests of the background loops: the pool watch, auto-extend, trim, and the network.

use crate::simulated::sim::{CAPACITY, Sim};
use scalebox_api::{EventKind, Vm, VmStatus};
use scalebox_testkit::Operation;
use scalebox_units::{Bytes, Gib};
use scalebox_vmm::MachineState;
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::time::Duration;

/// Writes into a VM's disk, as its guest does.
fn write_to_disk(sim: &Sim, vm: &Vm, mib: usize) {
    let mut file = File::options().write(true).open(sim.disk(vm)).unwrap();
    file.write_all(&vec![1; mib << 20]).unwrap();
    file.sync_all().unwrap();
}

fn extend(threshold: u64, increment: u64, limit: u64) -> serde_json::Value {
    json!({ "threshold_percent": threshold, "increment_gib": increment, "limit_gib": limit })
}

#[test]
fn with_little_space_only_the_vm_that_writes_is_paused_and_resumed_with_space() {
    let sim = Sim::new();
    let (writes, idle) = (sim.create("writes"), sim.create("idle"));
    sim.space.set_free(Bytes::from_mib(800));
    sim.wait(Duration::from_secs(2));
    write_to_disk(&sim, &writes, 8);
    sim.wait_until("paused", |sim| sim.status(&writes) == VmStatus::Paused);
    assert_eq!(sim.reason(&writes).as_deref(), Some("storage_full"));
    assert_eq!(
        (sim.status(&idle), sim.machine(&writes).state()),
        (VmStatus::Running, MachineState::Paused)
    );
    assert_eq!(sim.recorded(&writes).0, VmStatus::Running, "a pause is not recorded");
    sim.space.set_free(CAPACITY.bytes());
    sim.wait_until("resumed", |sim| sim.status(&writes) == VmStatus::Running);
    assert_eq!(sim.machine(&writes).state(), MachineState::Running);
    assert_eq!((sim.count(&EventKind::Paused), sim.count(&EventKind::Resumed)), (1, 1));
}

#[test]
fn a_vm_stays_paused_until_there_is_a_margin() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.space.set_free(Bytes::from_mib(800));
    sim.wait(Duration::from_secs(2));
    write_to_disk(&sim, &vm, 8);
    sim.wait_until("paused", |sim| sim.status(&vm) == VmStatus::Paused);
    sim.space.set_free(Bytes::from_mib(1200));
    sim.wait(Duration::from_secs(60));
    assert_eq!(sim.status(&vm), VmStatus::Paused);
}

#[test]
fn with_enough_space_a_writing_vm_runs_on() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.space.set_free(Bytes::from_mib(2000));
    sim.wait(Duration::from_secs(2));
    write_to_disk(&sim, &vm, 8);
    sim.wait(Duration::from_secs(10));
    assert_eq!(sim.status(&vm), VmStatus::Running);
}

#[test]
fn a_guest_whose_write_fails_on_the_host_is_paused_and_resumed() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.space.set_free(Bytes::from_mib(100));
    sim.machine(&vm).set_disk_full(true);
    sim.wait_until("paused", |sim| sim.status(&vm) == VmStatus::Paused);
    sim.machine(&vm).set_disk_full(false);
    sim.space.set_free(CAPACITY.bytes());
    sim.wait_until("resumed", |sim| sim.status(&vm) == VmStatus::Running);
}

#[test]
fn a_resume_that_fails_is_retried() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.space.set_free(Bytes::from_mib(100));
    sim.machine(&vm).set_disk_full(true);
    sim.wait_until("paused", |sim| sim.status(&vm) == VmStatus::Paused);
    sim.machine(&vm).set_disk_full(false);
    for _ in 0..3 {
        sim.machine(&vm).next(Operation::Resume).fails();
    }
    sim.space.set_free(CAPACITY.bytes());
    sim.wait_until("resumed", |sim| sim.status(&vm) == VmStatus::Running);
}

#[test]
fn a_paused_vm_can_be_stopped_and_deleted() {
    let sim = Sim::new();
    let (first, second) = (sim.create("first"), sim.create("second"));
    sim.space.set_free(Bytes::from_mib(100));
    for vm in [&first, &second] {
        sim.machine(vm).set_disk_full(true);
        sim.wait_until("paused", |sim| sim.status(vm) == VmStatus::Paused);
    }
    sim.stop(&first).unwrap();
    sim.delete(&second).unwrap();
    assert_eq!(sim.recorded(&first), (VmStatus::Stopped, None));
    sim.assert_gone(&second.id);
    sim.space.set_free(CAPACITY.bytes());
    sim.wait(Duration::from_secs(10));
    assert_eq!(sim.status(&first), VmStatus::Stopped);
}

#[test]
fn a_machine_that_was_paused_before_a_crash_is_resumed_by_the_next_start() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.space.set_free(Bytes::from_mib(100));
    sim.machine(&vm).set_disk_full(true);
    sim.wait_until("paused", |sim| sim.status(&vm) == VmStatus::Paused);
    sim.restart();
    sim.wait_until("paused", |sim| sim.status(&vm) == VmStatus::Paused);
    sim.machine(&vm).set_disk_full(false);
    sim.space.set_free(CAPACITY.bytes());
    sim.wait_until("resumed", |sim| sim.status(&vm) == VmStatus::Running);
}

#[test]
fn a_disk_is_extended_before_its_guest_s_file_system_is_full() {
    let sim = Sim::new();
    let vm = sim
        .try_create(json!({ "name": "box", "disk_auto_extend": extend(80, 2, 5) }))
        .unwrap();
    sim.wait(Duration::from_secs(30));
    assert_eq!(sim.disk_gib(&vm), 2, "it has room");
    sim.machine(&vm)
        .set_guest(|guest| guest.fs_used = Bytes::from_mib(1900));
    sim.wait_until("extended", |sim| sim.disk_gib(&vm) == 4);
    sim.machine(&vm)
        .set_guest(|guest| guest.fs_used = Bytes::from_mib(4000));
    sim.wait_until("at its limit", |sim| sim.disk_gib(&vm) == 5);
    sim.machine(&vm)
        .set_guest(|guest| guest.fs_used = Bytes::from_mib(5000));
    sim.wait(Duration::from_secs(60));
    assert_eq!(sim.machine(&vm).disk_size(), Gib::new(5).bytes());
    assert_eq!(sim.count(&EventKind::Grown), 2);
}

#[test]
fn an_extension_takes_what_the_pool_can_give() {
    let sim = Sim::with(&[("OVERCOMMIT_RATIO", "1"), ("MAX_DISK_SIZE_GIB", "98")]);
    sim.try_create(json!({ "disk_size_gib": 92, "start": false })).unwrap();
    let vm = sim
        .try_create(json!({ "name": "box", "disk_auto_extend": extend(80, 50, 60) }))
        .unwrap();
    sim.machine(&vm)
        .set_guest(|guest| guest.fs_used = Bytes::from_mib(1900));
    sim.wait_until("extended", |sim| sim.disk_gib(&vm) > 2);
    assert!(sim.machine(&vm).disk_size() < Gib::new(10).bytes());
}

#[test]
fn an_extension_that_fails_is_reported_once_until_it_succeeds() {
    let sim = Sim::new();
    let vm = sim
        .try_create(json!({ "name": "box", "disk_auto_extend": extend(80, 2, 9) }))
        .unwrap();
    sim.space.set_free(Gib::new(2).bytes());
    sim.machine(&vm)
        .set_guest(|guest| guest.fs_used = Bytes::from_mib(1900));
    sim.wait(Duration::from_secs(60));
    assert_eq!(sim.count(&EventKind::NotExtended), 1);
    sim.space.set_free(CAPACITY.bytes());
    sim.wait_until("extended", |sim| sim.disk_gib(&vm) == 4);
}

#[test]
fn a_guest_whose_file_system_did_not_follow_is_not_extended_again() {
    let sim = Sim::new();
    let vm = sim
        .try_create(json!({ "name": "box", "disk_auto_extend": extend(80, 4, 50) }))
        .unwrap();
    sim.machine(&vm).set_guest(|guest| {
        guest.fs_total = Some(Gib::new(2).bytes());
        guest.fs_used = Bytes::from_mib(1900);
    });
    sim.wait_until("reported", |sim| sim.count(&EventKind::NotExtended) == 1);
    sim.wait(Duration::from_secs(120));
    assert_eq!(sim.disk_gib(&vm), 6, "once");
}

#[test]
fn a_guest_that_does_not_respond_delays_no_other() {
    let sim = Sim::new();
    sim.vmm
        .set_guest(|guest| guest.unanswered = vec!["guest-get-fsinfo", "guest-sync"]);
    sim.try_create(json!({ "name": "silent", "disk_auto_extend": extend(80, 2, 9) }))
        .unwrap();
    sim.vmm.set_guest(|guest| guest.unanswered.clear());
    let vm = sim
        .try_create(json!({ "name": "box", "disk_auto_extend": extend(80, 2, 9) }))
        .unwrap();
    sim.machine(&vm)
        .set_guest(|guest| guest.fs_used = Bytes::from_mib(1900));
    sim.wait_until("extended", |sim| sim.disk_gib(&vm) == 4);
}

#[test]
fn guests_are_trimmed_at_intervals() {
    let sim = Sim::with(&[("GUEST_TRIM_INTERVAL_MINUTES", "10")]);
    let vm = sim.create("box");
    sim.wait(Duration::from_secs(3600));
    assert!(sim.machine(&vm).trims() >= 3, "{}", sim.machine(&vm).trims());
}

#[test]
fn rules_that_another_program_removed_are_restored() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.network().flush_rules();
    sim.wait_until("restored", |sim| sim.network().attached().len() == 1);
    sim.network().delete_bridge();
    sim.wait_until("restored", |sim| sim.network().attached().len() == 1);
    assert_eq!(sim.status(&vm), VmStatus::Running);
}
