//! Injects faults into the system calls of operations on the pool and the state. `strace` makes
//! each call fail once, in the daemon and in the programs that it starts. Afterwards the host is
//! compared with the state reported to clients, at once and after a restart.
//!
//! With `make test` the first few calls of each kind fail, with `make test-faults` all of them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

#[path = "../../images/tests/support/registry.rs"]
#[allow(dead_code, reason = "fault_walk uses it")]
mod registry;
mod support;
#[path = "../../vmm/tests/support/guest.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "the tests of the hypervisor use the rest")]
mod tiny_guest;
#[path = "support/walk.rs"]
#[allow(dead_code, reason = "fault_walk uses the rest")]
mod walk;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command};
use support::{eventually, run, text};
use walk::{DISKS, Findings, Operation, POOLS, Scene};

/// System calls, separated by commas as `strace` expects them, and the error that each returns.
const FAULTS: &[(&str, &str)] = &[
    ("fsync", "EIO"),
    ("fdatasync", "EIO"),
    ("pwrite64", "EIO"),
    ("pwrite64", "ENOSPC"),
    ("rename,renameat,renameat2", "EIO"),
    ("unlink,unlinkat", "EIO"),
    ("ftruncate", "EIO"),
    ("fallocate", "EIO"),
    ("ioctl", "EIO"),
    ("openat", "EMFILE"),
    ("statx", "EIO"),
];
/// Number of calls of each kind that fail with `make test`, one per round.
const DEFAULT_LIMIT: usize = 5;
/// A limit that no operation reaches: more calls of one kind than any operation makes.
const NO_LIMIT: usize = 2000;

struct Row {
    operation: &'static str,
    call: &'static str,
    error: &'static str,
    failed: usize,
    findings: Findings,
}

#[test]
fn a_failed_system_call_loses_nothing_reported_and_leaves_nothing_behind() {
    let limit = match std::env::var_os("SCALEBOX_ALL_FAULTS") {
        Some(_) => NO_LIMIT,
        None => DEFAULT_LIMIT,
    };
    let rows: Vec<Row> = std::thread::scope(|scope| {
        let workers = [DISKS, POOLS].map(|operations| scope.spawn(move || walk_all(operations, limit)));
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    println!("{}", table(&rows));
    for row in &rows {
        for problem in row.findings.lost.iter().chain(&row.findings.leaked) {
            println!("{}, {} {}: {problem}", row.operation, row.call, row.error);
        }
    }
    // A run that injects no faults proves nothing.
    assert!(rows.iter().map(|row| row.failed).sum::<usize>() > rows.len());
    assert!(
        rows.iter()
            .all(|row| row.findings.lost.is_empty() && row.findings.leaked.is_empty())
    );
}

fn walk_all(operations: &'static [Operation], limit: usize) -> Vec<Row> {
    let mut walker = Walker::new();
    let mut rows = Vec::new();
    for operation in operations {
        for (call, error) in FAULTS {
            let mut row = Row {
                operation: operation.name,
                call,
                error,
                failed: 0,
                findings: Findings::default(),
            };
            for nth in 1..=limit {
                let fault = format!("{call}:error={error}:when={nth}");
                if !walker.fail(operation, &fault, &mut row.findings) {
                    break;
                }
                row.failed += 1;
            }
            rows.push(row);
        }
    }
    assert!(walker.scene.host.terminate().success());
    walker.scene.host.scaleboxd_ok(&["down"]);
    run("btrfs", &["check", "--readonly", text(&walker.scene.image)]);
    rows
}

struct Walker {
    scene: Scene,
}

impl Walker {
    fn new() -> Walker {
        let mut scene = Scene::new();
        // `strace` counts calls per thread: with one thread of each kind, a fault happens once.
        scene.host.set("SCALEBOX_THREADS", "1");
        scene.host.set("SCALEBOX_FAULTS", "");
        scene.host.crash();
        scene.host.serve();
        Walker { scene }
    }

    /// Performs the operation with a fault and checks the host. Returns whether there was a call to
    /// fail.
    fn fail(&mut self, operation: &Operation, fault: &str, findings: &mut Findings) -> bool {
        let scene = &self.scene;
        (operation.prepare)(scene);
        let reported = scene.reported();
        let (answer, injected) = if operation.command {
            self.perform_command(operation, fault)
        } else {
            let tracer = Tracer::attach(&self.scene, fault);
            let answer = (operation.perform)(&self.scene);
            (answer, tracer.detach())
        };
        let scene = &mut self.scene;
        let before = findings.lost.len() + findings.leaked.len();
        if !injected && let Err(error) = &answer {
            findings.lost.push(format!("without a fault: {error}"));
        }
        let reached = (operation.reached)(scene);
        if let Err(error) = &answer
            && error.contains("delete the VM")
        {
            findings.lost.push(format!("advises to delete a sound VM: {error}"));
        }
        if answer.is_ok() != reached {
            findings
                .lost
                .push(format!("the response was {answer:?}, but completed: {reached}"));
        }
        scene.check(operation, &reported, findings);
        scene.host.crash();
        scene.host.serve();
        scene.check(operation, &reported, findings);
        if (operation.reached)(scene) != reached {
            findings.lost.push(format!(
                "completed before the restart: {reached}, after it: {}",
                !reached
            ));
        }
        scene.reset();
        if findings.lost.len() + findings.leaked.len() > before {
            findings.lost.push(format!("caused by {fault}"));
        }
        injected
    }

    /// Runs the operation as a separate command, and traces it from its start.
    fn perform_command(&mut self, operation: &Operation, fault: &str) -> (Result<(), String>, bool) {
        let log = self.scene.host.folder.join("strace");
        let tracer = ["strace", "-f", "-o", text(&log), "-e", &format!("inject={fault}")].map(str::to_owned);
        self.scene.host.run_under(Some(tracer.to_vec()));
        let answer = (operation.perform)(&self.scene);
        self.scene.host.run_under(None);
        (answer, was_injected(&log))
    }
}

/// A running `strace`, attached to the daemon.
struct Tracer {
    process: Child,
    log: PathBuf,
}

impl Tracer {
    fn attach(scene: &Scene, fault: &str) -> Tracer {
        let log = scene.host.folder.join("strace");
        let calls = fault.split(':').next().unwrap();
        let printed = scene.host.folder.join("strace.output");
        let process = Command::new("strace")
            .args(["-f", "-p", &scene.host.daemon_pid().to_string(), "-o", text(&log)])
            .args(["-e", &format!("trace={calls}"), "-e", &format!("inject={fault}")])
            .stderr(File::create(&printed).unwrap())
            .spawn()
            .expect("strace");
        eventually("strace to be attached to the daemon", || {
            fs::read_to_string(&printed).unwrap().contains("attached").then_some(())
        });
        Tracer { process, log }
    }

    /// Returns whether a call failed.
    fn detach(mut self) -> bool {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        self.process.wait().unwrap();
        was_injected(&self.log)
    }
}

fn was_injected(log: &std::path::Path) -> bool {
    fs::read_to_string(log).unwrap().contains("(INJECTED)")
}

fn table(rows: &[Row]) -> String {
    let mut table =
        String::from("| operation | system call | error | calls failed | lost | leaked |\n|---|---|---|---|---|---|\n");
    for row in rows {
        let Findings { lost, leaked } = &row.findings;
        writeln!(
            table,
            "| {} | {} | {} | {} | {} | {} |",
            row.operation,
            row.call,
            row.error,
            row.failed,
            lost.len(),
            leaked.len()
        )
        .unwrap();
    }
    let sum = |count: fn(&Row) -> usize| rows.iter().map(count).sum::<usize>();
    let (lost, leaked) = (sum(|row| row.findings.lost.len()), sum(|row| row.findings.leaked.len()));
    write!(table, "| all | | | {} | {lost} | {leaked} |", sum(|row| row.failed)).unwrap();
    table
}
