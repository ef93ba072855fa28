//! One suite for every driver: what the traits promise, whatever the hypervisor. It prints a table
//! that tells of each test and driver: passed, or why it could not run here. Needs root, for taps
//! and jails.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests are not in a `cfg(test)`"
)]

mod support;

use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::process::Signal;
use scalebox_units::{Bytes, DiskLocation};
use scalebox_vmm::{
    Accel, AccelSetting, DiskLimits, Error, ExitReason, FirecrackerDriver, MachineEvent, MachineSpec, MachineState,
    QemuDriver, RunAs, Vmm, accelerator,
};
use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use support::guest::Guest;
use support::{Lab, PATIENCE, processes_with, signal, status_line, until};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// A driver, a laboratory and a machine that has not been launched: each test's own.
struct Bench {
    lab: Lab,
    vmm: Arc<dyn Vmm>,
    jails: PathBuf,
    spec: MachineSpec,
}

/// What a test needs of the driver beyond its control plane.
#[derive(Clone, Copy, PartialEq)]
enum Needs {
    Control,
    /// A guest that runs.
    Guest,
}

type Test = (&'static str, Needs, fn(Bench) -> BoxFuture<'static, ()>);

const TESTS: &[Test] = &[
    ("launched, killed, nothing left", Needs::Control, |bench| {
        launched_and_killed(bench).boxed()
    }),
    ("paused and resumed, twice each", Needs::Control, |bench| {
        paused_and_resumed(bench).boxed()
    }),
    ("disk grown live, never smaller", Needs::Control, |bench| {
        grown(bench).boxed()
    }),
    ("disk limited live, and freed again", Needs::Control, |bench| {
        limited(bench).boxed()
    }),
    ("adopted, then controlled", Needs::Control, |bench| {
        adopted(bench).boxed()
    }),
    ("held once at a time", Needs::Control, |bench| held_once(bench).boxed()),
    ("put down when nobody holds it", Needs::Control, |bench| {
        put_down(bench).boxed()
    }),
    ("failed launch leaves nothing", Needs::Control, |bench| {
        failed_launch(bench).boxed()
    }),
    ("death of the process is a crash", Needs::Control, |bench| {
        crashed(bench).boxed()
    }),
    ("deaf guest killed after its grace", Needs::Control, |bench| {
        deaf_guest(bench).boxed()
    }),
    ("interrupted launch undone", Needs::Control, |bench| {
        interrupted(bench).boxed()
    }),
    ("console recorded", Needs::Guest, |bench| {
        console_recorded(bench).boxed()
    }),
    ("own account, without a capability", Needs::Control, |bench| {
        own_account(bench).boxed()
    }),
    ("no agent, no waiting for one", Needs::Control, |bench| {
        no_agent(bench).boxed()
    }),
];

/// A driver by name; or why it cannot be used here at all, or with guests.
struct Candidate {
    name: &'static str,
    driver: Result<Arc<dyn Vmm>, String>,
    guests: Result<(), String>,
    /// On the file system of the laboratories' disks.
    jails: TempDir,
}

fn candidates() -> [Candidate; 3] {
    let kvm = accelerator(AccelSetting::Kvm).map_err(|error| error.to_string());
    let guests = match accelerator(AccelSetting::Auto) {
        Ok(choice) if choice.accel == Accel::Kvm => Ok(()),
        Ok(choice) => Err(choice.reason),
        Err(error) => Err(error.to_string()),
    };
    let jails = || tempfile::Builder::new().prefix("jails-").tempdir().unwrap();
    let cells = jails();
    let firecracker = kvm.and_then(|_| FirecrackerDriver::find(cells.path()).map_err(|error| error.to_string()));
    [
        Candidate {
            name: "qemu tcg",
            driver: Ok(Arc::new(QemuDriver::find(Accel::Tcg).unwrap())),
            guests: Ok(()),
            jails: jails(),
        },
        Candidate {
            name: "qemu kvm",
            driver: guests
                .clone()
                .map(|()| Arc::new(QemuDriver::find(Accel::Kvm).unwrap()) as Arc<dyn Vmm>),
            guests: guests.clone(),
            jails: jails(),
        },
        Candidate {
            name: "firecracker",
            driver: firecracker.map(|driver| Arc::new(driver) as Arc<dyn Vmm>),
            guests,
            jails: cells,
        },
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_driver_keeps_the_promises_of_the_traits() {
    let (mut table, mut failed) = (Vec::new(), 0);
    for candidate in candidates() {
        for (name, needs, test) in TESTS {
            let possible = match needs {
                Needs::Control => &Ok(()),
                Needs::Guest => &candidate.guests,
            };
            let outcome = match (&candidate.driver, possible) {
                (Err(why), _) | (_, Err(why)) => format!("not run: {why}"),
                (Ok(vmm), Ok(())) => match AssertUnwindSafe(test(bench(vmm, candidate.jails.path())))
                    .catch_unwind()
                    .await
                {
                    Ok(()) => "passed".to_owned(),
                    Err(_) => {
                        failed += 1;
                        "FAILED".to_owned()
                    }
                },
            };
            table.push(format!("{:<12} {name:<36} {outcome}", candidate.name));
        }
    }
    println!("{}", table.join("\n"));
    assert_eq!(failed, 0, "\n{}", table.join("\n"));
}

fn bench(vmm: &Arc<dyn Vmm>, jails: &Path) -> Bench {
    let lab = Lab::new();
    let mut spec = lab.spec(Guest::Deaf);
    if vmm.name() == "firecracker" {
        Guest::Deaf.write_64_to(&spec.kernel);
        spec.cmdline = "console=ttyS0".into();
    }
    let vmm = vmm.clone();
    spec.memory_mib = 128;
    Bench {
        lab,
        vmm,
        jails: jails.to_owned(),
        spec,
    }
}

impl Bench {
    fn nothing_is_left(&self) {
        assert!(processes_with(self.spec.id.as_str()).is_empty());
        assert!(!self.spec.run_dir.exists());
        assert_eq!(jails_in(&self.jails), Vec::<PathBuf>::new());
        // The tap and the disk are the caller's.
        assert!(self.lab.path("root").exists());
    }
}

/// The machines' folders, below those named after their program.
fn jails_in(base: &Path) -> Vec<PathBuf> {
    let entries = |of: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(of).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    entries(base).iter().flat_map(|program| entries(program)).collect()
}

async fn launched_and_killed(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    assert_eq!(processes_with(bench.spec.id.as_str()), [machine.pid()]);
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    assert_eq!(machine.kill().await.unwrap(), ExitReason::Killed);
    assert_eq!(machine.exited().await, ExitReason::Killed);
    assert_eq!(machine.state().await.unwrap(), MachineState::Ended(ExitReason::Killed));
    assert!(matches!(machine.pause().await, Err(Error::Ended { .. })));
    bench.nothing_is_left();
}

async fn paused_and_resumed(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let mut events = machine.events();
    for _ in 0..2 {
        machine.pause().await.unwrap();
        assert_eq!(machine.state().await.unwrap(), MachineState::Paused);
    }
    assert_eq!(
        timeout(PATIENCE, events.recv()).await.unwrap().unwrap(),
        MachineEvent::Stopped
    );
    for _ in 0..2 {
        machine.resume().await.unwrap();
        assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    }
    machine.kill().await.unwrap();
}

async fn grown(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let DiskLocation::File(disk) = bench.spec.root.clone() else {
        panic!("a file");
    };
    for size in [Bytes::from_mib(32), Bytes::from_mib(32), Bytes::from_mib(48)] {
        machine.resize_root(size).await.unwrap();
        assert_eq!(disk.metadata().unwrap().len(), size.as_u64());
    }
    let refusal = machine.resize_root(Bytes::from_mib(32)).await.unwrap_err();
    assert!(matches!(refusal, Error::Spec { what: "size", .. }), "{refusal}");
    assert_eq!(disk.metadata().unwrap().len(), Bytes::from_mib(48).as_u64());
    machine.kill().await.unwrap();
}

async fn limited(mut bench: Bench) {
    bench.spec.root_limits = DiskLimits {
        iops: Some(500),
        bytes_per_second: Some(10_000_000),
    };
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let limits = [
        DiskLimits {
            iops: Some(100),
            bytes_per_second: None,
        },
        DiskLimits {
            iops: None,
            bytes_per_second: Some(1 << 40),
        },
        DiskLimits::default(),
    ];
    for limits in limits {
        machine.limit_disk(limits).await.unwrap();
    }
    machine.resize_root(Bytes::from_mib(32)).await.unwrap();
    machine.kill().await.unwrap();
    assert!(matches!(
        machine.limit_disk(DiskLimits::default()).await,
        Err(Error::Ended { .. })
    ));
    bench.nothing_is_left();
}

async fn adopted(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let pid = machine.pid();
    drop(machine);
    let adopt = || bench.vmm.adopt(&bench.spec.id, &bench.spec.run_dir);
    let machine = adopt().await.unwrap().expect("it runs");
    assert_eq!(
        (machine.pid(), machine.state().await.unwrap()),
        (pid, MachineState::Running)
    );
    machine.pause().await.unwrap();
    drop(machine);
    let machine = adopt().await.unwrap().expect("it runs");
    assert_eq!(machine.state().await.unwrap(), MachineState::Paused);
    machine.resize_root(Bytes::from_mib(32)).await.unwrap();
    assert_eq!(machine.kill().await.unwrap(), ExitReason::Killed);
    drop(machine);
    assert!(adopt().await.unwrap().is_none());
    bench.nothing_is_left();
}

async fn held_once(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let second = bench.vmm.launch(&bench.spec).await.err().expect("it runs already");
    assert!(matches!(second, Error::Running { .. }), "{second}");
    let third = bench.vmm.adopt(&bench.spec.id, &bench.spec.run_dir).await.err();
    assert!(matches!(third, Some(Error::Running { .. })), "{third:?}");
    let fourth = bench.vmm.put_down(&bench.spec.id, &bench.spec.run_dir).await.err();
    assert!(matches!(fourth, Some(Error::Running { .. })), "{fourth:?}");
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    machine.kill().await.unwrap();
}

async fn put_down(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    signal(machine.pid(), Signal::STOP);
    drop(machine);
    let put_down = || bench.vmm.put_down(&bench.spec.id, &bench.spec.run_dir);
    assert!(put_down().await.unwrap());
    bench.nothing_is_left();
    assert!(!put_down().await.unwrap());
}

async fn failed_launch(bench: Bench) {
    // The process is there when it finds out that its kernel is none.
    std::fs::write(&bench.spec.kernel, b"\x7fELF and nothing else").unwrap();
    let refusal = bench.vmm.launch(&bench.spec).await.err().expect("no kernel");
    assert!(matches!(refusal, Error::Launch { .. }), "{refusal}");
    bench.nothing_is_left();
}

async fn crashed(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    signal(machine.pid(), Signal::KILL);
    let reason = timeout(PATIENCE, machine.exited()).await.unwrap();
    let ExitReason::Crashed { detail } = reason else {
        panic!("{reason:?}");
    };
    assert!(detail.contains("killed by signal 9"), "{detail}");
    bench.nothing_is_left();
}

async fn deaf_guest(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    machine.pause().await.unwrap();
    let reason = machine.stop(Duration::from_millis(200)).await.unwrap();
    assert_eq!(reason, ExitReason::Killed);
    bench.nothing_is_left();
}

async fn interrupted(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    drop(machine);
    // As if the daemon had died between the start of the process and its record.
    std::fs::remove_file(bench.spec.run_dir.join("machine.json")).unwrap();
    let found = bench.vmm.adopt(&bench.spec.id, &bench.spec.run_dir).await.unwrap();
    assert!(found.is_none());
    bench.nothing_is_left();
}

async fn console_recorded(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    until("the guest's first words", || bench.lab.console().contains("up")).await;
    machine.kill().await.unwrap();
    File::open(&bench.spec.console_log).unwrap();
}

async fn own_account(mut bench: Bench) {
    let account = RunAs {
        uid: 1_900_000_001,
        gid: 1_900_000_001,
    };
    bench.spec.run_as = Some(account);
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    until("the account to be dropped", || {
        status_line(&*machine, "Uid") == vec![account.uid.to_string(); 4].join(" ")
    })
    .await;
    assert_eq!(status_line(&*machine, "CapEff"), "0000000000000000");
    if bench.vmm.name() == "firecracker" {
        let root = PathBuf::from(format!("/proc/{}/root", machine.pid()));
        let there = ["disk", "kernel", "seed", "api.sock"].map(|name| root.join(name).exists());
        let elsewhere = ["etc", "proc", "usr", "home"].map(|name| root.join(name).exists());
        assert_eq!((there, elsewhere), ([true; 4], [false; 4]));
    }
    machine.pause().await.unwrap();
    machine.resume().await.unwrap();
    machine.resize_root(Bytes::from_mib(32)).await.unwrap();
    drop(machine);
    let adopted = bench.vmm.adopt(&bench.spec.id, &bench.spec.run_dir).await.unwrap();
    adopted.expect("it runs").kill().await.unwrap();
    bench.nothing_is_left();
}

async fn no_agent(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    match timeout(PATIENCE, machine.agent()).await.unwrap() {
        // A serial port takes every client, and nobody speaks there.
        Ok(mut stream) => {
            stream.write_all(b"{\"execute\":\"guest-ping\"}\n").await.unwrap();
            let silence = timeout(Duration::from_millis(300), stream.read_u8()).await;
            assert!(silence.is_err(), "{silence:?}");
        }
        Err(error) => assert!(matches!(error, Error::Agent { .. }), "{error}"),
    }
    machine.kill().await.unwrap();
    assert!(matches!(machine.agent().await, Err(Error::Agent { .. })));
}

/// A machine launched by one driver is neither adopted nor taken for dead by the other.
#[tokio::test]
async fn a_machine_of_another_driver_is_left_alone() {
    let [qemu, _, firecracker] = candidates();
    let jails = firecracker.jails;
    let (Ok(qemu), Ok(firecracker)) = (qemu.driver, &firecracker.driver) else {
        println!("not run: {}", firecracker.driver.err().unwrap_or_default());
        return;
    };
    let bench = bench(&qemu, jails.path());
    let machine = qemu.launch(&bench.spec).await.unwrap();
    let pid = machine.pid();
    drop(machine);
    let refusal = firecracker.adopt(&bench.spec.id, &bench.spec.run_dir).await.err();
    assert!(matches!(refusal, Some(Error::Foreign { .. })), "{refusal:?}");
    let machine = qemu.adopt(&bench.spec.id, &bench.spec.run_dir).await.unwrap().unwrap();
    assert_eq!(machine.pid(), pid);
    machine.kill().await.unwrap();
}
