//! Checks the guarantees of the traits with every driver.
//!
//! Prints a table with the outcome of each test and driver: passed, failed, or the reason why it
//! could not run here. Needs root, for taps and jails, except for the simulated driver.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests are not in a `cfg(test)`"
)]

#[path = "support/linux.rs"]
mod linux;
mod support;

use futures::FutureExt;
use futures::future::BoxFuture;
use linux::{HOSTNAME, command, connect, in_a_terminal, read, run_in};
use rustix::process::Signal;
use scalebox_agent_api::StartExec;
use scalebox_guest::{PutFile, Upload};
use scalebox_testkit::{SimQga, SimVmm};
use scalebox_units::{Bytes, DiskLocation};
use scalebox_vmm::{
    Accel, AccelSetting, Channel, DiskLimits, Error, ExitReason, FirecrackerDriver, MachineEvent, MachineSpec,
    MachineState, QemuDriver, RunAs, Vmm, accelerator,
};
use std::fs::{self, File};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::guest::Guest;
use support::{Lab, TEST_TIMEOUT, processes_with, signal, status_line, until};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// A driver, a lab and a machine that has not been launched, for one test.
struct Bench {
    lab: Lab,
    vmm: Arc<dyn Vmm>,
    jails: PathBuf,
    spec: MachineSpec,
}

/// The requirements of a test, besides the traits.
#[derive(Clone, Copy, PartialEq)]
enum Needs {
    /// The test uses the traits only, so that it also runs with the simulated driver.
    Traits,
    /// A process of the host.
    Process,
    /// Guests that actually run.
    Guest,
}

type Test = (&'static str, Needs, fn(Bench) -> BoxFuture<'static, ()>);

const TESTS: &[Test] = &[
    ("launch, kill, no leftovers", Needs::Process, |bench| {
        launched_and_killed(bench).boxed()
    }),
    ("pause and resume, twice each", Needs::Traits, |bench| {
        paused_and_resumed(bench).boxed()
    }),
    ("disks grow live and never shrink", Needs::Traits, |bench| {
        grown(bench).boxed()
    }),
    ("I/O limits change live", Needs::Traits, |bench| limited(bench).boxed()),
    ("adopt, then control", Needs::Traits, |bench| adopted(bench).boxed()),
    ("one holder at a time", Needs::Traits, |bench| held_once(bench).boxed()),
    ("force stop without a holder", Needs::Process, |bench| {
        force_stopped(bench).boxed()
    }),
    ("a failed launch leaves nothing", Needs::Process, |bench| {
        failed_launch(bench).boxed()
    }),
    ("death of the process is a crash", Needs::Process, |bench| {
        crashed(bench).boxed()
    }),
    ("deaf guest is killed after grace", Needs::Traits, |bench| {
        deaf_guest(bench).boxed()
    }),
    ("an interrupted launch is undone", Needs::Process, |bench| {
        interrupted(bench).boxed()
    }),
    ("the console is recorded", Needs::Guest, |bench| {
        console_recorded(bench).boxed()
    }),
    ("own account, no capabilities", Needs::Process, |bench| {
        own_account(bench).boxed()
    }),
    ("a missing agent blocks no one", Needs::Traits, |bench| {
        no_agent(bench).boxed()
    }),
    ("older machines lack the agent's socket", Needs::Traits, |bench| {
        no_socket_of_the_agent(bench).boxed()
    }),
    ("exec in a booted guest", Needs::Guest, |bench| {
        exec_in_guest(bench).boxed()
    }),
    ("files in a booted guest", Needs::Guest, |bench| {
        files_in_guest(bench).boxed()
    }),
    ("a command outlives its holder", Needs::Guest, |bench| {
        exec_after_adoption(bench).boxed()
    }),
];

/// A driver, or the reason why it cannot be used on this host, with or without guests.
struct Candidate {
    name: &'static str,
    driver: Result<Arc<dyn Vmm>, String>,
    guests: Result<(), String>,
    /// The folder of jails, on the same file system as the lab's disks.
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
    let firecracker_jails = jails();
    let firecracker =
        kvm.and_then(|_| FirecrackerDriver::find(firecracker_jails.path()).map_err(|error| error.to_string()));
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
            jails: firecracker_jails,
        },
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_driver_keeps_the_guarantees_of_the_traits() {
    let (mut table, mut failed) = (Vec::new(), 0);
    for candidate in candidates() {
        for (name, needs, test) in TESTS {
            let possible = match needs {
                Needs::Traits | Needs::Process => &Ok(()),
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

/// Checks the simulated driver, without root.
#[tokio::test]
async fn the_simulated_driver_keeps_them_as_well() {
    let sim = SimVmm::new();
    sim.set_guest(|guest| (guest.shutdown_time, guest.qga) = (None, SimQga::Silent));
    let vmm: Arc<dyn Vmm> = Arc::new(sim);
    let tests = TESTS.iter().filter(|(_, needs, _)| *needs == Needs::Traits);
    for (name, _, test) in tests {
        println!("{name}");
        let (lab, jails) = (Lab::without_tap(), tempfile::tempdir().unwrap());
        test(bench_in(lab, &vmm, jails.path())).await;
    }
}

fn bench(vmm: &Arc<dyn Vmm>, jails: &Path) -> Bench {
    bench_in(Lab::new(), vmm, jails)
}

fn bench_in(lab: Lab, vmm: &Arc<dyn Vmm>, jails: &Path) -> Bench {
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
    fn assert_no_leftovers(&self) {
        assert!(processes_with(self.spec.id.as_str()).is_empty());
        assert!(!self.spec.run_dir.exists());
        assert_eq!(jails_in(&self.jails), Vec::<PathBuf>::new());
        // The tap and the disk belong to the caller.
        assert!(self.lab.path("root").exists());
    }
}

/// Returns the machines' folders, which are below those named after their program.
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
    bench.assert_no_leftovers();
}

async fn paused_and_resumed(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let mut events = machine.events();
    for _ in 0..2 {
        machine.pause().await.unwrap();
        assert_eq!(machine.state().await.unwrap(), MachineState::Paused);
    }
    assert_eq!(
        timeout(TEST_TIMEOUT, events.recv()).await.unwrap().unwrap(),
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
    let error = machine.resize_root(Bytes::from_mib(32)).await.unwrap_err();
    assert!(matches!(error, Error::Spec { what: "size", .. }), "{error}");
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
    bench.assert_no_leftovers();
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
    bench.assert_no_leftovers();
}

async fn held_once(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let second = bench.vmm.launch(&bench.spec).await.err().expect("it runs already");
    assert!(matches!(second, Error::Running { .. }), "{second}");
    let third = bench.vmm.adopt(&bench.spec.id, &bench.spec.run_dir).await.err();
    assert!(matches!(third, Some(Error::Running { .. })), "{third:?}");
    let fourth = bench.vmm.force_stop(&bench.spec.id, &bench.spec.run_dir).await.err();
    assert!(matches!(fourth, Some(Error::Running { .. })), "{fourth:?}");
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    machine.kill().await.unwrap();
}

async fn force_stopped(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    signal(machine.pid(), Signal::STOP);
    drop(machine);
    let force_stop = || bench.vmm.force_stop(&bench.spec.id, &bench.spec.run_dir);
    assert!(force_stop().await.unwrap());
    bench.assert_no_leftovers();
    assert!(!force_stop().await.unwrap());
}

async fn failed_launch(bench: Bench) {
    // The process is already running when it detects that its kernel is invalid.
    std::fs::write(&bench.spec.kernel, b"\x7fELF and nothing else").unwrap();
    let error = bench.vmm.launch(&bench.spec).await.err().expect("an invalid kernel");
    assert!(matches!(error, Error::Launch { .. }), "{error}");
    bench.assert_no_leftovers();
}

async fn crashed(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    signal(machine.pid(), Signal::KILL);
    let reason = timeout(TEST_TIMEOUT, machine.exited()).await.unwrap();
    let ExitReason::Crashed { detail } = reason else {
        panic!("{reason:?}");
    };
    assert!(detail.contains("killed by signal 9"), "{detail}");
    bench.assert_no_leftovers();
}

async fn deaf_guest(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    machine.pause().await.unwrap();
    let reason = machine.stop(Duration::from_millis(200)).await.unwrap();
    assert_eq!(reason, ExitReason::Killed);
    bench.assert_no_leftovers();
}

async fn interrupted(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    drop(machine);
    // This is the state after the daemon died between the start of the process and its record.
    std::fs::remove_file(bench.spec.run_dir.join("machine.json")).unwrap();
    let found = bench.vmm.adopt(&bench.spec.id, &bench.spec.run_dir).await.unwrap();
    assert!(found.is_none());
    bench.assert_no_leftovers();
}

async fn console_recorded(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    until("the guest's first output", || bench.lab.console().contains("up")).await;
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
    bench.assert_no_leftovers();
}

async fn no_agent(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    for channel in [Channel::Qga, Channel::Agent] {
        match timeout(TEST_TIMEOUT, machine.channel(channel)).await.unwrap() {
            // A serial port accepts every client, but no program responds.
            Ok(mut stream) => {
                stream.write_all(b"{\"execute\":\"guest-ping\"}\n").await.unwrap();
                let silence = timeout(Duration::from_millis(300), stream.read_u8()).await;
                assert!(silence.is_err(), "{silence:?}");
            }
            Err(error) => assert!(matches!(error, Error::Agent { .. }), "{error}"),
        }
    }
    machine.kill().await.unwrap();
    for channel in [Channel::Qga, Channel::Agent] {
        assert!(matches!(machine.channel(channel).await, Err(Error::Agent { .. })));
    }
}

/// Tests a machine without the socket of our own agent, as an earlier release launched it.
async fn no_socket_of_the_agent(bench: Bench) {
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let _ = fs::remove_file(bench.spec.run_dir.join("scalebox.sock"));
    drop(machine);
    let machine = bench.vmm.adopt(&bench.spec.id, &bench.spec.run_dir).await.unwrap();
    let machine = machine.expect("it runs");
    let refused = timeout(TEST_TIMEOUT, machine.channel(Channel::Agent)).await.unwrap();
    assert!(matches!(refused, Err(Error::Agent { .. })), "{:?}", refused.err());
    machine.pause().await.unwrap();
    machine.resume().await.unwrap();
    machine.kill().await.unwrap();
    bench.assert_no_leftovers();
}

async fn exec_in_guest(mut bench: Bench) {
    linux::boot(&bench.lab, &mut bench.spec);
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let agent = connect(&*machine).await;
    let split = "hostname; echo err >&2; exit 7";
    let (written, code) = run_in(&agent, command("exec-000000000001", split)).await;
    assert_eq!(
        (written.stdout, written.stderr),
        (format!("{HOSTNAME}\n"), "err\n".into())
    );
    assert_eq!(code, Some(7));

    let typed = StartExec {
        stdin: true,
        ..command("exec-000000000002", "cat; exit 3")
    };
    agent.start_exec(&typed).await.unwrap();
    let megabyte = "x".repeat(1 << 20);
    let sent = agent.write_stdin(&typed.id, Upload::bytes(megabyte.clone()), true);
    let (sent, back) = tokio::join!(sent, read(&agent, &typed.id, 0, usize::MAX));
    sent.unwrap();
    assert!(back.stdout == megabyte, "{} bytes", back.stdout.len());

    let shown = in_a_terminal(command("exec-000000000003", "stty size; sleep 1000"), 31, 97);
    agent.start_exec(&shown).await.unwrap();
    assert_eq!(read(&agent, &shown.id, 0, 1).await.stdout, "31 97\r\n");
    agent
        .write_stdin(&shown.id, Upload::bytes("\x03"), false)
        .await
        .unwrap();
    read(&agent, &shown.id, 0, usize::MAX).await;
    let status = agent.exec(&shown.id).await.unwrap();
    assert_eq!(status.end.unwrap().signal, Some(2), "Ctrl-C");
    machine.kill().await.unwrap();
    bench.assert_no_leftovers();
}

async fn files_in_guest(mut bench: Bench) {
    linux::boot(&bench.lab, &mut bench.spec);
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let agent = connect(&*machine).await;
    let content: Vec<u8> = (0..4 << 20).map(|at: u32| (at % 251) as u8).collect();
    let put = PutFile {
        mode: Some(0o640),
        parents: true,
        ..PutFile::default()
    };
    let path = b"/srv/folder/file";
    agent
        .write_file(path, &put, Upload::bytes(content.clone()))
        .await
        .unwrap();
    let (head, mut download) = agent.read_file(path).await.unwrap();
    assert_eq!((head.mode, head.size), (0o640, content.len() as u64));
    let mut back = Vec::new();
    while let Some(piece) = download.next().await {
        back.extend(piece.unwrap());
    }
    assert!(back == content, "the content differs");
    let listing = agent.list(b"/srv/folder").await.unwrap();
    assert_eq!(listing.entries.len(), 1);
    let missing = agent.read_file(b"/srv/missing").await.err().unwrap();
    assert!(missing.is_refusal(), "{missing}");

    // The disk grows under the guest, and the agent grows the file system.
    machine.resize_root(Bytes::from_mib(64)).await.unwrap();
    let resized = Instant::now();
    // The kernel reads the new size when it handles the device's interrupt.
    while agent.grow().await.unwrap().total < 48 << 20 {
        assert!(resized.elapsed() < TEST_TIMEOUT, "the file system does not grow");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    agent.freeze().await.unwrap();
    agent.thaw().await.unwrap();
    agent.sync(TEST_TIMEOUT).await.unwrap();
    // The agent is process 1, and obeys QEMU's power button. Firecracker has only Ctrl+Alt+Del, for
    // which this guest has no keyboard driver, so the agent is asked as well, as the daemon does.
    let asked = async {
        if bench.vmm.name() == "firecracker" {
            // The guest may end before it has responded.
            let _ = agent.shut_down(true).await;
        }
    };
    let (ended, ()) = tokio::join!(machine.stop(TEST_TIMEOUT), asked);
    assert_eq!(ended.unwrap(), ExitReason::GuestShutdown);
    bench.assert_no_leftovers();
}

/// Checks that the next holder of a machine continues the output of a command at its offset.
async fn exec_after_adoption(mut bench: Bench) {
    linux::boot(&bench.lab, &mut bench.spec);
    let machine = bench.vmm.launch(&bench.spec).await.unwrap();
    let agent = connect(&*machine).await;
    let count = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo line $i; sleep 0.05; done";
    let exec = command("exec-000000000001", count);
    agent.start_exec(&exec).await.unwrap();
    let before = read(&agent, &exec.id, 0, 10).await;
    agent.close();
    drop((agent, machine));

    let machine = bench.vmm.adopt(&bench.spec.id, &bench.spec.run_dir).await.unwrap();
    let machine = machine.expect("it runs");
    let agent = connect(&*machine).await;
    let after = read(&agent, &exec.id, before.end, usize::MAX).await;
    let expected: String = (1..=100).map(|number| format!("line {number}\n")).collect();
    assert_eq!([before.stdout, after.stdout].concat(), expected);
    let status = agent.exec(&exec.id).await.unwrap();
    assert_eq!(status.end.unwrap().exit_code, Some(0));
    machine.kill().await.unwrap();
    bench.assert_no_leftovers();
}

/// Checks that a driver neither adopts a machine of another driver nor considers it dead.
#[tokio::test]
async fn machines_of_other_drivers_are_not_touched() {
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
    let error = firecracker.adopt(&bench.spec.id, &bench.spec.run_dir).await.err();
    assert!(matches!(error, Some(Error::Foreign { .. })), "{error:?}");
    let machine = qemu.adopt(&bench.spec.id, &bench.spec.run_dir).await.unwrap().unwrap();
    assert_eq!(machine.pid(), pid);
    machine.kill().await.unwrap();
}
