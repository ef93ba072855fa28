//! Tests of the kernel that a VM boots, and of the removal of kernels.

use crate::simulated::sim::{Sim, TEMPLATE, id, install_kernel};
use crate::vm;
use scalebox_api::{SnapshotVm, Vm};
use scalebox_units::KernelId;
use serde_json::json;

/// Returns the id of the kernel that the VM's machine was launched with.
fn booted(sim: &Sim, vm: &Vm) -> KernelId {
    let kernel = sim.machine(vm).spec().kernel.clone();
    kernel
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap()
}

fn install(sim: &Sim, content: &str) -> KernelId {
    install_kernel(&sim.host().pool, content)
}

fn kernels(sim: &Sim) -> Vec<KernelId> {
    sim.host().pool.kernels().unwrap()
}

fn snapshot(sim: &Sim, vm: &Vm, name: &str) {
    let request = SnapshotVm::parse(json!({ "template_name": name }).to_string().as_bytes()).unwrap();
    sim.run(async |host| vm::snapshot::snapshot(&host, vm.id.clone(), request).await)
        .unwrap();
}

fn delete_template(sim: &Sim, name: &str) {
    sim.run(async |host| crate::templates::delete(&host, name.to_owned()).await)
        .unwrap();
}

fn recorded(sim: &Sim, vm: &Vm) -> Option<KernelId> {
    let records = sim.host().state.vms().unwrap();
    records.into_iter().find(|record| record.id == id(vm)).unwrap().kernel
}

fn forget(sim: &Sim, vm: &Vm) {
    let database = rusqlite::Connection::open(sim.path("state/state.db")).unwrap();
    database
        .execute("UPDATE vms SET kernel = NULL WHERE id = ?", [&vm.id])
        .unwrap();
}

#[test]
fn vms_boot_the_kernel_of_their_template_whatever_was_installed_since() {
    let mut sim = Sim::new();
    let first = kernels(&sim).remove(0);
    let vm = sim.create("box");
    let second = install(&sim, "second");
    assert_eq!(
        (booted(&sim, &vm), recorded(&sim, &vm)),
        (first.clone(), Some(first.clone()))
    );
    let spec = sim.machine(&vm).spec().clone();
    assert!(
        spec.modules.is_some() && spec.cmdline.contains("scalebox.modules=/dev/vdc"),
        "{spec:?}"
    );
    sim.stop(&vm).unwrap();
    sim.restart();
    sim.start(&vm).unwrap();
    assert_eq!(booted(&sim, &vm), first);
    snapshot(&sim, &vm, "base");
    let from_snapshot = sim.try_create(json!({ "template": "base" })).unwrap();
    assert_eq!(booted(&sim, &from_snapshot), first);
    assert_eq!(kernels(&sim), [second, first]);
}

#[test]
fn a_kernel_goes_with_the_last_vm_or_template_that_uses_it() {
    let mut sim = Sim::new();
    let first = kernels(&sim).remove(0);
    let (one, two) = (sim.create("one"), sim.create_stopped("two"));
    snapshot(&sim, &one, "base");
    let newest = install(&sim, "newest");
    delete_template(&sim, TEMPLATE);
    sim.delete(&one).unwrap();
    delete_template(&sim, "base");
    assert_eq!(kernels(&sim), [newest.clone(), first], "a VM still boots it");
    sim.delete(&two).unwrap();
    assert_eq!(kernels(&sim), std::slice::from_ref(&newest));

    // The next start removes a kernel that was left over.
    let latest = install(&sim, "latest");
    sim.restart();
    assert_eq!(kernels(&sim), [latest]);
}

#[test]
fn a_kernel_that_a_creation_relies_on_stays() {
    let sim = Sim::new();
    let first = kernels(&sim).remove(0);
    let held = sim.host().kernels_in_use.hold(|| Ok(Some(first.clone()))).unwrap();
    install(&sim, "newest");
    delete_template(&sim, TEMPLATE);
    assert!(kernels(&sim).contains(&first));
    drop(held);
    sim.run(async |host| crate::pool::kernels::remove_unused(&host).await);
    assert!(!kernels(&sim).contains(&first));
}

#[test]
fn vms_without_a_recorded_kernel_get_that_of_their_template_at_the_next_start() {
    let mut sim = Sim::new();
    let first = kernels(&sim).remove(0);
    let (kept, orphaned) = (sim.create_stopped("kept"), sim.create_stopped("orphaned"));
    snapshot(&sim, &orphaned, "base");
    let of_gone = sim.try_create(json!({ "template": "base", "start": false })).unwrap();
    delete_template(&sim, "base");
    let newest = install(&sim, "newest");
    sim.restart_after(|sim| {
        for vm in [&kept, &of_gone] {
            forget(sim, vm);
        }
    });
    assert_eq!(recorded(&sim, &kept), Some(first));
    assert_eq!(recorded(&sim, &of_gone), Some(newest), "its template is gone");
}

#[test]
fn a_vm_whose_kernel_is_missing_boots_the_newest() {
    let sim = Sim::new();
    let first = kernels(&sim).remove(0);
    let vm = sim.create_stopped("box");
    let newest = install(&sim, "newest");
    std::fs::remove_dir_all(sim.host().pool.kernels_dir().join(first.as_str())).unwrap();
    sim.start(&vm).unwrap();
    assert_eq!((booted(&sim, &vm), recorded(&sim, &vm)), (newest.clone(), Some(newest)));
}

#[test]
fn templates_are_listed_with_source_kernel_and_digest() {
    let sim = Sim::new();
    let first = kernels(&sim).remove(0);
    let vm = sim.create_stopped("box");
    snapshot(&sim, &vm, "base");
    let templates = sim.run(async |host| crate::templates::list(&host).await).unwrap();
    let [base, tiny] = &templates[..] else {
        panic!("{templates:?}")
    };
    for template in [base, tiny] {
        assert_eq!(template.kernel.as_deref(), Some(first.as_str()));
    }
    assert_eq!(
        (base.source.as_deref(), base.source_vm.as_ref()),
        (Some("snapshot"), Some(&vm.id))
    );
    assert_eq!((tiny.source.as_deref(), &tiny.source_vm), (Some("import"), &None));
    assert!(base.digest.is_none() && tiny.digest.as_ref().unwrap().starts_with("blocks-sha256:"));
}
