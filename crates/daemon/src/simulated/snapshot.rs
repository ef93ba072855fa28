//! Tests of snapshots: the guest is frozen or paused while its disk is cloned.

use crate::host::error::ServiceError;
use crate::simulated::sim::{Sim, TEMPLATE, id};
use crate::vm;
use scalebox_api::{EventKind, Snapshot, SnapshotVm, Vm, VmStatus};
use scalebox_testkit::{Operation, SimQga};
use scalebox_vmm::MachineState;
use serde_json::json;

fn snapshot(sim: &Sim, vm: &Vm, name: &str) -> Result<Snapshot, ServiceError> {
    let request = request(name);
    sim.run(async |host| vm::snapshot::snapshot(&host, vm.id.clone(), request).await)
}

fn request(name: &str) -> SnapshotVm {
    SnapshotVm::parse(json!({ "template_name": name }).to_string().as_bytes()).unwrap()
}

fn templates(sim: &Sim) -> Vec<String> {
    let templates = sim.run(async |host| crate::templates::list(&host).await).unwrap();
    templates.into_iter().map(|template| template.name).collect()
}

#[test]
fn a_guest_with_an_agent_is_frozen_and_runs_on() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.wait(std::time::Duration::from_secs(1));
    let made = snapshot(&sim, &vm, "base").unwrap();
    assert_eq!(
        (made.held.as_str(), made.source_vm.as_str()),
        ("frozen", vm.id.as_str())
    );
    assert!(!sim.machine(&vm).is_frozen());
    assert_eq!(sim.machine(&vm).state(), MachineState::Running);
    assert_eq!(templates(&sim), ["base", TEMPLATE]);
    let kinds = sim.events();
    assert_eq!(
        kinds[kinds.len() - 2..],
        [EventKind::Snapshotted, EventKind::TemplateCreated]
    );
    sim.try_create(json!({ "template": "base" })).unwrap();
}

#[test]
fn a_guest_without_an_agent_is_paused_and_runs_on() {
    let sim = Sim::new();
    sim.vmm.set_guest(|guest| guest.qga = SimQga::Silent);
    let vm = sim.create("box");
    assert_eq!(snapshot(&sim, &vm, "base").unwrap().held, "paused");
    assert_eq!(sim.machine(&vm).state(), MachineState::Running);
    assert_eq!(sim.status(&vm), VmStatus::Running);
}

#[test]
fn a_guest_that_refuses_to_freeze_is_paused() {
    let sim = Sim::new();
    sim.vmm
        .set_guest(|guest| guest.rejected = vec!["guest-fsfreeze-freeze"]);
    let vm = sim.create("box");
    sim.wait(std::time::Duration::from_secs(1));
    assert_eq!(snapshot(&sim, &vm, "base").unwrap().held, "paused");
    assert_eq!(sim.machine(&vm).state(), MachineState::Running);
}

#[test]
fn a_stopped_vm_is_not_touched() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    let made = snapshot(&sim, &vm, "base").unwrap();
    assert_eq!((made.held.as_str(), made.stood_still_ms), ("not_running", 0));
}

#[test]
fn a_pause_that_fails_makes_no_template_and_the_guest_runs_on() {
    let sim = Sim::new();
    sim.vmm.set_guest(|guest| guest.qga = SimQga::Silent);
    let vm = sim.create("box");
    sim.machine(&vm).next(Operation::Pause).fails();
    snapshot(&sim, &vm, "base").unwrap_err();
    assert_eq!(templates(&sim), [TEMPLATE]);
    assert_eq!(
        (sim.machine(&vm).state(), sim.status(&vm)),
        (MachineState::Running, VmStatus::Running)
    );
    snapshot(&sim, &vm, "base").unwrap();
}

#[test]
fn a_guest_is_resumed_even_if_the_first_attempts_fail() {
    let sim = Sim::new();
    sim.vmm.set_guest(|guest| guest.qga = SimQga::Silent);
    let vm = sim.create("box");
    for _ in 0..3 {
        sim.machine(&vm).next(Operation::Resume).fails();
    }
    snapshot(&sim, &vm, "base").unwrap();
    assert_eq!(sim.machine(&vm).state(), MachineState::Running);
}

#[test]
fn a_guest_that_a_crash_left_frozen_is_thawed() {
    let mut sim = Sim::new();
    sim.vmm
        .set_guest(|guest| guest.unanswered = vec!["guest-fsfreeze-thaw"]);
    let vm = sim.create("box");
    sim.wait(std::time::Duration::from_secs(1));
    let begun = sim.run(async |host| {
        let snapshot = vm::snapshot::snapshot(&host, vm.id.clone(), request("base"));
        tokio::time::timeout(std::time::Duration::from_secs(3), snapshot).await
    });
    assert!(begun.is_err() && sim.machine(&vm).is_frozen(), "it waits for the thaw");
    sim.restart_after(|sim| sim.vmm.machine(&id(&vm)).set_guest(|guest| guest.unanswered.clear()));
    sim.wait_until("thawed", |sim| !sim.machine(&vm).is_frozen());
    assert_eq!(sim.status(&vm), VmStatus::Running);
}

#[test]
fn a_template_s_name_is_taken_once() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    snapshot(&sim, &vm, "base").unwrap();
    let error = snapshot(&sim, &vm, "base").unwrap_err();
    assert!(error.to_string().contains("base"), "{error}");
    let error = snapshot(&sim, &vm, "debian-base").unwrap_err();
    assert!(matches!(error, ServiceError::Forbidden(_)), "{error}");
}
