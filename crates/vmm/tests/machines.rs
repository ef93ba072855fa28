//! Tests with real, emulated QEMU processes, whose guests are a few dozen bytes long (see
//! `support/guest.rs`). Needs root, for taps and mounts.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests are not in a `cfg(test)`"
)]

mod support;

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::process::Signal;
use scalebox_units::{Bytes, DiskLocation};
use scalebox_vmm::{CONSOLE_LIMIT, Error, ExitReason, Machine, MachineEvent, MachineSpec, MachineState, RunAs, Vmm};
use std::ffi::CString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::guest::Guest;
use support::{Lab, TEST_TIMEOUT, die, processes_with, signal, status_line, until};
use tokio::sync::broadcast::Receiver;
use tokio::time::timeout;

async fn adopt(lab: &Lab, spec: &MachineSpec) -> Option<Arc<dyn Machine>> {
    lab.driver.adopt(&spec.id, &spec.run_dir).await.unwrap()
}

async fn wait_for(events: &mut Receiver<MachineEvent>, wanted: impl Fn(&MachineEvent) -> bool) -> MachineEvent {
    let receiving = async {
        loop {
            let event = events.recv().await.unwrap();
            if wanted(&event) {
                return event;
            }
        }
    };
    timeout(TEST_TIMEOUT, receiving).await.unwrap()
}

#[tokio::test]
async fn a_machine_runs_until_its_guest_is_asked_to_shut_down() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Obedient);
    let machine = lab.driver.launch(&spec).await.unwrap();
    lab.wait_for_console("up\n").await;
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    assert_eq!(
        status_line(&*machine, "Name"),
        spec.id.as_str(),
        "ps shows which machine it is"
    );

    let mut events = machine.events();
    assert_eq!(machine.stop(TEST_TIMEOUT).await.unwrap(), ExitReason::GuestShutdown);
    wait_for(&mut events, |event| *event == MachineEvent::GuestShutdown).await;
    wait_for(&mut events, |event| {
        *event == MachineEvent::Ended(ExitReason::GuestShutdown)
    })
    .await;

    assert_eq!(machine.exited().await, ExitReason::GuestShutdown);
    assert_eq!(
        machine.kill().await.unwrap(),
        ExitReason::GuestShutdown,
        "killing an ended machine changes nothing"
    );
    assert_eq!(
        machine.state().await.unwrap(),
        MachineState::Ended(ExitReason::GuestShutdown)
    );
    assert!(matches!(machine.pause().await, Err(Error::Ended { .. })));
    assert!(!spec.run_dir.exists());
}

/// Makes a QEMU without a holder open a file, as a guest that has broken into it could. Returns
/// QEMU's response.
fn open_in_qemu(spec: &MachineSpec, node: &str, file: &std::path::Path) -> String {
    let mut control = BufReader::new(UnixStream::connect(spec.run_dir.join("control.sock")).unwrap());
    let open = format!(
        r#"{{"execute": "blockdev-add", "arguments": {{"driver": "file", "node-name": "{node}", "read-only": true, "filename": "{}"}}}}"#,
        file.display()
    );
    let mut answer = String::new();
    control.read_line(&mut answer).unwrap();
    for command in [r#"{"execute": "qmp_capabilities"}"#, &open] {
        writeln!(control.get_mut(), "{command}").unwrap();
        answer.clear();
        control.read_line(&mut answer).unwrap();
    }
    answer
}

#[tokio::test]
async fn a_root_hypervisor_can_open_only_its_own_files() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    fs::write(lab.path("another-disk"), "readable by all").unwrap();
    // The machine is dropped, so that its control socket is free.
    drop(lab.driver.launch(&spec).await.unwrap());
    let ask = async |node: String, file: PathBuf| {
        let spec = spec.clone();
        // The call is not on the runtime's thread, which still has to close the dropped connection.
        let asked = tokio::task::spawn_blocking(move || open_in_qemu(&spec, &node, &file));
        timeout(TEST_TIMEOUT, asked).await.unwrap().unwrap()
    };
    let own = ask("own".into(), spec.seed.clone()).await;
    assert!(own.contains("return"), "{own}");
    let others = [lab.path("another-disk"), "/etc/passwd".into(), "/proc/1/cmdline".into()];
    for (n, file) in others.into_iter().enumerate() {
        let denied = ask(format!("other{n}"), file.clone()).await;
        // Depends on Landlock, which these machines have; without it the account decides.
        assert!(denied.contains("Permission denied"), "{}: {denied}", file.display());
    }
    assert!(lab.driver.force_stop(&spec.id, &spec.run_dir).await.unwrap());
}

/// Returns the control groups of a machine.
fn groups(machine: &dyn Machine) -> Vec<PathBuf> {
    let listed = fs::read_to_string(format!("/proc/{}/cgroup", machine.pid())).unwrap();
    let of_machine = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let folder = PathBuf::from("/sys/fs/cgroup").join(controllers);
        path.contains("/scalebox/")
            .then(|| folder.join(path.trim_start_matches('/')))
    };
    listed.lines().filter_map(of_machine).collect()
}

#[tokio::test]
async fn memory_and_cpu_are_limited_and_the_groups_are_removed() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let machine = lab.driver.launch(&spec).await.unwrap();
    let groups = groups(&*machine);
    assert!(!groups.is_empty(), "these machines have control groups");
    let read = |file: &str| {
        let found = groups
            .iter()
            .find_map(|group| fs::read_to_string(group.join(file)).ok());
        found.map(|text| text.trim().to_owned())
    };
    // The guest's 64 MiB, QEMU's 256 and 256 for its cache of translated code; one and a quarter
    // CPUs.
    let memory = read("memory.max").or_else(|| read("memory.limit_in_bytes")).unwrap();
    assert_eq!(memory, (576u64 << 20).to_string());
    let cpu = read("cpu.max").or_else(|| read("cpu.cfs_quota_us")).unwrap();
    assert!(cpu.starts_with("125000"), "{cpu}");
    machine.kill().await.unwrap();
    assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");

    // The groups of a machine without a holder are removed with its other files.
    let machine = lab.driver.launch(&spec).await.unwrap();
    let groups = self::groups(&*machine);
    drop(machine);
    assert!(lab.driver.force_stop(&spec.id, &spec.run_dir).await.unwrap());
    assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");
}

#[tokio::test]
async fn a_machine_can_be_relaunched_as_soon_as_its_end_is_known() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let first = lab.driver.launch(&spec).await.unwrap();
    first.kill().await.unwrap();
    let second = lab.driver.launch(&spec).await.unwrap();
    assert_eq!(second.state().await.unwrap(), MachineState::Running);
    second.kill().await.unwrap();
}

#[tokio::test]
async fn an_unresponsive_guest_is_killed_after_its_grace_period() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Deaf)).await.unwrap();
    lab.wait_for_console("up\n").await;
    let grace = Duration::from_millis(300);
    let start = Instant::now();
    assert_eq!(machine.stop(grace).await.unwrap(), ExitReason::Killed);
    assert!(start.elapsed() >= grace);
}

#[tokio::test]
async fn a_paused_guest_is_resumed_to_shut_down() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Obedient)).await.unwrap();
    machine.pause().await.unwrap();
    assert_eq!(machine.stop(TEST_TIMEOUT).await.unwrap(), ExitReason::GuestShutdown);
}

#[tokio::test]
async fn qemu_executes_pause_resume_and_grow() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Chatty);
    let machine = lab.driver.launch(&spec).await.unwrap();
    let mut events = machine.events();

    machine.pause().await.unwrap();
    machine.pause().await.unwrap();
    assert_eq!(machine.state().await.unwrap(), MachineState::Paused);
    wait_for(&mut events, |event| *event == MachineEvent::Stopped).await;

    // The pool grows the file first and then the device; here, the device alone grows at last.
    fs::File::options()
        .write(true)
        .open(lab.path("root"))
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    machine.resize_root(Bytes::from_mib(32)).await.unwrap();
    machine.resize_root(Bytes::from_mib(64)).await.unwrap();
    assert_eq!(lab.path("root").metadata().unwrap().len(), 64 << 20);

    machine.resume().await.unwrap();
    machine.resume().await.unwrap();
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    wait_for(&mut events, |event| *event == MachineEvent::Resumed).await;

    for smaller in [Bytes::from_mib(63), Bytes::ZERO] {
        let error = machine.resize_root(smaller).await.unwrap_err();
        assert!(error.to_string().contains("cannot shrink"), "{error}");
    }
    assert!(
        machine.resize_root(Bytes::new((64 << 20) + 1)).await.is_err(),
        "not a multiple of the sector size"
    );
    assert_eq!(lab.path("root").metadata().unwrap().len(), 64 << 20);
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_concurrent_growths_end_at_the_largest_size() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Deaf)).await.unwrap();
    let grown = (1..=10).map(|step| {
        let machine = machine.clone();
        tokio::spawn(async move { machine.resize_root(Bytes::from_mib(16 + (step * 7) % 11)).await })
    });
    for result in futures::future::join_all(grown).await {
        match result.unwrap() {
            Ok(()) | Err(Error::Spec { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(lab.path("root").metadata().unwrap().len(), 26 << 20);
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn a_machine_outlives_the_process_that_launched_it() {
    if let Some(lab) = Lab::inherited() {
        let machine = lab.driver.launch(&lab.spec(Guest::Chatty)).await.unwrap();
        assert_eq!(machine.state().await.unwrap(), MachineState::Running);
        die();
    }
    let lab = Lab::new();
    lab.in_a_process_that_dies("a_machine_outlives_the_process_that_launched_it");
    let spec = lab.spec(Guest::Chatty);
    let recorded = lab.console().len();

    let machine = adopt(&lab, &spec).await.expect("it runs");
    assert_eq!(processes_with(spec.id.as_str()), [machine.pid()]);
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    until("the console to be recorded again", || lab.console().len() > recorded).await;
    machine.resize_root(Bytes::from_mib(20)).await.unwrap();
    assert_eq!(machine.stop(TEST_TIMEOUT).await.unwrap(), ExitReason::GuestShutdown);
    assert!(!spec.run_dir.exists());
}

#[tokio::test]
async fn a_guest_shutdown_without_a_holder_is_reported_later() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Obedient);
    let machine = lab.driver.launch(&spec).await.unwrap();
    lab.wait_for_console("up\n").await;
    drop(machine);
    let pressed = spec.clone();
    tokio::task::spawn_blocking(move || power_button(&pressed))
        .await
        .unwrap();

    let machine = adopt(&lab, &spec).await.expect("its process waits for quit");
    assert_eq!(machine.exited().await, ExitReason::GuestShutdown);
    assert!(processes_with(spec.id.as_str()).is_empty());
}

/// Presses the power button and waits until the guest has obeyed, bypassing the crate.
fn power_button(spec: &MachineSpec) {
    let mut control = UnixStream::connect(spec.run_dir.join("control.sock")).unwrap();
    control.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    control
        .write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"system_powerdown\"}")
        .unwrap();
    let lines = BufReader::new(control).lines().map(Result::unwrap);
    lines.take_while(|line| !line.contains("\"STOP\"")).for_each(drop);
}

#[tokio::test]
async fn adopting_a_dead_machine_cleans_up() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let machine = lab.driver.launch(&spec).await.unwrap();
    let pid = machine.pid();
    drop(machine);
    signal(pid, Signal::KILL);
    until("the process to be gone", || processes_with(spec.id.as_str()).is_empty()).await;
    assert!(spec.run_dir.join("control.sock").exists());

    assert!(adopt(&lab, &spec).await.is_none());
    assert!(!spec.run_dir.exists());
    assert!(adopt(&lab, &spec).await.is_none(), "a second time");
}

#[tokio::test]
async fn adopting_undoes_an_interrupted_launch() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let machine = lab.driver.launch(&spec).await.unwrap();
    drop(machine);
    // This is the state after the daemon died between the start of the process and its record.
    fs::remove_file(spec.run_dir.join("machine.json")).unwrap();

    assert!(adopt(&lab, &spec).await.is_none());
    assert!(processes_with(spec.id.as_str()).is_empty());
    assert!(!spec.run_dir.exists());
}

#[tokio::test]
async fn a_record_with_another_pid_kills_no_process() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let machine = lab.driver.launch(&spec).await.unwrap();
    drop(machine);
    let record = spec.run_dir.join("machine.json");
    let text = fs::read_to_string(&record).unwrap();
    let bystander = Bystander::new();
    let (pid, other) = (processes_with(spec.id.as_str())[0], bystander.0.id());
    fs::write(
        &record,
        text.replace(&format!("\"pid\":{pid}"), &format!("\"pid\":{other}")),
    )
    .unwrap();

    assert!(adopt(&lab, &spec).await.is_none());
    assert!(bystander.is_alive());
}

#[tokio::test]
async fn a_hung_machine_can_be_force_stopped() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let machine = lab.driver.launch(&spec).await.unwrap();
    let pid = machine.pid();
    drop(machine);
    signal(pid, Signal::STOP);
    match lab.driver.adopt(&spec.id, &spec.run_dir).await {
        Err(Error::Hung { .. }) => {}
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("adopted a process that is stopped"),
    }
    // The machine was left unchanged, so that a machine that is only slow can be adopted later.
    signal(pid, Signal::CONT);
    let machine = adopt(&lab, &spec).await.expect("it runs again");
    assert_eq!(
        (machine.pid(), machine.state().await.unwrap()),
        (pid, MachineState::Running)
    );
    drop(machine);

    signal(pid, Signal::STOP);
    assert!(force_stop(&lab, &spec).await);
    assert!(processes_with(spec.id.as_str()).is_empty());
    assert!(!spec.run_dir.exists());
    assert!(!force_stop(&lab, &spec).await, "nothing is left");
    assert!(!spec.run_dir.exists());
}

/// Force-stops the machine, well within the 10 s timeout of a command to the hypervisor.
async fn force_stop(lab: &Lab, spec: &MachineSpec) -> bool {
    let ended = timeout(Duration::from_secs(9), lab.driver.force_stop(&spec.id, &spec.run_dir)).await;
    // The force-stop sends no command to the hypervisor.
    ended.unwrap().unwrap()
}

#[tokio::test]
async fn force_stop_works_without_a_record_or_folder() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    type Lose = fn(&MachineSpec);
    let losses: [Lose; 3] = [
        |spec| fs::remove_file(spec.run_dir.join("machine.json")).unwrap(),
        |spec| fs::write(spec.run_dir.join("machine.json"), "{").unwrap(),
        |spec| fs::remove_dir_all(&spec.run_dir).unwrap(),
    ];
    for lose in losses {
        let machine = lab.driver.launch(&spec).await.unwrap();
        let pid = machine.pid();
        drop(machine);
        signal(pid, Signal::STOP);
        lose(&spec);
        assert!(force_stop(&lab, &spec).await);
        assert!(processes_with(spec.id.as_str()).is_empty());
        assert!(!spec.run_dir.exists());
    }
}

#[tokio::test]
async fn force_stop_never_kills_a_reused_pid() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let record = spec.run_dir.join("machine.json");
    let machine = lab.driver.launch(&spec).await.unwrap();
    let pid = machine.pid();
    drop(machine);
    let text = fs::read_to_string(&record).unwrap();

    // The machine's own process is the bystander here: all facts but one match.
    let mismatches: [(&str, &str, String); 3] = [
        ("start time", "\"started\":", "\"started\":1".into()),
        ("boot", "\"boot_id\":\"", "\"boot_id\":\"0".into()),
        ("arguments", "\"argv\":[", "\"argv\":[\"other\",".into()),
    ];
    for (what, from, to) in &mismatches {
        assert!(text.contains(from), "{what}: {text}");
        fs::write(&record, text.replace(from, to)).unwrap();
        assert!(!force_stop(&lab, &spec).await, "another {what}");
        assert_eq!(processes_with(spec.id.as_str()), [pid], "another {what}");
        fs::create_dir(&spec.run_dir).unwrap();
    }

    // A record with another process' pid.
    let bystander = Bystander::new();
    let other = text.replace(&format!("\"pid\":{pid}"), &format!("\"pid\":{}", bystander.0.id()));
    fs::write(&record, other).unwrap();
    assert!(!force_stop(&lab, &spec).await);
    assert!(bystander.is_alive());
    assert_eq!(processes_with(spec.id.as_str()), [pid]);

    fs::create_dir(&spec.run_dir).unwrap();
    fs::write(&record, text).unwrap();
    assert!(force_stop(&lab, &spec).await, "the original record matches");
    assert!(processes_with(spec.id.as_str()).is_empty());
}

/// An unrelated process, killed on drop.
struct Bystander(std::process::Child);

impl Bystander {
    fn new() -> Bystander {
        Bystander(std::process::Command::new("sleep").arg("600").spawn().unwrap())
    }

    fn is_alive(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        !stat.contains(") Z ")
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        // Errors are ignored: a test checks whether the process has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn force_stop_refuses_a_machine_with_a_holder() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let machine = lab.driver.launch(&spec).await.unwrap();
    match lab.driver.force_stop(&spec.id, &spec.run_dir).await {
        Err(Error::Running { pid, .. }) => assert_eq!(pid, Some(machine.pid())),
        other => panic!("{other:?}"),
    }
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    machine.kill().await.unwrap();
    assert!(!force_stop(&lab, &spec).await);
}

#[tokio::test]
async fn a_running_machine_is_neither_launched_nor_adopted_twice() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let machine = lab.driver.launch(&spec).await.unwrap();
    let pid = machine.pid();
    for attempt in [
        lab.driver.launch(&spec).await.map(Some),
        lab.driver.adopt(&spec.id, &spec.run_dir).await,
    ] {
        match attempt {
            Err(Error::Running { pid: found, .. }) => assert_eq!(found, Some(pid)),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("held twice"),
        }
    }
    drop(machine);
    assert!(
        matches!(lab.driver.launch(&spec).await, Err(Error::Running { .. })),
        "running without a holder"
    );
    assert_eq!(
        adopt(&lab, &spec).await.unwrap().kill().await.unwrap(),
        ExitReason::Killed
    );
}

#[tokio::test]
async fn a_failed_launch_leaves_nothing_and_reports_why() {
    let lab = Lab::new();
    let good = lab.spec(Guest::Deaf);
    let missing = |name: &str| lab.path(name);
    let cases = [
        (
            MachineSpec {
                kernel: missing("no-kernel"),
                ..good.clone()
            },
            "no-kernel",
        ),
        (
            MachineSpec {
                root: DiskLocation::File(missing("no-root")),
                ..good.clone()
            },
            "no-root",
        ),
        (
            MachineSpec {
                seed: missing("no-seed"),
                ..good.clone()
            },
            "no-seed",
        ),
        (
            MachineSpec {
                vcpus: 100_000,
                ..good.clone()
            },
            "100000",
        ),
        (
            MachineSpec {
                nic: scalebox_vmm::Nic {
                    tap: "no-such-tap".into(),
                    ..good.nic.clone()
                },
                ..good.clone()
            },
            "no interface no-such-tap",
        ),
    ];
    for (spec, reason) in cases {
        let error = lab.driver.launch(&spec).await.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(!spec.run_dir.exists(), "{reason}");
        assert!(processes_with(spec.id.as_str()).is_empty(), "{reason}");
    }
    assert!(fs::metadata("/sys/class/net/no-such-tap").is_err());
}

#[tokio::test]
async fn a_cancelled_launch_leaves_nothing() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    for limit in [Duration::ZERO, Duration::from_millis(20)] {
        // The launch may have succeeded in time; a caller that stopped waiting has no machine
        // either way.
        let _ = timeout(limit, lab.driver.launch(&spec)).await.map(drop);
        let gone = || !spec.run_dir.exists() && processes_with(spec.id.as_str()).is_empty();
        until("the cancelled launch to be undone", gone).await;
    }
}

#[tokio::test]
async fn a_crash_is_distinguished_from_a_kill() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Deaf)).await.unwrap();
    signal(machine.pid(), Signal::SEGV);
    let reason = timeout(TEST_TIMEOUT, machine.exited()).await.unwrap();
    assert!(
        matches!(&reason, ExitReason::Crashed { detail } if detail.contains("signal 11")),
        "{reason:?}"
    );
}

#[tokio::test]
async fn termination_by_a_signal_from_outside_is_not_a_crash() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Deaf)).await.unwrap();
    signal(machine.pid(), Signal::TERM);
    assert_eq!(
        timeout(TEST_TIMEOUT, machine.exited()).await.unwrap(),
        ExitReason::Killed
    );
}

#[tokio::test]
async fn a_hung_hypervisor_does_not_block_callers() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Deaf)).await.unwrap();
    signal(machine.pid(), Signal::STOP);
    assert!(matches!(
        timeout(TEST_TIMEOUT, machine.pause()).await.unwrap(),
        Err(Error::Hung { .. })
    ));
    assert_eq!(
        timeout(TEST_TIMEOUT, machine.kill()).await.unwrap().unwrap(),
        ExitReason::Killed
    );
}

#[tokio::test]
async fn a_reboot_restarts_the_guest_in_place() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Restless)).await.unwrap();
    let mut events = machine.events();
    let pid = machine.pid();
    wait_for(&mut events, |event| *event == MachineEvent::GuestReboot).await;
    lab.wait_for_console("up\nup\n").await;
    assert_eq!(
        (machine.state().await.unwrap(), machine.pid()),
        (MachineState::Running, pid)
    );
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chatty_console_stays_bounded() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Chatty)).await.unwrap();
    let (log, older) = (lab.path("console.log"), lab.path("console.log.1"));
    let size = |file: &PathBuf| file.metadata().map_or(0, |meta| meta.len());
    let mut rotations = 0;
    let mut last = 0;
    let start = Instant::now();
    while rotations < 3 {
        assert!(start.elapsed() < TEST_TIMEOUT, "{rotations} rotations");
        let now = size(&log);
        rotations += u32::from(now < last);
        last = now;
        assert!(now + size(&older) <= CONSOLE_LIMIT.as_u64());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(
        machine.stop(TEST_TIMEOUT).await.unwrap(),
        ExitReason::GuestShutdown,
        "the guest never blocks on its console"
    );
}

#[tokio::test]
async fn the_hypervisor_drops_all_unneeded_privileges() {
    let lab = Lab::new();
    let spec = MachineSpec {
        run_as: Some(RunAs {
            uid: 64_321,
            gid: 64_322,
        }),
        ..lab.spec(Guest::Writer)
    };
    let machine = lab.driver.launch(&spec).await.unwrap();
    for (key, value) in [
        ("Uid", "64321 64321 64321 64321"),
        ("Gid", "64322 64322 64322 64322"),
        ("CapEff", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        assert_eq!(status_line(&*machine, key), value, "{key}");
    }
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(spec.run_dir.metadata().unwrap().permissions().mode() & 0o777, 0o700);

    // The machine still works fully.
    lab.wait_for_console("w").await;
    machine.pause().await.unwrap();
    machine.resize_root(Bytes::from_mib(24)).await.unwrap();
    machine.resume().await.unwrap();
    drop(machine);
    let machine = adopt(&lab, &spec).await.unwrap();
    assert_eq!(machine.stop(TEST_TIMEOUT).await.unwrap(), ExitReason::GuestShutdown);
    assert!(!lab.console().contains('E'));
    assert!(!spec.run_dir.exists());
}

#[tokio::test]
async fn a_full_host_stalls_the_guest_without_failing_its_writes() {
    let lab = Lab::new();
    let pool = SmallPool::mount(lab.path("pool"), 4);
    let mut spec = lab.spec(Guest::Writer);
    let root = pool.0.join("root");
    fs::File::create(&root).unwrap().set_len(16 << 20).unwrap();
    spec.root = DiskLocation::File(root);
    let machine = lab.driver.launch(&spec).await.unwrap();
    let mut events = machine.events();

    let event = wait_for(&mut events, |event| matches!(event, MachineEvent::IoError { .. })).await;
    assert!(
        matches!(event, MachineEvent::IoError { nospace: true, .. }),
        "{event:?}"
    );
    wait_for(&mut events, |event| *event == MachineEvent::Stopped).await;
    assert_eq!(machine.state().await.unwrap(), MachineState::Stalled);
    machine.resume().await.unwrap();
    wait_for(&mut events, |event| matches!(event, MachineEvent::IoError { .. })).await;

    pool.grow(32);
    machine.resume().await.unwrap();
    lab.wait_for_console("w.w").await;
    assert!(!lab.console().contains('E'), "no write failed");
    machine.kill().await.unwrap();
}

/// A small tmpfs.
struct SmallPool(PathBuf);

impl SmallPool {
    fn mount(at: PathBuf, mib: u32) -> SmallPool {
        fs::create_dir(&at).unwrap();
        mount("vmm-test", &at, "tmpfs", MountFlags::NODEV, &*size(mib)).unwrap();
        SmallPool(at)
    }

    fn grow(&self, mib: u32) {
        mount_remount(&self.0, MountFlags::NODEV, &*size(mib)).unwrap();
    }
}

impl Drop for SmallPool {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn size(mib: u32) -> CString {
    CString::new(format!("size={mib}M")).unwrap()
}
