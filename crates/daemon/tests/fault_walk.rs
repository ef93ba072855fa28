//! Every step of every operation that changes something durable: the daemon ends there, as by `kill
//! -9`, or the step returns an error, once or each time. Then the host is compared with what
//! clients were told, at once and after a restart.
//!
//! Built with the feature `fault-points` alone. The steps of an operation are those that a trace of
//! it shows. All together must be those in the sources: a step that no operation here reaches fails
//! the test.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

mod support;
#[path = "../../vmm/tests/support/guest.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "the hypervisor's tests use the others")]
mod tiny_guest;
#[path = "support/walk.rs"]
mod walk;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use support::run;
use support::text;
use walk::{DISKS, Findings, LIVE, MACHINES, Operation, POOLS, Promised, Scene, names_in};

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// The process ends.
    End,
    /// The step returns an error.
    Once,
    /// The step returns an error, each time.
    Lasting,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Mode::End => "end",
            Mode::Once => "once",
            Mode::Lasting => "lasting",
        }
    }
}

/// A step of an operation, which may reach it several times.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    name: String,
    /// Counted from 1.
    nth: usize,
}

/// A step of an operation, how often each mode was tried there, and what was found.
struct Row {
    operation: &'static str,
    step: Step,
    ended: usize,
    failed_once: usize,
    failed_lasting: usize,
    findings: Findings,
}

#[test]
fn an_end_or_an_error_at_any_step_loses_nothing_promised_and_leaves_nothing_behind() {
    let sources = Sources::read();
    let rows: Vec<Row> = std::thread::scope(|scope| {
        let workers = [DISKS, MACHINES, POOLS, LIVE].map(|operations| scope.spawn(|| walk(operations, &sources)));
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
    let all: BTreeSet<_> = sources.crash_points.union(&sources.fault_points).cloned().collect();
    assert_eq!(reached, all, "walked, and in the sources");
    assert!(
        rows.iter()
            .all(|row| row.findings.lost.is_empty() && row.findings.leaked.is_empty())
    );
}

/// Walks all steps of these operations, on a host of their own, whose pool is checked at the end.
fn walk(operations: &[Operation], sources: &Sources) -> Vec<Row> {
    let mut walker = Walker(Scene::new());
    let mut rows = Vec::new();
    for operation in operations {
        for step in walker.trace(operation) {
            let mut row = Row {
                operation: operation.name,
                step,
                ended: 0,
                failed_once: 0,
                failed_lasting: 0,
                findings: Findings::default(),
            };
            for _ in 0..operation.times {
                walker.end_at(operation, &row.step, &mut row.findings);
                row.ended += 1;
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
        let fault = format!("{} {} {}", mode.word(), step.nth, step.name);
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

    /// The steps of an operation, in the order in which they are reached first.
    fn trace(&mut self, operation: &Operation) -> Vec<Step> {
        (operation.prepare)(&self.0);
        // What a preparation does behind its answers is not the operation's.
        self.restart();
        fs::write(self.trace_file(), "").unwrap();
        (operation.perform)(&self.0).unwrap_or_else(|error| panic!("{}: {error}", operation.name));
        // What it does behind its answer belongs to it.
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

    /// Ends the daemon at a step of the operation, starts it again, looks at the host, and does the
    /// operation again.
    fn end_at(&mut self, operation: &Operation, step: &Step, findings: &mut Findings) {
        (operation.prepare)(&self.0);
        let promised = self.0.promised();
        self.restart();
        self.arm(Mode::End, step);
        // The step may come behind the answer: then what was answered holds.
        let answered = (operation.perform)(&self.0).is_ok();
        if operation.command {
            self.disarm();
            self.restart();
        } else {
            self.0.host.wait_for_crash();
            self.disarm();
            self.0.host.serve();
        }
        self.0.look(operation, &promised, findings);
        let reached = (operation.reached)(&self.0);
        if answered && !reached {
            findings.lost.push("what was answered is not so".to_owned());
        }
        self.do_again(operation, promised, reached, findings);
    }

    /// Lets a step of the operation fail, looks at the host at once and after a restart, and does
    /// the operation again.
    fn fail_at(&mut self, operation: &Operation, step: &Step, mode: Mode, findings: &mut Findings) {
        (operation.prepare)(&self.0);
        let promised = self.0.promised();
        self.arm(mode, step);
        let answer = (operation.perform)(&self.0);
        let reached = (operation.reached)(&self.0);
        if answer.is_ok() != reached {
            findings
                .lost
                .push(format!("the answer was {answer:?}, and done: {reached}"));
        }
        self.0.look(operation, &promised, findings);
        self.disarm();
        if mode == Mode::Once {
            self.do_again(operation, promised, reached, findings);
            return;
        }
        self.restart();
        self.0.look(operation, &promised, findings);
        if (operation.reached)(&self.0) != reached {
            findings.lost.push(format!(
                "before the restart it was done: {reached}, behind it: {}",
                !reached
            ));
        }
        self.do_again(operation, promised, reached, findings);
    }

    fn do_again(&mut self, operation: &Operation, mut promised: Promised, reached: bool, findings: &mut Findings) {
        if reached {
            self.0.reset();
            (operation.prepare)(&self.0);
            promised = self.0.promised();
        }
        if let Err(error) = (operation.perform)(&self.0) {
            findings.lost.push(format!("cannot be done again: {error}"));
        }
        if !(operation.reached)(&self.0) {
            findings.lost.push("done again, it is not done".to_owned());
        }
        self.0.look(operation, &promised, findings);
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
        "| operation | step | ended | failed once | failed each time | lost | leaked |\n|---|---|---|---|---|---|---|\n",
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
            row.ended,
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
        sum(|row| row.ended),
        sum(|row| row.failed_once),
        sum(|row| row.failed_lasting),
        sum(|row| row.findings.lost.len()),
        sum(|row| row.findings.leaked.len())
    )
    .unwrap();
    table
}
