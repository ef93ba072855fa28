//! Injects faults at every step of every operation that changes something durable. The daemon is
//! killed at the step, or the step returns an error, once or every time. Afterwards the host is
//! compared with the state reported to clients, at once and after a restart.
//!
//! This test is built only with the feature `fault-points`. The steps of an operation are found by
//! tracing it. The test fails if the sources contain a step that no operation reaches.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

#[path = "../../images/tests/support/registry.rs"]
#[allow(dead_code, reason = "the tests of pulls use the rest")]
mod registry;
mod support;
#[path = "../../vmm/tests/support/guest.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "the tests of the hypervisor use the rest")]
mod tiny_guest;
#[path = "support/walk.rs"]
mod walk;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use support::run;
use support::text;
use walk::{BUILDS, DISKS, Findings, LIVE, MACHINES, Operation, POOLS, PULLS, Reported, Scene, names_in};

/// The kind of fault at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// The process is killed.
    Kill,
    /// The step returns an error once.
    Once,
    /// The step returns an error every time.
    Lasting,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Kill => "kill",
            Mode::Once => "once",
            Mode::Lasting => "lasting",
        }
    }
}

/// A step of an operation. An operation may reach a step more than once.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    name: String,
    /// The number of the occurrence, starting at 1.
    nth: usize,
}

/// A step of an operation, the number of faults of each mode, and the findings.
struct Row {
    operation: &'static str,
    step: Step,
    killed: usize,
    failed_once: usize,
    failed_lasting: usize,
    findings: Findings,
}

#[test]
fn a_kill_or_an_error_at_any_step_loses_nothing_reported_and_leaves_nothing_behind() {
    let sources = Sources::read();
    let rows: Vec<Row> = std::thread::scope(|scope| {
        let workers =
            [DISKS, MACHINES, POOLS, BUILDS, PULLS, LIVE].map(|operations| scope.spawn(|| walk(operations, &sources)));
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    println!("{}", table(&rows));
    for row in &rows {
        for problem in row.findings.lost.iter().chain(&row.findings.leaked) {
            println!("{}, {}: {problem}", row.operation, row.step.name);
        }
    }
    let reached: BTreeSet<_> = rows.iter().map(|row| row.step.name.clone()).collect();
    let all = sources.crash_points.union(&sources.fault_points);
    // The upgrade of a pool has a test of its own.
    let all: BTreeSet<_> = all.filter(|step| !step.starts_with("upgrade: ")).cloned().collect();
    assert_eq!(reached, all, "steps reached, and steps in the sources");
    assert!(
        rows.iter()
            .all(|row| row.findings.lost.is_empty() && row.findings.leaked.is_empty())
    );
}

/// Tests all steps of these operations on one host, whose pool is checked at the end.
fn walk(operations: &[Operation], sources: &Sources) -> Vec<Row> {
    let mut walker = Walker(Scene::new());
    let mut rows = Vec::new();
    for operation in operations {
        for step in walker.trace(operation) {
            let mut row = Row {
                operation: operation.name,
                step,
                killed: 0,
                failed_once: 0,
                failed_lasting: 0,
                findings: Findings::default(),
            };
            for _ in 0..operation.times {
                walker.kill_at(operation, &row.step, &mut row.findings);
                row.killed += 1;
            }
            if sources.fault_points.contains(&row.step.name) {
                walker.fail_at(operation, &row.step, Mode::Once, &mut row.findings);
                row.failed_once += 1;
                walker.fail_at(operation, &row.step, Mode::Lasting, &mut row.findings);
                row.failed_lasting += 1;
            }
            rows.push(row);
        }
    }
    assert!(walker.0.host.terminate().success());
    walker.0.host.scaleboxd_ok(&["down"]);
    run("btrfs", &["check", "--readonly", text(&walker.0.image)]);
    rows
}

struct Walker(Scene);

impl Walker {
    fn arm(&self, mode: Mode, step: &Step) {
        let fault = format!("{} {} {}", mode.name(), step.nth, step.name);
        self.0.host.arm(Some(&fault));
    }

    fn disarm(&self) {
        self.0.host.arm(None);
    }

    fn trace_file(&self) -> PathBuf {
        self.0.host.faults().join("trace")
    }

    fn restart(&mut self) {
        self.0.host.crash();
        self.0.host.serve();
    }

    /// Returns the steps of an operation, in the order in which they are first reached.
    fn trace(&mut self, operation: &Operation) -> Vec<Step> {
        (operation.prepare)(&self.0);
        // Background work of the preparation is not part of the operation.
        self.restart();
        fs::write(self.trace_file(), "").unwrap();
        (operation.perform)(&self.0).unwrap_or_else(|error| panic!("{}: {error}", operation.name));
        // Background work after the response is part of the operation.
        assert!(self.0.host.terminate().success());
        let mut steps: Vec<Step> = Vec::new();
        for name in fs::read_to_string(self.trace_file()).unwrap().lines() {
            let nth = steps.iter().filter(|step| step.name == name).count() + 1;
            steps.push(Step {
                name: name.to_owned(),
                nth,
            });
        }
        assert!(!steps.is_empty(), "{} has no steps", operation.name);
        fs::remove_file(self.trace_file()).unwrap();
        self.0.host.serve();
        self.0.reset();
        steps
    }

    /// Kills the daemon at a step of the operation, restarts it, checks the host, and repeats the
    /// operation.
    fn kill_at(&mut self, operation: &Operation, step: &Step, findings: &mut Findings) {
        (operation.prepare)(&self.0);
        let reported = self.0.reported();
        self.restart();
        self.arm(Mode::Kill, step);
        // If the step comes after the response, the reported result must hold.
        let answered = (operation.perform)(&self.0).is_ok();
        if operation.command {
            self.disarm();
            self.restart();
        } else {
            self.0.host.wait_for_crash();
            self.disarm();
            self.0.host.serve();
        }
        self.0.check(operation, &reported, findings);
        let reached = (operation.reached)(&self.0);
        if answered && !reached {
            findings.lost.push("the reported result does not hold".to_owned());
        }
        self.repeat(operation, reported, reached, findings);
    }

    /// Makes a step of the operation fail, checks the host at once and after a restart, and repeats
    /// the operation.
    fn fail_at(&mut self, operation: &Operation, step: &Step, mode: Mode, findings: &mut Findings) {
        (operation.prepare)(&self.0);
        let reported = self.0.reported();
        self.arm(mode, step);
        let answer = (operation.perform)(&self.0);
        let reached = (operation.reached)(&self.0);
        if answer.is_ok() != reached {
            findings
                .lost
                .push(format!("the response was {answer:?}, but completed: {reached}"));
        }
        self.0.check(operation, &reported, findings);
        self.disarm();
        if mode == Mode::Once {
            self.repeat(operation, reported, reached, findings);
            return;
        }
        self.restart();
        self.0.check(operation, &reported, findings);
        if (operation.reached)(&self.0) != reached {
            findings.lost.push(format!(
                "completed before the restart: {reached}, after it: {}",
                !reached
            ));
        }
        self.repeat(operation, reported, reached, findings);
    }

    fn repeat(&mut self, operation: &Operation, mut reported: Reported, reached: bool, findings: &mut Findings) {
        if reached {
            self.0.reset();
            (operation.prepare)(&self.0);
            reported = self.0.reported();
        }
        if let Err(error) = (operation.perform)(&self.0) {
            findings.lost.push(format!("cannot be repeated: {error}"));
        }
        if !(operation.reached)(&self.0) {
            findings.lost.push("not completed after being repeated".to_owned());
        }
        self.0.check(operation, &reported, findings);
        self.0.reset();
    }
}

/// The names of all steps in the sources.
struct Sources {
    crash_points: BTreeSet<String>,
    fault_points: BTreeSet<String>,
}

impl Sources {
    fn read() -> Sources {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut found = Sources {
            crash_points: BTreeSet::new(),
            fault_points: BTreeSet::new(),
        };
        for name in names_in(&crates) {
            found.read_folder(&crates.join(name).join("src"));
        }
        found
    }

    fn read_folder(&mut self, folder: &Path) {
        for path in names_in(folder).iter().map(|name| folder.join(name)) {
            if path.is_dir() {
                self.read_folder(&path);
                continue;
            }
            let source = fs::read_to_string(&path).unwrap();
            for call in ["crash_point(\"", "fault_point(\""] {
                for rest in source.split(call).skip(1) {
                    let name = rest.split('"').next().unwrap().to_owned();
                    let is_new = match call {
                        "crash_point(\"" => &mut self.crash_points,
                        _ => &mut self.fault_points,
                    }
                    .insert(name.clone());
                    assert!(is_new, "two steps have the name {name}");
                }
            }
        }
    }
}

fn table(rows: &[Row]) -> String {
    let mut table = String::from(
        "| operation | step | killed | failed once | failed every time | lost | leaked |\n|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let Row {
            operation,
            step,
            findings,
            ..
        } = row;
        let nth = if step.nth > 1 {
            format!(" ({})", step.nth)
        } else {
            String::new()
        };
        writeln!(
            table,
            "| {operation} | {}{nth} | {} | {} | {} | {} | {} |",
            step.name,
            row.killed,
            row.failed_once,
            row.failed_lasting,
            findings.lost.len(),
            findings.leaked.len()
        )
        .unwrap();
    }
    let sum = |count: fn(&Row) -> usize| rows.iter().map(count).sum::<usize>();
    write!(
        table,
        "| all | {} | {} | {} | {} | {} | {} |",
        rows.len(),
        sum(|row| row.killed),
        sum(|row| row.failed_once),
        sum(|row| row.failed_lasting),
        sum(|row| row.findings.lost.len()),
        sum(|row| row.findings.leaked.len())
    )
    .unwrap();
    table
}
