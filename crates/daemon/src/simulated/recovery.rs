//! Tests of recovery at the daemon's next start.

use crate::host::error::ServiceError;
use crate::simulated::sim::{PULL_WAIT, Sim, create_request, id};
use crate::state::State;
use crate::vm;
use scalebox_api::{EventKind, VmStatus};
use scalebox_net::NetworkCall;
use scalebox_testkit::Operation;
use scalebox_units::{Bytes, Gib};
use serde_json::json;
use std::fs;
use std::time::Duration;

#[test]
fn a_machine_runs_on_and_is_adopted() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart();
    assert_eq!((sim.recovered.vms, sim.recovered.adopted), (1, 1));
    assert_eq!(sim.status(&vm), VmStatus::Running);
    assert!(sim.machine(&vm).is_held());
    assert_eq!(sim.network().attached().len(), 1);
    assert_eq!(sim.events(), [], "it ran all the time: no news");
    sim.stop(&vm).unwrap();
}

#[test]
fn an_adopted_machine_s_end_is_noticed() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart();
    sim.machine(&vm).crash();
    sim.wait_until("failed", |sim| sim.status(&vm) == VmStatus::Failed);
}

#[test]
fn a_machine_that_ended_meanwhile_is_reported_with_the_reason() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart_after(|sim| sim.machine(&vm).crash());
    assert_eq!(sim.status(&vm), VmStatus::Stopped);
    let reason = sim.reason(&vm).unwrap();
    assert!(reason.contains("while scaleboxd was not running"), "{reason}");
    assert_eq!(sim.recorded(&vm), (VmStatus::Stopped, Some(reason)));
    assert_eq!(sim.events(), [EventKind::Stopped]);
    assert!(!sim.host().run_dir(&id(&vm)).exists() && sim.network().taps().is_empty());
    sim.start(&vm).unwrap();
}

#[test]
fn a_guest_that_powered_off_meanwhile_has_stopped() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart_after(|sim| sim.machine(&vm).power_off());
    sim.wait_until("stopped", |sim| sim.status(&vm) == VmStatus::Stopped);
    sim.start(&vm).unwrap();
}

#[test]
fn stopped_and_failed_vms_stay_as_they_are() {
    let mut sim = Sim::new();
    let (stopped, failed) = (sim.create_stopped("stopped"), sim.create("failed"));
    sim.machine(&failed).crash();
    sim.wait_until("failed", |sim| sim.status(&failed) == VmStatus::Failed);
    let reason = sim.reason(&failed);
    sim.restart();
    assert_eq!(sim.status(&stopped), VmStatus::Stopped);
    assert_eq!((sim.status(&failed), sim.reason(&failed)), (VmStatus::Failed, reason));
    assert_eq!(sim.events(), []);
}

#[test]
fn a_stop_that_a_crash_interrupted_is_completed() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    let gate = sim.machine(&vm).next(Operation::Stop).waits();
    sim.run(async |host| {
        tokio::select! {
            _ = vm::stop(&host, vm.id.clone()) => panic!("it waits at the gate"),
            () = gate.reached() => {}
        }
    });
    assert_eq!(sim.recorded(&vm).1.as_deref(), Some("being stopped"));
    sim.restart();
    assert_eq!(sim.recovered.to_stop, [id(&vm)]);
    sim.wait_until("stopped", |sim| sim.status(&vm) == VmStatus::Stopped);
    assert_eq!(sim.recorded(&vm), (VmStatus::Stopped, None));
    assert!(sim.vmm.machines().is_empty() && sim.network().taps().is_empty());
}

#[test]
fn a_stop_whose_machine_ended_before_the_crash_is_complete() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    let gate = sim.machine(&vm).next(Operation::Stop).waits();
    sim.run(async |host| {
        tokio::select! {
            _ = vm::stop(&host, vm.id.clone()) => panic!("it waits at the gate"),
            () = gate.reached() => {}
        }
    });
    sim.restart_after(|sim| sim.machine(&vm).crash());
    assert_eq!(
        (sim.status(&vm), sim.recorded(&vm)),
        (VmStatus::Stopped, (VmStatus::Stopped, None))
    );
}

#[test]
fn a_creation_that_a_crash_interrupted_leaves_nothing() {
    let mut sim = Sim::new();
    let gate = sim.vmm.next(Operation::Launch).waits();
    sim.run(async |host| {
        tokio::select! {
            _ = vm::create(&host, create_request(&host, json!({ "name": "box" })), PULL_WAIT) => panic!("it waits at the gate"),
            () = gate.reached() => {}
        }
    });
    assert_eq!(sim.host().pool.disks().unwrap().len(), 1);
    sim.restart();
    assert_eq!(sim.recovered.files_removed, 1);
    sim.assert_nothing_but(&[]);
    sim.create("box");
}

#[test]
fn a_machine_without_a_record_is_killed() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart_after(|sim| {
        let state = State::open(&sim.path("state"), &sim.path("run")).unwrap();
        state.delete(&id(&vm)).unwrap();
    });
    assert_eq!(sim.recovered.orphans_killed, 1);
    sim.assert_gone(&vm.id);
}

#[test]
fn a_start_that_a_crash_interrupted_is_undone() {
    let mut sim = Sim::new();
    let vm = sim.create_stopped("box");
    // The machine was launched; the crash came before it was recorded.
    sim.start(&vm).unwrap();
    sim.restart_after(|sim| {
        let state = State::open(&sim.path("state"), &sim.path("run")).unwrap();
        state.set_status(&id(&vm), VmStatus::Stopped, None).unwrap();
    });
    assert_eq!(sim.status(&vm), VmStatus::Stopped);
    assert!(sim.vmm.machines().is_empty() && sim.network().taps().is_empty());
    sim.start(&vm).unwrap();
}

#[test]
fn a_disk_that_is_missing_fails_its_vm_only() {
    let mut sim = Sim::new();
    let (lost, other) = (sim.create_stopped("lost"), sim.create("other"));
    fs::remove_file(sim.disk(&lost)).unwrap();
    sim.restart();
    assert_eq!(
        (sim.status(&lost), sim.status(&other)),
        (VmStatus::Failed, VmStatus::Running)
    );
    assert!(sim.reason(&lost).unwrap().contains("missing from the pool"));
    sim.delete(&lost).unwrap();
}

#[test]
fn a_machine_that_does_not_respond_fails_its_vm_and_is_adopted_by_the_next_start() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart_after(|sim| sim.machine(&vm).set_hung(true));
    assert_eq!(sim.status(&vm), VmStatus::Failed);
    assert_eq!(sim.recorded(&vm).0, VmStatus::Running, "the record is kept");
    assert_eq!(sim.network().taps().len(), 1, "its guest may run");
    sim.restart_after(|sim| sim.machine(&vm).set_hung(false));
    assert_eq!((sim.status(&vm), sim.reason(&vm)), (VmStatus::Running, None));
}

#[test]
fn an_unreachable_machine_s_disk_does_not_grow_and_a_start_kills_it() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart_after(|sim| sim.machine(&vm).set_hung(true));
    let error = sim.update(&vm, json!({ "disk_size_gib": 6 })).unwrap_err();
    assert!(matches!(error, ServiceError::WrongState(_)), "{error}");
    assert_eq!(sim.start(&vm).unwrap().status, VmStatus::Running);
    assert_eq!(sim.vmm.machines().len(), 1);
}

#[test]
fn an_unreachable_machine_s_vm_can_be_deleted() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart_after(|sim| sim.machine(&vm).set_hung(true));
    sim.delete(&vm).unwrap();
    sim.assert_gone(&vm.id);
}

#[test]
fn a_growth_that_a_crash_interrupted_is_completed() {
    let mut sim = Sim::new();
    let (running, stopped) = (sim.create("running"), sim.create_stopped("stopped"));
    sim.restart_after(|sim| {
        let state = State::open(&sim.path("state"), &sim.path("run")).unwrap();
        state.set_disk_size(&id(&running), Gib::new(6)).unwrap();
        state.set_disk_size(&id(&stopped), Gib::new(7)).unwrap();
    });
    let size = |vm| sim.host().pool.provisioned(&id(vm)).unwrap();
    assert_eq!(
        (size(&running), size(&stopped)),
        (Bytes::new(6 << 30), Bytes::new(7 << 30))
    );
    assert_eq!(sim.disk_gib(&running), 6);
}

#[test]
fn a_growth_that_cannot_be_completed_is_rolled_back() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart_after(|sim| {
        let state = State::open(&sim.path("state"), &sim.path("run")).unwrap();
        state.set_disk_size(&id(&vm), Gib::new(6)).unwrap();
        sim.vmm.next(Operation::ResizeRoot).fails();
    });
    assert_eq!(sim.disk_gib(&vm), 2);
    assert_eq!(sim.host().state.vms().unwrap()[0].disk_size, Gib::new(2));
}

#[test]
fn recorded_limits_are_applied_to_an_adopted_machine() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart_after(|sim| {
        let state = State::open(&sim.path("state"), &sim.path("run")).unwrap();
        let limits = crate::state::VmLimits {
            disk_iops: Some(100),
            ..Default::default()
        };
        state.set_settings(&id(&vm), None, limits, true).unwrap();
    });
    assert_eq!(sim.machine(&vm).limits().iops, Some(100));
}

#[test]
fn commitments_are_counted_again() {
    let mut sim = Sim::with(&[("OVERCOMMIT_RATIO", "1"), ("MAX_DISK_SIZE_GIB", "90")]);
    sim.try_create(json!({ "disk_size_gib": 60, "start": false })).unwrap();
    sim.restart();
    let error = sim
        .try_create(json!({ "disk_size_gib": 60, "start": false }))
        .unwrap_err();
    assert!(error.is_insufficient(), "{error}");
}

#[test]
fn after_a_reboot_vms_that_ran_are_started() {
    let mut sim = Sim::new();
    let (ran, stopped) = (sim.create("ran"), sim.create_stopped("stopped"));
    sim.reboot();
    assert_eq!(sim.recovered.to_start, [id(&ran)]);
    sim.wait_until("started", |sim| sim.status(&ran) == VmStatus::Running);
    assert_eq!((sim.reason(&ran), sim.status(&stopped)), (None, VmStatus::Stopped));
    sim.restart();
    assert_eq!(sim.recovered.adopted, 1, "the same boot");
}

#[test]
fn after_a_reboot_a_vm_without_autostart_stays_stopped() {
    let mut sim = Sim::new();
    let vm = sim.try_create(json!({ "name": "box", "autostart": false })).unwrap();
    sim.reboot();
    assert_eq!(sim.status(&vm), VmStatus::Stopped);
    assert!(sim.reason(&vm).unwrap().contains("autostart is off"));
    sim.wait(Duration::from_secs(60));
    assert!(sim.vmm.machines().is_empty());
}

#[test]
fn a_vm_that_waits_for_its_start_can_be_started_or_deleted() {
    let mut sim = Sim::new();
    let vms = [sim.create("a"), sim.create("b"), sim.create("c")];
    // The others wait for the first one.
    let gate = sim.reboot_with(|sim| sim.vmm.next(Operation::Launch).waits());
    let vm = |n: usize| vms.iter().find(|vm| id(vm) == sim.recovered.to_start[n]).unwrap();
    let (first, second, third) = (vm(0), vm(1), vm(2));
    sim.run(async |_| gate.reached().await);
    sim.start(third).unwrap();
    sim.delete(second).unwrap();
    gate.open();
    sim.wait_until("started", |sim| sim.status(first) == VmStatus::Running);
    sim.wait(Duration::from_secs(60));
    assert_eq!(sim.status(third), VmStatus::Running);
    sim.assert_gone(&second.id);
    assert_eq!(sim.vmm.machines().len(), 2);
}

#[test]
fn a_vm_that_cannot_be_started_after_a_reboot_has_failed_and_the_others_run() {
    let mut sim = Sim::new();
    let (first, second) = (sim.create("first"), sim.create("second"));
    sim.reboot_with(|sim| sim.vmm.next(Operation::Launch).fails());
    sim.wait_until("both tried", |sim| {
        sim.recovered
            .to_start
            .iter()
            .all(|vm| sim.host().vms.find(vm.as_str()).unwrap().status != VmStatus::Stopped)
    });
    let mut statuses = [sim.status(&first), sim.status(&second)].map(|status| status.as_str().to_owned());
    statuses.sort();
    assert_eq!(statuses, ["failed", "running"]);
}

#[test]
fn a_network_that_cannot_be_restored_is_retried() {
    let mut sim = Sim::new();
    let vm = sim.create("box");
    sim.restart();
    sim.network().delete_tap(&sim.network().taps()[0].clone());
    sim.network().flush_rules();
    sim.network().fail_next(NetworkCall::Repair);
    sim.wait_until("connected again", |sim| sim.network().attached().len() == 1);
    assert_eq!(sim.status(&vm), VmStatus::Running);
}

#[test]
fn recovery_repeats_without_another_change() {
    let mut sim = Sim::new();
    let (running, stopped) = (sim.create("running"), sim.create_stopped("stopped"));
    let before = sim.host().state.vms().unwrap();
    for _ in 0..3 {
        sim.restart();
        assert_eq!(sim.host().state.vms().unwrap(), before);
        assert_eq!(
            (sim.status(&running), sim.status(&stopped)),
            (VmStatus::Running, VmStatus::Stopped)
        );
        assert_eq!((sim.recovered.files_removed, sim.recovered.orphans_killed), (0, 0));
    }
}
