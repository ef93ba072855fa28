//! Tests of start, stop, restart, deletion, and of machines that end.

use crate::host::error::ServiceError;
use crate::simulated::sim::{Sim, id};
use crate::vm;
use scalebox_api::{EventKind, VmStatus};
use scalebox_net::NetworkCall;
use scalebox_testkit::{Operation, SimQga};
use std::time::Duration;

#[test]
fn a_stopped_vm_has_no_machine_and_keeps_its_disk() {
    let sim = Sim::new();
    let vm = sim.create("box");
    let stopped = sim.stop(&vm).unwrap();
    assert_eq!(
        (stopped.status, sim.recorded(&vm)),
        (VmStatus::Stopped, (VmStatus::Stopped, None))
    );
    assert!(sim.vmm.machines().is_empty() && sim.network().taps().is_empty());
    assert!(!sim.host().run_dir(&id(&vm)).exists());
    assert!(sim.host().pool.has_disk(&id(&vm)).unwrap());
    assert_eq!(sim.events().last(), Some(&EventKind::Stopped));
}

#[test]
fn a_vm_starts_again_with_its_address_and_disk() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.stop(&vm).unwrap();
    let again = sim.start(&vm).unwrap();
    assert_eq!((again.status, again.ssh_port), (VmStatus::Running, vm.ssh_port));
    assert_eq!(sim.machine(&vm).spec().root, sim.host().pool.disk_location(&id(&vm)));
    assert_eq!(sim.count(&EventKind::Started), 2);
}

#[test]
fn starting_a_running_vm_and_stopping_a_stopped_one_are_rejected() {
    let sim = Sim::new();
    let vm = sim.create("box");
    let error = sim.start(&vm).unwrap_err();
    assert!(error.to_string().contains("already running"), "{error}");
    sim.stop(&vm).unwrap();
    let error = sim.stop(&vm).unwrap_err();
    assert!(error.to_string().contains("already stopped"), "{error}");
}

#[test]
fn a_guest_that_ignores_the_request_is_killed_after_a_minute() {
    let sim = Sim::new();
    sim.vmm.set_guest(|guest| {
        guest.shutdown_time = None;
        guest.qga = SimQga::Silent;
    });
    let vm = sim.create("box");
    let begun = sim.run(async |_| tokio::time::Instant::now());
    assert_eq!(sim.stop(&vm).unwrap().status, VmStatus::Stopped);
    let took = sim.run(async |_| tokio::time::Instant::now()) - begun;
    assert!(
        took >= Duration::from_secs(60) && took < Duration::from_secs(120),
        "{took:?}"
    );
    assert!(sim.vmm.machines().is_empty());
}

#[test]
fn a_stop_whose_intent_cannot_be_recorded_changes_nothing() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.set_state_fails(true);
    sim.stop(&vm).unwrap_err();
    sim.set_state_fails(false);
    assert_eq!(
        (sim.status(&vm), sim.recorded(&vm)),
        (VmStatus::Running, (VmStatus::Running, None))
    );
    assert!(sim.machine(&vm).is_held());
    sim.stop(&vm).unwrap();
}

#[test]
fn a_stop_that_fails_withdraws_its_intent() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.machine(&vm).next(Operation::Stop).fails();
    sim.stop(&vm).unwrap_err();
    assert_eq!(
        (sim.status(&vm), sim.recorded(&vm)),
        (VmStatus::Running, (VmStatus::Running, None))
    );
    assert_eq!(sim.count(&EventKind::Stopped), 0);
    sim.stop(&vm).unwrap();
}

#[test]
fn a_stop_that_cannot_be_recorded_at_its_end_is_recorded_later() {
    let sim = Sim::new();
    let vm = sim.create("box");
    let gate = sim.machine(&vm).next(Operation::Stop).waits();
    let stopped = sim.run(async |host| {
        let meanwhile = async {
            gate.reached().await;
            sim.set_state_fails(true);
            gate.open();
        };
        tokio::join!(vm::stop(&host, vm.id.clone()), meanwhile).0
    });
    assert_eq!(stopped.unwrap().status, VmStatus::Stopped);
    assert_eq!(sim.count(&EventKind::Stopped), 0, "not before it is recorded");
    sim.set_state_fails(false);
    sim.wait_until("recorded", |sim| sim.recorded(&vm) == (VmStatus::Stopped, None));
    assert_eq!(sim.count(&EventKind::Stopped), 1);
}

#[test]
fn a_guest_that_powers_off_stops_its_vm() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.machine(&vm).power_off();
    sim.wait_until("stopped", |sim| sim.status(&vm) == VmStatus::Stopped);
    assert_eq!(sim.recorded(&vm), (VmStatus::Stopped, None));
    assert!(sim.network().taps().is_empty() && !sim.host().run_dir(&id(&vm)).exists());
    sim.start(&vm).unwrap();
}

#[test]
fn a_machine_that_crashes_fails_its_vm_with_the_reason() {
    let sim = Sim::new();
    let vm = sim.create("box");
    std::fs::write(sim.host().console_log(&id(&vm)), b"panic: out of ideas\n").unwrap();
    sim.machine(&vm).crash();
    sim.wait_until("failed", |sim| sim.status(&vm) == VmStatus::Failed);
    let reason = sim.reason(&vm).unwrap();
    assert!(
        reason.contains("signal 11") && reason.contains("out of ideas"),
        "{reason}"
    );
    assert_eq!(sim.recorded(&vm), (VmStatus::Failed, Some(reason)));
    assert_eq!(sim.count(&EventKind::Failed), 1);
    assert_eq!(sim.start(&vm).unwrap().status_reason, None);
}

#[test]
fn the_end_of_a_machine_is_visible_at_once_and_recorded_when_the_state_works_again() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.set_state_fails(true);
    sim.machine(&vm).power_off();
    sim.wait_until("stopped", |sim| sim.status(&vm) == VmStatus::Stopped);
    assert_eq!(sim.recorded(&vm).0, VmStatus::Running);
    sim.set_state_fails(false);
    sim.wait_until("recorded", |sim| sim.recorded(&vm).0 == VmStatus::Stopped);
    assert_eq!(sim.count(&EventKind::Stopped), 1);
}

#[test]
fn a_vm_that_was_started_again_is_not_recorded_as_ended() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.set_state_fails(true);
    sim.machine(&vm).power_off();
    sim.wait_until("stopped", |sim| sim.status(&vm) == VmStatus::Stopped);
    sim.set_state_fails(false);
    sim.start(&vm).unwrap();
    sim.wait(Duration::from_secs(30));
    assert_eq!(
        (sim.status(&vm), sim.recorded(&vm)),
        (VmStatus::Running, (VmStatus::Running, None))
    );
}

#[test]
fn a_guest_that_reboots_over_and_over_is_ended_as_failed() {
    let sim = Sim::new();
    sim.vmm.set_guest(|guest| guest.qga = SimQga::Silent);
    let vm = sim.create("box");
    for _ in 0..6 {
        sim.wait(Duration::from_secs(10));
        let machine = sim.machine(&vm);
        sim.run(async |_| machine.reboot());
    }
    sim.wait_until("failed", |sim| sim.status(&vm) == VmStatus::Failed);
    let reason = sim.reason(&vm).unwrap();
    assert!(reason.contains("cannot boot"), "{reason}");
    assert!(sim.vmm.machines().is_empty());
}

#[test]
fn a_guest_that_reboots_now_and_then_runs_on() {
    let sim = Sim::new();
    sim.vmm.set_guest(|guest| guest.qga = SimQga::Silent);
    let vm = sim.create("box");
    for _ in 0..12 {
        sim.wait(Duration::from_secs(90));
        let machine = sim.machine(&vm);
        sim.run(async |_| machine.reboot());
    }
    assert_eq!(sim.status(&vm), VmStatus::Running);
}

#[test]
fn a_restart_gives_a_vm_another_machine() {
    let sim = Sim::new();
    let vm = sim.create("box");
    let first = sim.machine(&vm);
    let restarted = sim.run(async |host| vm::restart(&host, vm.id.clone()).await).unwrap();
    assert_eq!(restarted.status, VmStatus::Running);
    assert!(!first.is_held() && sim.machine(&vm).is_held());
    let kinds = sim.events();
    assert_eq!(kinds[kinds.len() - 2..], [EventKind::Stopped, EventKind::Started]);
}

#[test]
fn a_restart_starts_a_stopped_vm() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    sim.run(async |host| vm::restart(&host, vm.id.clone()).await).unwrap();
    assert_eq!(sim.status(&vm), VmStatus::Running);
}

#[test]
fn a_failed_start_leaves_the_vm_stopped_and_nothing_else() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    sim.vmm.next(Operation::Launch).fails();
    sim.start(&vm).unwrap_err();
    assert_eq!(
        (sim.status(&vm), sim.recorded(&vm)),
        (VmStatus::Stopped, (VmStatus::Stopped, None))
    );
    assert!(sim.vmm.machines().is_empty() && sim.network().taps().is_empty());
    assert!(!sim.host().run_dir(&id(&vm)).exists());
    sim.start(&vm).unwrap();
}

#[test]
fn a_start_that_cannot_be_recorded_ends_its_machine() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    sim.set_state_fails(true);
    sim.start(&vm).unwrap_err();
    sim.set_state_fails(false);
    assert!(sim.vmm.machines().is_empty());
    assert_eq!(
        (sim.status(&vm), sim.recorded(&vm)),
        (VmStatus::Stopped, (VmStatus::Stopped, None))
    );
    sim.start(&vm).unwrap();
}

#[test]
fn a_vm_without_its_disk_does_not_start_and_can_be_deleted() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    sim.host().pool.delete_disk(&id(&vm)).unwrap();
    let error = sim.start(&vm).unwrap_err();
    assert!(error.to_string().contains("disk of VM box is missing"), "{error}");
    sim.delete(&vm).unwrap();
}

#[test]
fn a_vm_has_one_operation_at_a_time() {
    let sim = Sim::new();
    let vm = sim.create("box");
    let gate = sim.machine(&vm).next(Operation::Stop).waits();
    let (stopped, deleted) = sim.run(async |host| {
        let second = async {
            gate.reached().await;
            let deleted = vm::delete(&host, vm.id.clone()).await;
            gate.open();
            deleted
        };
        tokio::join!(vm::stop(&host, vm.id.clone()), second)
    });
    stopped.unwrap();
    let error = deleted.unwrap_err();
    assert!(
        matches!(error, ServiceError::Busy(_)) && error.to_string().contains("being stopped"),
        "{error}"
    );
}

#[test]
fn a_deleted_vm_leaves_nothing_and_its_name_is_free() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.delete(&vm).unwrap();
    sim.assert_gone(&vm.id);
    assert_eq!(sim.events().last(), Some(&EventKind::Deleted));
    sim.create("box");
}

#[test]
fn a_deletion_that_cannot_be_recorded_changes_nothing() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.set_state_fails(true);
    sim.delete(&vm).unwrap_err();
    sim.set_state_fails(false);
    assert_eq!(sim.status(&vm), VmStatus::Running);
    assert!(sim.machine(&vm).is_held());
    sim.delete(&vm).unwrap();
    sim.assert_gone(&vm.id);
}

#[test]
fn what_a_deletion_cannot_remove_is_removed_later() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.machine(&vm).next(Operation::Kill).fails();
    sim.delete(&vm).unwrap();
    assert_eq!(sim.vmm.machines().len(), 1, "the machine could not be killed");
    sim.wait_until("cleaned up", |sim| sim.vmm.machines().is_empty());
    sim.wait(Duration::from_secs(1));
    sim.assert_gone(&vm.id);
}

#[test]
fn the_address_of_a_deleted_vm_is_used_again_only_after_its_tap_is_gone() {
    let sim = Sim::with(&[("PORT_MIN", "22001"), ("PORT_MAX", "22001")]);
    let vm = sim.create("box");
    sim.network().fail_next(NetworkCall::Detach);
    sim.delete(&vm).unwrap();
    let error = sim.try_create(serde_json::json!({ "name": "next" })).unwrap_err();
    assert!(matches!(error, ServiceError::NotReady(_)), "{error}");
    sim.wait_until("free", |sim| sim.network().taps().is_empty());
    sim.wait(Duration::from_secs(1));
    sim.create("next");
}

#[test]
fn an_unknown_vm_is_not_found() {
    let sim = Sim::new();
    for error in [
        sim.run(async |host| vm::start(&host, "box".to_owned()).await)
            .unwrap_err(),
        sim.run(async |host| vm::delete(&host, "box".to_owned()).await)
            .unwrap_err(),
    ] {
        assert!(matches!(error, ServiceError::NotFound(_)), "{error}");
    }
}
