//! Real QEMU processes, emulated, with guests of a few dozen bytes (see `support/guest.rs`). Needs
//! root, for taps and mounts.

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
use support::{Lab, PATIENCE, die, processes_with, signal, status_line, until};
use tokio::sync::broadcast::Receiver;
use tokio::time::timeout;

async fn adopt(lab: &Lab, spec: &MachineSpec) -> Option<Arc<dyn Machine>> {
    lab.driver.adopt(&spec.id, &spec.run_dir).await.unwrap()
}

async fn heard(events: &mut Receiver<MachineEvent>, wanted: impl Fn(&MachineEvent) -> bool) -> MachineEvent {
    let listening = async {
        loop {
            let event = events.recv().await.unwrap();
            if wanted(&event) {
                return event;
            }
        }
    };
    timeout(PATIENCE, listening).await.unwrap()
}

#[tokio::test]
async fn a_launched_machine_runs_until_its_guest_is_asked_to_shut_down() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Obedient);
    let machine = lab.driver.launch(&spec).await.unwrap();
    lab.console_says("up\n").await;
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    assert_eq!(
        status_line(&*machine, "Name"),
        spec.id.as_str(),
        "ps shows which machine it is"
    );

    let mut events = machine.events();
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), ExitReason::GuestShutdown);
    heard(&mut events, |event| *event == MachineEvent::GuestShutdown).await;
    heard(&mut events, |event| {
        *event == MachineEvent::Ended(ExitReason::GuestShutdown)
    })
    .await;

    assert_eq!(machine.exited().await, ExitReason::GuestShutdown);
    assert_eq!(
        machine.kill().await.unwrap(),
        ExitReason::GuestShutdown,
        "killing the dead changes nothing"
    );
    assert_eq!(
        machine.state().await.unwrap(),
        MachineState::Ended(ExitReason::GuestShutdown)
    );
    assert!(matches!(machine.pause().await, Err(Error::Ended { .. })));
    assert!(!spec.run_dir.exists());
}

/// Has a QEMU that nobody holds open a file, as a guest that has broken into it could; what it
/// answers.
fn has_opened(spec: &MachineSpec, node: &str, file: &std::path::Path) -> String {
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
async fn a_machine_s_process_opens_its_own_files_and_nobody_else_s_though_it_is_root() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    fs::write(lab.path("another-disk"), "readable by all").unwrap();
    // Nobody holds it, so that its control socket is free.
    drop(lab.driver.launch(&spec).await.unwrap());
    let ask = async |node: String, file: PathBuf| {
        let spec = spec.clone();
        // Beside the runtime, which is still to close the connection that was dropped.
        let asked = tokio::task::spawn_blocking(move || has_opened(&spec, &node, &file));
        timeout(PATIENCE, asked).await.unwrap().unwrap()
    };
    let own = ask("own".into(), spec.seed.clone()).await;
    assert!(own.contains("return"), "{own}");
    let others = [lab.path("another-disk"), "/etc/passwd".into(), "/proc/1/cmdline".into()];
    for (n, file) in others.into_iter().enumerate() {
        let refused = ask(format!("other{n}"), file.clone()).await;
        // A kernel without Landlock leaves it to the account; these machines have it.
        assert!(refused.contains("Permission denied"), "{}: {refused}", file.display());
    }
    assert!(lab.driver.put_down(&spec.id, &spec.run_dir).await.unwrap());
}

/// The control groups of a machine.
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
async fn a_machine_is_bound_in_memory_and_processors_and_its_groups_go_with_it() {
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
    // The guest's 64 MiB, QEMU's 256 and the 256 of its cache of translated code; a processor and a
    // quarter.
    let memory = read("memory.max").or_else(|| read("memory.limit_in_bytes")).unwrap();
    assert_eq!(memory, (576u64 << 20).to_string());
    let cpu = read("cpu.max").or_else(|| read("cpu.cfs_quota_us")).unwrap();
    assert!(cpu.starts_with("125000"), "{cpu}");
    machine.kill().await.unwrap();
    assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");

    // Those of a machine that nobody watched go with what else it left.
    let machine = lab.driver.launch(&spec).await.unwrap();
    let groups = self::groups(&*machine);
    drop(machine);
    assert!(lab.driver.put_down(&spec.id, &spec.run_dir).await.unwrap());
    assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");
}

#[tokio::test]
async fn a_machine_can_be_launched_again_as_soon_as_its_end_is_known() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let first = lab.driver.launch(&spec).await.unwrap();
    first.kill().await.unwrap();
    let second = lab.driver.launch(&spec).await.unwrap();
    assert_eq!(second.state().await.unwrap(), MachineState::Running);
    second.kill().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_does_not_obey_is_killed_when_its_time_is_up() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Deaf)).await.unwrap();
    lab.console_says("up\n").await;
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
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), ExitReason::GuestShutdown);
}

#[tokio::test]
async fn pause_resume_and_grow_are_seen_by_qemu() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Chatty);
    let machine = lab.driver.launch(&spec).await.unwrap();
    let mut events = machine.events();

    machine.pause().await.unwrap();
    machine.pause().await.unwrap();
    assert_eq!(machine.state().await.unwrap(), MachineState::Paused);
    heard(&mut events, |event| *event == MachineEvent::Stopped).await;

    // As the pool does it: the file first, then the device; and the device alone.
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
    heard(&mut events, |event| *event == MachineEvent::Resumed).await;

    for smaller in [Bytes::from_mib(63), Bytes::ZERO] {
        let refusal = machine.resize_root(smaller).await.unwrap_err();
        assert!(refusal.to_string().contains("does not get smaller"), "{refusal}");
    }
    assert!(
        machine.resize_root(Bytes::new((64 << 20) + 1)).await.is_err(),
        "half a sector"
    );
    assert_eq!(lab.path("root").metadata().unwrap().len(), 64 << 20);
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn growing_from_ten_sides_at_once_ends_at_the_largest() {
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
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), ExitReason::GuestShutdown);
    assert!(!spec.run_dir.exists());
}

#[tokio::test]
async fn a_guest_that_shuts_down_while_nobody_looks_is_known_to_have_done_so() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Obedient);
    let machine = lab.driver.launch(&spec).await.unwrap();
    lab.console_says("up\n").await;
    drop(machine);
    let pressed = spec.clone();
    tokio::task::spawn_blocking(move || power_button(&pressed))
        .await
        .unwrap();

    let machine = adopt(&lab, &spec).await.expect("its process waits to be asked");
    assert_eq!(machine.exited().await, ExitReason::GuestShutdown);
    assert!(processes_with(spec.id.as_str()).is_empty());
}

/// Presses the button and waits until the guest has obeyed, past the crate.
fn power_button(spec: &MachineSpec) {
    let mut control = UnixStream::connect(spec.run_dir.join("control.sock")).unwrap();
    control.set_read_timeout(Some(PATIENCE)).unwrap();
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
    assert!(adopt(&lab, &spec).await.is_none(), "and again");
}

#[tokio::test]
async fn a_launch_that_was_interrupted_is_undone_by_adoption() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let machine = lab.driver.launch(&spec).await.unwrap();
    drop(machine);
    // As if the daemon had died between the start of the process and its record.
    fs::remove_file(spec.run_dir.join("machine.json")).unwrap();

    assert!(adopt(&lab, &spec).await.is_none());
    assert!(processes_with(spec.id.as_str()).is_empty());
    assert!(!spec.run_dir.exists());
}

#[tokio::test]
async fn a_record_that_names_another_process_kills_nobody() {
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
    assert!(bystander.lives());
}

#[tokio::test]
async fn a_hung_machine_can_be_put_down() {
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
    // It was left as it was: had it only been slow, it could still be adopted.
    signal(pid, Signal::CONT);
    let machine = adopt(&lab, &spec).await.expect("it runs again");
    assert_eq!(
        (machine.pid(), machine.state().await.unwrap()),
        (pid, MachineState::Running)
    );
    drop(machine);

    signal(pid, Signal::STOP);
    assert!(put_down(&lab, &spec).await);
    assert!(processes_with(spec.id.as_str()).is_empty());
    assert!(!spec.run_dir.exists());
    assert!(!put_down(&lab, &spec).await, "there is nothing left");
    assert!(!spec.run_dir.exists());
}

/// Well within the 10 s that a command to the hypervisor would wait.
async fn put_down(lab: &Lab, spec: &MachineSpec) -> bool {
    let ended = timeout(Duration::from_secs(9), lab.driver.put_down(&spec.id, &spec.run_dir)).await;
    // It asks the hypervisor nothing.
    ended.unwrap().unwrap()
}

#[tokio::test]
async fn an_interrupted_launch_or_a_lost_folder_does_not_save_a_machine_from_being_put_down() {
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
        assert!(put_down(&lab, &spec).await);
        assert!(processes_with(spec.id.as_str()).is_empty());
        assert!(!spec.run_dir.exists());
    }
}

#[tokio::test]
async fn put_down_never_kills_a_recycled_pid() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let record = spec.run_dir.join("machine.json");
    let machine = lab.driver.launch(&spec).await.unwrap();
    let pid = machine.pid();
    drop(machine);
    let text = fs::read_to_string(&record).unwrap();

    // The machine's own process is the bystander here: everything about it is right but one thing.
    let recycled: [(&str, &str, String); 3] = [
        ("start time", "\"started\":", "\"started\":1".into()),
        ("boot", "\"boot_id\":\"", "\"boot_id\":\"0".into()),
        ("arguments", "\"argv\":[", "\"argv\":[\"other\",".into()),
    ];
    for (what, from, to) in &recycled {
        assert!(text.contains(from), "{what}: {text}");
        fs::write(&record, text.replace(from, to)).unwrap();
        assert!(!put_down(&lab, &spec).await, "another {what}");
        assert_eq!(processes_with(spec.id.as_str()), [pid], "another {what}");
        fs::create_dir(&spec.run_dir).unwrap();
    }

    // And another's pid.
    let bystander = Bystander::new();
    let other = text.replace(&format!("\"pid\":{pid}"), &format!("\"pid\":{}", bystander.0.id()));
    fs::write(&record, other).unwrap();
    assert!(!put_down(&lab, &spec).await);
    assert!(bystander.lives());
    assert_eq!(processes_with(spec.id.as_str()), [pid]);

    fs::create_dir(&spec.run_dir).unwrap();
    fs::write(&record, text).unwrap();
    assert!(put_down(&lab, &spec).await, "with the true record it goes");
    assert!(processes_with(spec.id.as_str()).is_empty());
}

/// A process that is none of our business; gone when dropped.
struct Bystander(std::process::Child);

impl Bystander {
    fn new() -> Bystander {
        Bystander(std::process::Command::new("sleep").arg("600").spawn().unwrap())
    }

    fn lives(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        !stat.contains(") Z ")
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        // One that has ended already is told by the test.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_machine_that_is_held_is_not_put_down() {
    let lab = Lab::new();
    let spec = lab.spec(Guest::Deaf);
    let machine = lab.driver.launch(&spec).await.unwrap();
    match lab.driver.put_down(&spec.id, &spec.run_dir).await {
        Err(Error::Running { pid, .. }) => assert_eq!(pid, Some(machine.pid())),
        other => panic!("{other:?}"),
    }
    assert_eq!(machine.state().await.unwrap(), MachineState::Running);
    machine.kill().await.unwrap();
    assert!(!put_down(&lab, &spec).await);
}

#[tokio::test]
async fn a_machine_that_runs_is_neither_launched_nor_adopted_twice() {
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
        "left behind, and running"
    );
    assert_eq!(
        adopt(&lab, &spec).await.unwrap().kill().await.unwrap(),
        ExitReason::Killed
    );
}

#[tokio::test]
async fn a_failed_launch_leaves_nothing_and_says_why() {
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
    for patience in [Duration::ZERO, Duration::from_millis(20)] {
        // Whether the launch got through in time does not matter: who went away has no machine.
        let _ = timeout(patience, lab.driver.launch(&spec)).await.map(drop);
        let gone = || !spec.run_dir.exists() && processes_with(spec.id.as_str()).is_empty();
        until("the cancelled launch to be undone", gone).await;
    }
}

#[tokio::test]
async fn a_crash_is_told_from_a_kill() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Deaf)).await.unwrap();
    signal(machine.pid(), Signal::SEGV);
    let reason = timeout(PATIENCE, machine.exited()).await.unwrap();
    assert!(
        matches!(&reason, ExitReason::Crashed { detail } if detail.contains("signal 11")),
        "{reason:?}"
    );
}

#[tokio::test]
async fn a_termination_from_outside_is_not_a_crash() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Deaf)).await.unwrap();
    signal(machine.pid(), Signal::TERM);
    assert_eq!(timeout(PATIENCE, machine.exited()).await.unwrap(), ExitReason::Killed);
}

#[tokio::test]
async fn a_hypervisor_that_hangs_holds_nobody_up() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Deaf)).await.unwrap();
    signal(machine.pid(), Signal::STOP);
    assert!(matches!(
        timeout(PATIENCE, machine.pause()).await.unwrap(),
        Err(Error::Hung { .. })
    ));
    assert_eq!(
        timeout(PATIENCE, machine.kill()).await.unwrap().unwrap(),
        ExitReason::Killed
    );
}

#[tokio::test]
async fn a_reboot_restarts_the_guest_in_place() {
    let lab = Lab::new();
    let machine = lab.driver.launch(&lab.spec(Guest::Restless)).await.unwrap();
    let mut events = machine.events();
    let pid = machine.pid();
    heard(&mut events, |event| *event == MachineEvent::GuestReboot).await;
    lab.console_says("up\nup\n").await;
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
    let mut turns = 0;
    let mut last = 0;
    let start = Instant::now();
    while turns < 3 {
        assert!(start.elapsed() < PATIENCE, "{turns} turns");
        let now = size(&log);
        turns += u32::from(now < last);
        last = now;
        assert!(now + size(&older) <= CONSOLE_LIMIT.as_u64());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(
        machine.stop(PATIENCE).await.unwrap(),
        ExitReason::GuestShutdown,
        "the guest was never kept waiting"
    );
}

#[tokio::test]
async fn the_hypervisor_keeps_no_privilege_it_can_do_without() {
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

    // And it still does all that is asked of it.
    lab.console_says("w").await;
    machine.pause().await.unwrap();
    machine.resize_root(Bytes::from_mib(24)).await.unwrap();
    machine.resume().await.unwrap();
    drop(machine);
    let machine = adopt(&lab, &spec).await.unwrap();
    assert_eq!(machine.stop(PATIENCE).await.unwrap(), ExitReason::GuestShutdown);
    assert!(!lab.console().contains('E'));
    assert!(!spec.run_dir.exists());
}

#[tokio::test]
async fn a_host_without_space_stalls_the_guest_and_fails_none_of_its_writes() {
    let lab = Lab::new();
    let pool = SmallPool::mount(lab.path("pool"), 4);
    let mut spec = lab.spec(Guest::Writer);
    let root = pool.0.join("root");
    fs::File::create(&root).unwrap().set_len(16 << 20).unwrap();
    spec.root = DiskLocation::File(root);
    let machine = lab.driver.launch(&spec).await.unwrap();
    let mut events = machine.events();

    let event = heard(&mut events, |event| matches!(event, MachineEvent::IoError { .. })).await;
    assert!(
        matches!(event, MachineEvent::IoError { nospace: true, .. }),
        "{event:?}"
    );
    heard(&mut events, |event| *event == MachineEvent::Stopped).await;
    assert_eq!(machine.state().await.unwrap(), MachineState::Stalled);
    machine.resume().await.unwrap();
    heard(&mut events, |event| matches!(event, MachineEvent::IoError { .. })).await;

    pool.grow(32);
    machine.resume().await.unwrap();
    lab.console_says("w.w").await;
    assert!(!lab.console().contains('E'), "no write failed");
    machine.kill().await.unwrap();
}

/// A file system of a few MiB in memory.
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
