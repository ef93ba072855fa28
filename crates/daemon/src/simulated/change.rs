//! Tests of the growth of a disk, of limits and of settings.

use crate::simulated::sim::{Sim, id};
use scalebox_api::{EventKind, UpdateVm, VmStatus};
use scalebox_net::NetworkCall;
use scalebox_testkit::{Operation, SimQga};
use scalebox_units::Bytes;
use serde_json::json;

fn gib(count: u64) -> Bytes {
    Bytes::new(count << 30)
}

fn recorded_gib(sim: &Sim, vm: &str) -> u64 {
    let records = sim.host().state.vms().unwrap();
    records
        .iter()
        .find(|record| record.id.as_str() == vm)
        .unwrap()
        .disk_size
        .as_u64()
}

#[test]
fn a_running_vm_s_disk_grows_live_and_its_guest_confirms() {
    let sim = Sim::new();
    let vm = sim.create("box");
    let grown = sim.update(&vm, json!({ "disk_size_gib": 6 })).unwrap();
    let disk = grown.disk.unwrap();
    assert!(disk.confirmed && disk.guest_total_bytes == Some(6 << 30), "{disk:?}");
    assert_eq!((sim.machine(&vm).disk_size(), recorded_gib(&sim, &vm.id)), (gib(6), 6));
    assert_eq!(sim.events().last(), Some(&EventKind::Grown));
}

#[test]
fn a_guest_that_does_not_confirm_is_reported_and_its_disk_stays_grown() {
    let sim = Sim::new();
    sim.vmm.set_guest(|guest| guest.qga = SimQga::Silent);
    let vm = sim.create("box");
    let disk = sim.update(&vm, json!({ "disk_size_gib": 6 })).unwrap().disk.unwrap();
    assert!(!disk.confirmed && disk.note.is_some(), "{disk:?}");
    assert_eq!((sim.machine(&vm).disk_size(), recorded_gib(&sim, &vm.id)), (gib(6), 6));
}

#[test]
fn a_stopped_vm_s_disk_grows_offline() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    let grown = sim.update(&vm, json!({ "disk_size_gib": 6 })).unwrap();
    assert!(grown.disk.unwrap().confirmed);
    assert_eq!(sim.host().pool.provisioned(&id(&vm)).unwrap(), gib(6));
    assert_eq!(recorded_gib(&sim, &vm.id), 6);
}

#[test]
fn a_disk_does_not_shrink() {
    let sim = Sim::new();
    let vm = sim.create("box");
    let error = sim.update(&vm, json!({ "disk_size_gib": 1 })).unwrap_err();
    assert!(error.to_string().contains("disks do not shrink"), "{error}");
    assert_eq!(recorded_gib(&sim, &vm.id), 2);
}

#[test]
fn a_growth_that_does_not_fit_changes_nothing() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.space.set_free(gib(3));
    let error = sim
        .update(&vm, json!({ "disk_size_gib": 90, "disk_iops": 100 }))
        .unwrap_err();
    assert!(error.is_insufficient(), "{error}");
    assert_eq!((sim.machine(&vm).disk_size(), recorded_gib(&sim, &vm.id)), (gib(2), 2));
    assert_eq!(sim.machine(&vm).limits().iops, None);
    assert_eq!(sim.count(&EventKind::Grown), 0);
}

#[test]
fn a_growth_that_the_hypervisor_refuses_is_taken_back() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.machine(&vm).next(Operation::ResizeRoot).fails();
    sim.update(&vm, json!({ "disk_size_gib": 6 })).unwrap_err();
    assert_eq!((sim.machine(&vm).disk_size(), recorded_gib(&sim, &vm.id)), (gib(2), 2));
    assert_eq!(sim.disk_gib(&vm), 2);
    sim.update(&vm, json!({ "disk_size_gib": 6 })).unwrap();
}

#[test]
fn a_growth_that_cannot_be_recorded_does_not_happen() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.set_state_fails(true);
    sim.update(&vm, json!({ "disk_size_gib": 6 })).unwrap_err();
    sim.set_state_fails(false);
    assert_eq!((sim.machine(&vm).disk_size(), recorded_gib(&sim, &vm.id)), (gib(2), 2));
}

#[test]
fn limits_change_live_and_are_recorded() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.update(&vm, json!({ "disk_iops": 100, "net_mbps": 50 })).unwrap();
    assert_eq!(sim.machine(&vm).limits().iops, Some(100));
    let record = sim.host().state.vms().unwrap().remove(0);
    assert_eq!((record.limits.disk_iops, record.limits.net_mbps), (Some(100), Some(50)));
    sim.update(&vm, json!({ "disk_iops": null })).unwrap();
    assert_eq!(sim.machine(&vm).limits().iops, None);
    assert_eq!(sim.host().vms.find(&vm.id).unwrap().limits.net_mbps, Some(50));
}

#[test]
fn a_limit_that_the_network_refuses_is_taken_back_from_the_disk() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.network().fail_next(NetworkCall::Attach);
    sim.update(&vm, json!({ "disk_iops": 100, "net_mbps": 50 }))
        .unwrap_err();
    assert_eq!(sim.machine(&vm).limits().iops, None);
    let record = sim.host().state.vms().unwrap().remove(0);
    assert_eq!((record.limits.disk_iops, record.limits.net_mbps), (None, None));
}

#[test]
fn limits_of_a_stopped_vm_apply_when_it_starts() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    sim.update(&vm, json!({ "disk_iops": 100 })).unwrap();
    sim.start(&vm).unwrap();
    assert_eq!(sim.machine(&vm).limits().iops, Some(100));
}

#[test]
fn the_largest_of_several_growths_at_once_wins() {
    let sim = Sim::new();
    let vm = sim.create("box");
    sim.run(async |host| {
        let grow = |size: u64| {
            let body = json!({ "disk_size_gib": size }).to_string();
            let change = UpdateVm::parse(body.as_bytes(), host.limits()).unwrap();
            crate::vm::update(&host, vm.id.clone(), change)
        };
        futures::future::join_all([4, 9, 6].map(grow)).await
    });
    assert_eq!((sim.machine(&vm).disk_size(), recorded_gib(&sim, &vm.id)), (gib(9), 9));
    assert_eq!(sim.status(&vm), VmStatus::Running);
}

#[test]
fn auto_extend_below_the_disk_s_size_is_rejected() {
    let sim = Sim::new();
    let vm = sim.create("box");
    let extend = json!({ "threshold_percent": 80, "increment_gib": 1, "limit_gib": 1 });
    let error = sim.update(&vm, json!({ "disk_auto_extend": extend })).unwrap_err();
    assert!(error.to_string().contains("limit_gib"), "{error}");
}
