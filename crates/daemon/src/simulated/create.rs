//! Tests of creations, and of the host after a creation fails.

use crate::host::error::ServiceError;
use crate::simulated::sim::{CAPACITY, PULL_WAIT, Sim, TEMPLATE, create_request, id};
use crate::vm;
use scalebox_api::{EventKind, VmStatus};
use scalebox_net::NetworkCall;
use scalebox_testkit::Operation;
use scalebox_units::Bytes;
use serde_json::json;

#[test]
fn a_created_vm_runs_and_is_recorded_and_announced() {
    let sim = Sim::new();
    let vm = sim.create("box");
    assert_eq!((vm.status, sim.status(&vm)), (VmStatus::Running, VmStatus::Running));
    assert_eq!(sim.recorded(&vm), (VmStatus::Running, None));
    assert_eq!(sim.events(), [EventKind::Created, EventKind::Started]);
    assert_eq!(sim.network().taps().len(), 1);
}

#[test]
fn a_machine_gets_what_the_request_asks_for() {
    let sim = Sim::new();
    let request = json!({ "name": "box", "vcpu_count": 1, "mem_size_mib": 384, "disk_size_gib": 7, "disk_iops": 500 });
    let vm = sim.try_create(request).unwrap();
    let machine = sim.machine(&vm);
    assert_eq!((machine.spec().vcpus, machine.spec().memory_mib), (1, 384));
    assert_eq!(machine.disk_size(), Bytes::new(7 << 30));
    assert_eq!(machine.limits().iops, Some(500));
}

#[test]
fn a_vm_that_is_not_to_start_has_a_disk_and_no_machine() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    assert_eq!(sim.recorded(&vm), (VmStatus::Stopped, None));
    assert!(sim.vmm.machines().is_empty() && sim.network().taps().is_empty());
    assert!(sim.host().pool.has_disk(&id(&vm)).unwrap());
    assert_eq!(sim.events(), [EventKind::Created]);
}

#[test]
fn a_failed_launch_leaves_nothing_behind() {
    let sim = Sim::new();
    sim.vmm.next(Operation::Launch).fails();
    let error = sim.try_create(json!({ "name": "box" })).unwrap_err();
    assert!(error.to_string().contains("simulated failure"), "{error}");
    sim.assert_nothing_but(&[]);
    assert_eq!(sim.events(), []);
    sim.create("box");
}

#[test]
fn a_network_that_fails_leaves_nothing_behind() {
    let sim = Sim::new();
    sim.network().fail_next(NetworkCall::Attach);
    sim.try_create(json!({ "name": "box" })).unwrap_err();
    sim.assert_nothing_but(&[]);
    sim.create("box");
}

#[test]
fn a_creation_that_cannot_be_recorded_leaves_nothing_behind() {
    let sim = Sim::new();
    sim.set_state_fails(true);
    sim.try_create(json!({ "name": "box" })).unwrap_err();
    sim.set_state_fails(false);
    sim.assert_nothing_but(&[]);
    assert!(sim.vmm.machines().is_empty());
    sim.create("box");
}

#[test]
fn a_name_in_use_and_a_missing_template_are_rejected() {
    let sim = Sim::new();
    let vm = sim.create_stopped("box");
    let taken = sim.try_create(json!({ "name": "box" })).unwrap_err();
    assert!(matches!(taken, ServiceError::NameTaken(_)), "{taken}");
    let missing = sim.try_create(json!({ "template": "missing" })).unwrap_err();
    assert!(missing.to_string().contains("missing"), "{missing}");
    sim.assert_nothing_but(&[vm.id]);
}

#[test]
fn a_disk_that_does_not_fit_is_rejected_and_fits_once_there_is_space() {
    let sim = Sim::new();
    sim.space.set_free(Bytes::from_mib(3 << 10));
    let error = sim
        .try_create(json!({ "name": "box", "disk_size_gib": 80 }))
        .unwrap_err();
    assert!(error.is_insufficient(), "{error}");
    sim.assert_nothing_but(&[]);
    sim.space.set_free(CAPACITY.bytes());
    sim.try_create(json!({ "name": "box", "disk_size_gib": 80 })).unwrap();
}

#[test]
fn commitments_are_bounded_by_the_overcommit_ratio_and_return_with_deleted_vms() {
    let sim = Sim::with(&[("OVERCOMMIT_RATIO", "1"), ("MAX_DISK_SIZE_GIB", "90")]);
    let first = sim.try_create(json!({ "disk_size_gib": 60, "start": false })).unwrap();
    let error = sim
        .try_create(json!({ "disk_size_gib": 60, "start": false }))
        .unwrap_err();
    assert!(error.is_insufficient(), "{error}");
    sim.delete(&first).unwrap();
    sim.try_create(json!({ "disk_size_gib": 60, "start": false })).unwrap();
}

#[test]
fn a_repeated_request_with_its_key_returns_the_same_vm() {
    let sim = Sim::new();
    let create = |name: &str| {
        let mut request = create_request(sim.host(), json!({ "name": name }));
        request.idempotency_key = Some("key-1".parse().unwrap());
        sim.run(async |host| vm::create(&host, request, PULL_WAIT).await)
    };
    let (vm, found) = create("box").unwrap();
    assert!(!found);
    let (same, found) = create("box").unwrap();
    assert!(found && same.id == vm.id);
    let other = create("other").unwrap_err();
    assert!(matches!(other, ServiceError::IdempotencyMismatch(_)), "{other}");
}

#[test]
fn a_key_whose_creation_failed_can_be_used_again() {
    let sim = Sim::new();
    sim.vmm.next(Operation::Launch).fails();
    let create = || {
        let mut request = create_request(sim.host(), json!({ "name": "box" }));
        request.idempotency_key = Some("key-1".parse().unwrap());
        sim.run(async |host| vm::create(&host, request, PULL_WAIT).await)
    };
    create().unwrap_err();
    assert!(!create().unwrap().1);
}

#[test]
fn deleting_a_vm_that_is_being_created_undoes_the_creation() {
    let sim = Sim::new();
    let gate = sim.vmm.next(Operation::Launch).waits();
    let (created, deleted) = sim.run(async |host| {
        let create = vm::create(&host, create_request(&host, json!({ "name": "box" })), PULL_WAIT);
        let delete = async {
            gate.reached().await;
            let deletion = vm::delete(&host, "box".to_owned());
            let release = async { gate.open() };
            tokio::join!(deletion, release).0
        };
        tokio::join!(create, delete)
    });
    deleted.unwrap();
    created.unwrap_err();
    sim.assert_nothing_but(&[]);
    assert!(sim.vmm.machines().is_empty());
}

#[test]
fn a_client_that_disconnects_does_not_interrupt_a_creation() {
    let sim = Sim::new();
    let gate = sim.vmm.next(Operation::Launch).waits();
    sim.run(async |host| {
        let create = vm::create(&host, create_request(&host, json!({ "name": "box" })), PULL_WAIT);
        tokio::select! {
            _ = create => panic!("it waits at the gate"),
            () = gate.reached() => {}
        }
    });
    gate.open();
    sim.wait_until("the VM runs", |sim| sim.host().vms.find("box").is_ok());
    assert_eq!(sim.events(), [EventKind::Created, EventKind::Started]);
}

#[test]
fn concurrent_creations_get_different_addresses_and_ports() {
    let sim = Sim::new();
    let vms = sim.run(async |host| {
        let create = |n: u8| {
            vm::create(
                &host,
                create_request(&host, json!({ "name": format!("box-{n}") })),
                PULL_WAIT,
            )
        };
        futures::future::join_all((0..8).map(create)).await
    });
    let mut ports: Vec<_> = vms.into_iter().map(|created| created.unwrap().0.ssh_port).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 8);
    assert_eq!(sim.network().attached().len(), 8);
}

#[test]
fn a_host_without_a_guest_kernel_says_what_to_do() {
    let sim = Sim::new();
    std::fs::remove_dir_all(sim.host().pool.kernels_dir()).unwrap();
    let error = sim.try_create(json!({ "name": "box" })).unwrap_err();
    assert!(error.to_string().contains("scaleboxd template build"), "{error}");
    sim.assert_nothing_but(&[]);
    // A stopped VM needs no kernel.
    sim.create_stopped("box");
}

#[test]
fn the_template_of_a_vm_that_is_being_created_cannot_be_deleted() {
    let sim = Sim::new();
    let held = sim.host().templates_in_use.hold(TEMPLATE);
    let delete = || sim.run(async |host| crate::templates::delete(&host, TEMPLATE.to_owned()).await);
    let error = delete().unwrap_err();
    assert!(error.to_string().contains(TEMPLATE), "{error}");
    drop(held);
    delete().unwrap();
}
