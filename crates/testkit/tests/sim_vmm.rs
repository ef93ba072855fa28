//! Checks that the simulated hypervisor keeps the guarantees of the traits, and has the faults that
//! tests set.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests are not in a `cfg(test)`"
)]

use scalebox_guest::{Qga, QgaError};
use scalebox_testkit::{Operation, SimQga, SimVmm};
use scalebox_units::{Bytes, DiskLocation, VmId};
use scalebox_vmm::{
    Channel, DiskLimits, Error, ExitReason, Machine, MachineEvent, MachineSpec, MachineState, Nic, Vmm,
};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::Receiver;
use tokio::time::{Instant, sleep, timeout};

const RUN_DIR: &str = "/run/vm";

fn id() -> VmId {
    "vm-0123456789ab".parse().unwrap()
}

fn spec() -> MachineSpec {
    MachineSpec {
        id: id(),
        vcpus: 1,
        memory_mib: 64,
        kernel: "/kernel".into(),
        initrd: None,
        modules: None,
        cmdline: String::new(),
        root: DiskLocation::File("/nonexistent/disk".into()),
        root_limits: DiskLimits::default(),
        seed: "/seed".into(),
        nic: Nic {
            tap: "tap0".into(),
            mac: "52:54:00:12:34:56".parse().unwrap(),
        },
        run_dir: RUN_DIR.into(),
        console_log: "/console.log".into(),
        run_as: None,
    }
}

async fn adopt(sim: &SimVmm) -> Result<Option<Arc<dyn Machine>>, Error> {
    sim.adopt(&id(), Path::new(RUN_DIR)).await
}

/// Returns the events so far.
fn drain(events: &mut Receiver<MachineEvent>) -> Vec<MachineEvent> {
    std::iter::from_fn(|| events.try_recv().ok()).collect()
}

async fn booted(machine: &Arc<dyn Machine>) {
    let mut events = machine.events();
    while events.recv().await.unwrap() != MachineEvent::AgentUp {}
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_obeys_shuts_down_after_its_own_time() {
    let sim = SimVmm::new();
    sim.set_guest(|guest| guest.shutdown_time = Some(Duration::from_secs(7)));
    let machine = sim.launch(&spec()).await.unwrap();
    booted(&machine).await;
    machine.pause().await.unwrap();
    let (mut events, begun) = (machine.events(), Instant::now());
    assert_eq!(
        machine.stop(Duration::from_secs(60)).await.unwrap(),
        ExitReason::GuestShutdown
    );
    assert_eq!(begun.elapsed().as_secs(), 7);
    let expected = [
        MachineEvent::Resumed,
        MachineEvent::GuestShutdown,
        MachineEvent::Ended(ExitReason::GuestShutdown),
    ];
    assert_eq!(drain(&mut events), expected);
    assert!(matches!(machine.pause().await, Err(Error::Ended { .. })));
    assert_eq!(machine.kill().await.unwrap(), ExitReason::GuestShutdown);
    assert!(sim.machines().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_requests_is_killed_after_its_grace_period() {
    let sim = SimVmm::new();
    sim.set_guest(|guest| guest.shutdown_time = None);
    let machine = sim.launch(&spec()).await.unwrap();
    let begun = Instant::now();
    assert_eq!(machine.stop(Duration::from_secs(30)).await.unwrap(), ExitReason::Killed);
    assert_eq!(begun.elapsed().as_secs(), 30);
}

#[tokio::test]
async fn machines_survive_the_daemon_and_have_one_holder() {
    let sim = SimVmm::new();
    let old = sim.launch(&spec()).await.unwrap();
    let mut old_events = old.events();
    old.pause().await.unwrap();
    assert!(matches!(adopt(&sim).await, Err(Error::Running { .. })));
    assert!(matches!(sim.launch(&spec()).await, Err(Error::Running { .. })));

    let sim = sim.restart();
    drain(&mut old_events);
    assert!(!sim.machine(&id()).is_held());
    let new = adopt(&sim).await.unwrap().unwrap();
    assert_eq!(new.pid(), old.pid());
    assert_eq!(new.state().await.unwrap(), MachineState::Paused);
    // The ended daemon's handle does nothing, and dropping it releases nothing.
    let late = timeout(Duration::from_millis(20), old.resume()).await;
    assert!(late.is_err(), "{late:?}");
    drop(old);
    assert!(sim.machine(&id()).is_held());
    new.resume().await.unwrap();
    assert_eq!(drain(&mut old_events), []);
    assert!(matches!(
        sim.force_stop(&id(), Path::new(RUN_DIR)).await,
        Err(Error::Running { .. })
    ));
    drop(new);
    assert!(sim.force_stop(&id(), Path::new(RUN_DIR)).await.unwrap());
    assert!(!sim.force_stop(&id(), Path::new(RUN_DIR)).await.unwrap());
}

#[tokio::test]
async fn only_a_guest_s_own_shutdown_is_known_to_the_next_daemon() {
    let sim = SimVmm::new();
    drop(sim.launch(&spec()).await.unwrap());
    sim.machine(&id()).power_off();
    let adopted = adopt(&sim).await.unwrap().unwrap();
    assert_eq!(adopted.exited().await, ExitReason::GuestShutdown);
    assert_eq!(
        adopted.state().await.unwrap(),
        MachineState::Ended(ExitReason::GuestShutdown)
    );
    drop(adopted);
    assert!(adopt(&sim).await.unwrap().is_none());

    drop(sim.launch(&spec()).await.unwrap());
    sim.machine(&id()).crash();
    assert!(adopt(&sim).await.unwrap().is_none());
}

#[tokio::test]
async fn machines_of_another_driver_are_foreign() {
    let sim = SimVmm::new();
    drop(sim.launch(&spec()).await.unwrap());
    let other = sim.with_name("firecracker");
    assert!(matches!(adopt(&other).await, Err(Error::Foreign { .. })));
    assert!(adopt(&sim).await.unwrap().is_some());
}

#[tokio::test]
async fn a_full_disk_stalls_the_guest_until_there_is_space() {
    let sim = SimVmm::new();
    let machine = sim.launch(&spec()).await.unwrap();
    let (control, mut events) = (sim.machine(&id()), machine.events());
    let io_error = MachineEvent::IoError {
        nospace: true,
        reason: "No space left on device".into(),
    };
    control.set_disk_full(true);
    assert_eq!(machine.state().await.unwrap(), MachineState::Stalled);
    assert_eq!(drain(&mut events), [io_error.clone(), MachineEvent::Stopped]);
    machine.resume().await.unwrap();
    assert_eq!(machine.state().await.unwrap(), MachineState::Stalled);
    assert_eq!(
        drain(&mut events),
        [MachineEvent::Resumed, io_error, MachineEvent::Stopped]
    );
    control.set_disk_full(false);
    machine.resume().await.unwrap();
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
}

#[tokio::test]
async fn disks_and_their_files_grow_and_never_shrink() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk");
    std::fs::write(&file, [0; 4096]).unwrap();
    let (sim, spec) = (
        SimVmm::new(),
        MachineSpec {
            root: DiskLocation::File(file.clone()),
            ..spec()
        },
    );
    let machine = sim.launch(&spec).await.unwrap();
    machine.resize_root(Bytes::from_mib(1)).await.unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    assert_eq!(sim.machine(&id()).disk_size(), Bytes::from_mib(1));
    for size in [4096, (1 << 20) + 1] {
        let error = machine.resize_root(Bytes::new(size)).await.unwrap_err();
        assert!(matches!(error, Error::Spec { what: "size", .. }), "{error}");
    }
    let limits = DiskLimits {
        iops: Some(100),
        bytes_per_second: None,
    };
    machine.limit_disk(limits).await.unwrap();
    assert_eq!(sim.machine(&id()).limits(), limits);
}

#[tokio::test(start_paused = true)]
async fn calls_fail_hang_or_wait_as_decided() {
    let sim = SimVmm::new();
    sim.next(Operation::Launch).fails();
    assert!(matches!(sim.launch(&spec()).await, Err(Error::Launch { .. })));
    assert!(sim.machines().is_empty());
    let machine = sim.launch(&spec()).await.unwrap();
    let control = sim.machine(&id());

    control.next(Operation::Pause).hangs();
    let begun = Instant::now();
    assert!(matches!(machine.pause().await, Err(Error::Hung { .. })));
    assert_eq!(begun.elapsed().as_secs(), 10);

    let gate = control.next(Operation::Pause).waits();
    let pausing = tokio::spawn({
        let machine = machine.clone();
        async move { machine.pause().await }
    });
    gate.reached().await;
    assert_eq!(control.state(), MachineState::Running);
    gate.open();
    pausing.await.unwrap().unwrap();
    assert_eq!(control.state(), MachineState::Paused);

    let other = "vm-aaaaaaaaaaaa".parse().unwrap();
    sim.next(Operation::Resume).fails_with(|id| Error::Agent {
        id: id.clone(),
        why: "as told".into(),
    });
    let error = machine.resume().await.unwrap_err();
    assert!(error.to_string().contains("as told"), "{error}");
    assert!(sim.find(&other).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_hanging_hypervisor_can_still_be_killed() {
    let sim = SimVmm::new();
    let machine = sim.launch(&spec()).await.unwrap();
    let control = sim.machine(&id());
    control.set_hung(true);
    assert!(matches!(machine.state().await, Err(Error::Hung { .. })));
    assert_eq!(machine.stop(Duration::from_secs(3)).await.unwrap(), ExitReason::Killed);
    drop(machine);
    drop(sim.launch(&spec()).await.unwrap());
    sim.machine(&id()).set_hung(true);
    assert!(matches!(adopt(&sim).await, Err(Error::Hung { .. })));
    assert!(sim.force_stop(&id(), Path::new(RUN_DIR)).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn the_agent_serves_the_host_while_the_clock_is_paused() {
    let sim = SimVmm::new();
    let machine = sim.launch(&spec()).await.unwrap();
    let control = sim.machine(&id());
    control.set_guest(|guest| {
        guest.fs_used = Bytes::from_mib(3);
        guest.trimmable = Bytes::from_mib(2);
    });
    booted(&machine).await;
    machine.resize_root(Bytes::from_mib(8)).await.unwrap();
    let agent = Qga::connect(machine.channel(Channel::Qga).await.unwrap())
        .await
        .unwrap();
    let root = agent.root_file_system().await.unwrap();
    assert_eq!((root.total, root.used), (Bytes::from_mib(8), Bytes::from_mib(3)));
    assert_eq!(agent.trim().await.unwrap(), Bytes::from_mib(2));
    assert_eq!(control.trims(), 1);
    agent.flush(Duration::from_secs(1)).await.unwrap();
    agent.freeze().await.unwrap();
    assert!(control.is_frozen());
    let refused = agent.trim().await.unwrap_err();
    assert!(matches!(refused, QgaError::Refused { .. }), "{refused}");
    agent.thaw().await.unwrap();
    assert!(!control.is_frozen());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_not_respond_lets_the_clock_run() {
    let sim = SimVmm::new();
    let machine = sim.launch(&spec()).await.unwrap();
    // The guest is still booting.
    let silent = Qga::connect(machine.channel(Channel::Qga).await.unwrap())
        .await
        .err()
        .unwrap();
    assert!(matches!(silent, QgaError::Timeout), "{silent}");
    sleep(Duration::from_secs(1)).await;
    let control = sim.machine(&id());
    control.set_guest(|guest| guest.unanswered.push("guest-fstrim"));
    let agent = Qga::connect(machine.channel(Channel::Qga).await.unwrap())
        .await
        .unwrap();
    let unfinished = agent.trim().await.unwrap_err();
    assert!(matches!(unfinished, QgaError::Unfinished { .. }), "{unfinished}");
    drop(agent);

    machine.pause().await.unwrap();
    let paused = Qga::connect(machine.channel(Channel::Qga).await.unwrap())
        .await
        .err()
        .unwrap();
    assert!(matches!(paused, QgaError::Timeout), "{paused}");
    control.set_guest(|guest| guest.qga = SimQga::Unreachable);
    assert!(matches!(machine.channel(Channel::Qga).await, Err(Error::Agent { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_launch_leaves_nothing() {
    let sim = SimVmm::new();
    let gate = sim.next(Operation::Launch).waits();
    let cancelled = timeout(Duration::from_secs(1), sim.launch(&spec())).await;
    assert!(cancelled.is_err());
    drop(gate);
    assert!(sim.machines().is_empty());
    assert!(adopt(&sim).await.unwrap().is_none());
    sim.launch(&spec()).await.unwrap();
}

#[tokio::test]
async fn invalid_specifications_are_rejected() {
    let error = SimVmm::new()
        .launch(&MachineSpec { vcpus: 0, ..spec() })
        .await
        .err()
        .unwrap();
    assert!(matches!(error, Error::Spec { what: "vcpus", .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn reboots_are_reported_and_the_agent_comes_back() {
    let sim = SimVmm::new();
    let machine = sim.launch(&spec()).await.unwrap();
    booted(&machine).await;
    let mut events = machine.events();
    sim.machine(&id()).reboot();
    assert_eq!(events.recv().await.unwrap(), MachineEvent::GuestReboot);
    assert_eq!(events.recv().await.unwrap(), MachineEvent::AgentUp);
}
