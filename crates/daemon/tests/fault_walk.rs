//! Every step of every operation that changes something durable: the daemon ends there, as by `kill -9`, or the step
//! returns an error, once or each time. Then the host is compared with what clients were told, at once and after a restart.
//!
//! Built with the feature `fault-points` alone. The steps of an operation are those that a trace of it shows. All together
//! must be those in the sources: a step that no operation here reaches fails the test.

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

use scalebox_client::{CreateVm, SnapshotVm, UpdateVm, Vm, VmStatus};
use std::collections::BTreeSet;
use std::fmt::{Display, Write as _};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use support::{Host, Options, eventually, run, said, text};

/// The size of the pools, in GiB: the smallest that there is.
const POOL: u64 = 20;
/// The VM that an operation is about.
const MADE: &str = "made";
/// A VM that is there from the first to the last, and in it a file.
const KEPT: &str = "kept";
const PROMISE: &str = "what was promised\n";

/// Something that is done to a host. Each returns why it did not work.
struct Operation {
    name: &'static str,
    /// How often it is crashed at each of its steps.
    times: usize,
    prepare: fn(&Scene),
    perform: fn(&Scene) -> Result<(), String>,
    /// Whether the host is where the operation leads.
    reached: fn(&Scene) -> bool,
    /// Whether it ends a VM's machine, or takes the VM or the template away: from its begin on, these are promised no more.
    ends: bool,
    /// Whether it is a command of its own and not a request to the daemon.
    command: bool,
}

const OPERATION: Operation = Operation {
    name: "",
    times: 3,
    prepare: |_| {},
    perform: |_| Ok(()),
    reached: |_| false,
    ends: false,
    command: false,
};

const DISKS: &[Operation] = &[
    Operation {
        name: "create, stopped",
        perform: |scene| scene.create("told", 1, false),
        reached: |scene| scene.made().is_some(),
        ..OPERATION
    },
    Operation {
        name: "create, the first of its size",
        prepare: |scene| scene.import("first", true).unwrap(),
        perform: |scene| scene.create("first", 3, false),
        reached: |scene| scene.made().is_some(),
        ..OPERATION
    },
    Operation {
        name: "grow, stopped",
        prepare: |scene| scene.create("told", 1, false).unwrap(),
        perform: |scene| scene.grow(3),
        reached: |scene| scene.made().is_some_and(|vm| vm.disk_size_gib == 3),
        ..OPERATION
    },
    Operation {
        name: "delete, stopped",
        prepare: |scene| scene.create("told", 1, false).unwrap(),
        perform: Scene::delete,
        reached: |scene| scene.made().is_none(),
        ends: true,
        ..OPERATION
    },
];

const MACHINES: &[Operation] = &[
    Operation {
        name: "create, started",
        perform: |scene| scene.create("told", 1, true),
        reached: |scene| scene.made().is_some(),
        ..OPERATION
    },
    Operation {
        name: "start",
        prepare: |scene| scene.create("told", 1, false).unwrap(),
        perform: |scene| done(scene.host.client().start_vm(MADE)),
        reached: |scene| scene.made().is_some_and(|vm| vm.status == VmStatus::Running),
        ..OPERATION
    },
    Operation {
        name: "limit, running",
        prepare: |scene| scene.create("told", 1, true).unwrap(),
        perform: |scene| {
            let limits = UpdateVm {
                disk_iops: Some(Some(500)),
                net_mbps: Some(Some(100)),
                ..UpdateVm::default()
            };
            done(scene.host.client().update_vm(MADE, &limits))
        },
        reached: |scene| {
            scene
                .made()
                .is_some_and(|vm| (vm.disk_iops, vm.net_mbps) == (Some(500), Some(100)))
        },
        ..OPERATION
    },
    Operation {
        name: "stop",
        prepare: |scene| scene.create("told", 1, true).unwrap(),
        perform: Scene::stop,
        reached: |scene| scene.made().is_some_and(|vm| vm.status == VmStatus::Stopped),
        ends: true,
        ..OPERATION
    },
    Operation {
        name: "delete, running",
        prepare: |scene| scene.create("told", 1, true).unwrap(),
        perform: Scene::delete,
        reached: |scene| scene.made().is_none(),
        ends: true,
        ..OPERATION
    },
];

const POOLS: &[Operation] = &[
    Operation {
        name: "pool grow",
        perform: |scene| done(scene.host.client().grow_pool(Some(POOL + 2))),
        reached: |scene| scene.capacity() == (POOL + 2) << 30,
        ..OPERATION
    },
    Operation {
        name: "pool shrink",
        prepare: |scene| drop(scene.host.client().grow_pool(Some(POOL + 2)).unwrap()),
        perform: |scene| done(scene.host.client().shrink_pool(POOL)),
        reached: |scene| scene.capacity() == POOL << 30,
        ..OPERATION
    },
    Operation {
        name: "template import",
        perform: |scene| scene.import("made", false),
        reached: |scene| scene.templates().contains(MADE),
        command: true,
        ..OPERATION
    },
    Operation {
        name: "snapshot, stopped",
        prepare: |scene| scene.create("told", 1, false).unwrap(),
        perform: |scene| {
            let request = SnapshotVm {
                template_name: MADE.parse().unwrap(),
            };
            done(scene.host.client().snapshot_vm(MADE, &request))
        },
        reached: |scene| scene.templates().contains(MADE),
        ..OPERATION
    },
    Operation {
        name: "template delete",
        prepare: |scene| {
            scene.import("made", false).unwrap();
            // A clone that is kept of it, too.
            scene.create("made", 2, false).unwrap();
            scene.delete().unwrap();
        },
        perform: |scene| done(scene.host.client().delete_template("made")),
        reached: |scene| !scene.templates().contains(MADE),
        ends: true,
        ..OPERATION
    },
];

/// The guest has no agent, which the daemon asks for seconds: once a step must do, beside the others.
const LIVE: &[Operation] = &[Operation {
    name: "grow, running",
    times: 1,
    prepare: |scene| scene.create("told", 1, true).unwrap(),
    perform: |scene| scene.grow(3),
    reached: |scene| scene.made().is_some_and(|vm| vm.disk_size_gib == 3),
    ..OPERATION
}];

fn done<T, E: Display>(result: Result<T, E>) -> Result<(), String> {
    result.map(drop).map_err(|error| error.to_string())
}

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

#[derive(Default)]
struct Findings {
    lost: Vec<String>,
    leaked: Vec<String>,
}

/// What was there before an operation: what clients were told.
struct Promised {
    vms: Vec<Vm>,
    templates: BTreeSet<String>,
}

struct Scene {
    host: Host,
    image: PathBuf,
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
    let mut scene = Scene::new();
    let mut rows = Vec::new();
    for operation in operations {
        for step in scene.trace(operation) {
            let mut row = Row {
                operation: operation.name,
                step,
                ended: 0,
                failed_once: 0,
                failed_lasting: 0,
                findings: Findings::default(),
            };
            for _ in 0..operation.times {
                scene.end_at(operation, &row.step, &mut row.findings);
                row.ended += 1;
            }
            if sources.fault_points.contains(&row.step.name) {
                scene.fail_at(operation, &row.step, Mode::Once, &mut row.findings);
                row.failed_once += 1;
                scene.fail_at(operation, &row.step, Mode::Lasting, &mut row.findings);
                row.failed_lasting += 1;
            }
            rows.push(row);
        }
    }
    assert!(scene.host.terminate().success());
    scene.host.scaleboxd_ok(&["down"]);
    run("btrfs", &["check", "--readonly", text(&scene.image)]);
    rows
}

impl Scene {
    fn new() -> Scene {
        let mut host = Host::new(&Options {
            pool_size: &format!("{POOL}G"),
            ..Options::default()
        });
        let (image, files) = (host.folder.join("told.image"), host.folder.join("files"));
        fs::create_dir(&files).unwrap();
        fs::write(files.join("promise"), PROMISE).unwrap();
        run("mke2fs", &["-q", "-t", "ext4", "-d", text(&files), text(&image), "64M"]);
        tiny_guest::Guest::Obedient.write_to(&host.folder.join("pool/kernel/vmlinuz"));
        fs::write(host.folder.join("pool/kernel/initrd.img"), "none").unwrap();
        host.scaleboxd_ok(&["template", "import", "told", text(&image)]);
        let faults = host.folder.join("faults");
        fs::create_dir(&faults).unwrap();
        host.set("SCALEBOX_FAULTS", text(&faults));
        host.serve();
        let scene = Scene {
            image: host.folder.join("pool.img"),
            host,
        };
        scene.create_named(KEPT, "told", 1, false).unwrap();
        scene
    }

    fn arm(&self, mode: Mode, step: &Step) {
        let fault = format!("{} {} {}", mode.word(), step.nth, step.name);
        // Renamed into place, so that no step reads a half-written one.
        let (new, fault_file) = (self.faults("new"), self.faults("fault"));
        fs::write(&new, fault).unwrap();
        fs::rename(new, fault_file).unwrap();
    }

    fn disarm(&self) {
        let _not_armed = fs::remove_file(self.faults("fault"));
    }

    fn faults(&self, name: &str) -> PathBuf {
        self.host.folder.join("faults").join(name)
    }

    fn restart(&mut self) {
        self.host.crash();
        self.host.serve();
    }

    /// The steps of an operation, in the order in which they are reached first.
    fn trace(&mut self, operation: &Operation) -> Vec<Step> {
        (operation.prepare)(self);
        // What a preparation does behind its answers is not the operation's.
        self.restart();
        fs::write(self.faults("trace"), "").unwrap();
        (operation.perform)(self).unwrap_or_else(|error| panic!("{}: {error}", operation.name));
        // What it does behind its answer belongs to it.
        assert!(self.host.terminate().success());
        let mut steps: Vec<Step> = Vec::new();
        for name in fs::read_to_string(self.faults("trace")).unwrap().lines() {
            let nth = steps.iter().filter(|step| step.name == name).count() + 1;
            steps.push(Step {
                name: name.to_owned(),
                nth,
            });
        }
        assert!(!steps.is_empty(), "{} has no steps", operation.name);
        fs::remove_file(self.faults("trace")).unwrap();
        self.host.serve();
        self.reset();
        steps
    }

    /// Ends the daemon at a step of the operation, starts it again, looks at the host, and does the operation again.
    fn end_at(&mut self, operation: &Operation, step: &Step, findings: &mut Findings) {
        (operation.prepare)(self);
        let promised = self.promised();
        self.restart();
        self.arm(Mode::End, step);
        // The step may come behind the answer: then what was answered holds.
        let answered = (operation.perform)(self).is_ok();
        if operation.command {
            self.disarm();
            self.restart();
        } else {
            self.host.wait_for_crash();
            self.disarm();
            self.host.serve();
        }
        self.look(operation, &promised, findings);
        let reached = (operation.reached)(self);
        if answered && !reached {
            findings.lost.push("what was answered is not so".to_owned());
        }
        self.do_again(operation, promised, reached, findings);
    }

    /// Lets a step of the operation fail, looks at the host at once and after a restart, and does the operation again.
    fn fail_at(&mut self, operation: &Operation, step: &Step, mode: Mode, findings: &mut Findings) {
        (operation.prepare)(self);
        let promised = self.promised();
        self.arm(mode, step);
        let answer = (operation.perform)(self);
        let reached = (operation.reached)(self);
        if answer.is_ok() != reached {
            findings
                .lost
                .push(format!("the answer was {answer:?}, and done: {reached}"));
        }
        self.look(operation, &promised, findings);
        self.disarm();
        if mode == Mode::Once {
            self.do_again(operation, promised, reached, findings);
            return;
        }
        self.restart();
        self.look(operation, &promised, findings);
        if (operation.reached)(self) != reached {
            findings.lost.push(format!(
                "before the restart it was done: {reached}, behind it: {}",
                !reached
            ));
        }
        self.do_again(operation, promised, reached, findings);
    }

    fn do_again(&mut self, operation: &Operation, mut promised: Promised, reached: bool, findings: &mut Findings) {
        if reached {
            self.reset();
            (operation.prepare)(self);
            promised = self.promised();
        }
        if let Err(error) = (operation.perform)(self) {
            findings.lost.push(format!("cannot be done again: {error}"));
        }
        if !(operation.reached)(self) {
            findings.lost.push("done again, it is not done".to_owned());
        }
        self.look(operation, &promised, findings);
        self.reset();
    }

    fn promised(&self) -> Promised {
        Promised {
            vms: self.host.client().vms().unwrap(),
            templates: self.templates(),
        }
    }

    /// Compares the host with what was promised, and each layer with the others, until nothing is wrong or time is up:
    /// what could not be removed at once is removed later.
    fn look(&self, operation: &Operation, promised: &Promised, findings: &mut Findings) {
        let begun = Instant::now();
        let found = eventually("a host that is as it should be", || {
            let found = self.look_once(operation, promised);
            let is_right = found.lost.is_empty() && found.leaked.is_empty();
            (is_right || begun.elapsed() > Duration::from_secs(30)).then_some(found)
        });
        findings.lost.extend(found.lost);
        findings.leaked.extend(found.leaked);
    }

    fn look_once(&self, operation: &Operation, promised: &Promised) -> Findings {
        let mut findings = Findings::default();
        let Findings { lost, leaked } = &mut findings;
        let vms = self.host.client().vms().unwrap();
        for before in &promised.vms {
            let may_end = operation.ends && before.name == MADE;
            match vms.iter().find(|vm| vm.id == before.id) {
                None if may_end => {}
                None => lost.push(format!("VM {} is gone", before.name)),
                Some(vm) if vm.disk_size_gib < before.disk_size_gib => {
                    lost.push(format!("the disk of {} became smaller", vm.name))
                }
                Some(vm) if before.status == VmStatus::Running && vm.status != before.status && !may_end => {
                    lost.push(format!("VM {} ran, and is {}", vm.name, vm.status));
                }
                Some(_) => {}
            }
        }
        let templates = self.templates();
        for template in &promised.templates {
            let may_end = operation.ends && template == MADE;
            if !may_end && !templates.contains(template) {
                lost.push(format!("the template {template} is gone"));
            }
        }
        for vm in &vms {
            lost.extend(self.wrong_with_disk(vm));
        }
        let kept = vms.iter().find(|vm| vm.name == KEPT).map(|vm| self.host.disk(vm));
        if kept.is_none_or(|disk| run("debugfs", &["-R", "cat /promise", text(&disk)]) != PROMISE) {
            lost.push(format!("the file in {KEPT} is not what it was"));
        }

        let running: Vec<&Vm> = vms.iter().filter(|vm| vm.status == VmStatus::Running).collect();
        let disks: BTreeSet<String> = vms.iter().map(|vm| format!("{}.ext4", vm.id)).collect();
        let ids: BTreeSet<String> = vms.iter().map(|vm| vm.id.clone()).collect();
        let running_ids: BTreeSet<String> = running.iter().map(|vm| vm.id.clone()).collect();
        let mut strays = |what: &str, folder: &str, known: &BTreeSet<String>| {
            for name in names_in(&self.host.folder.join(folder)) {
                if !known.contains(&name) {
                    leaked.push(format!("{what} {name}"));
                }
            }
        };
        strays("the disk", "pool/vms", &disks);
        strays("the machine's folder", "run/vms", &running_ids);
        strays("the console's folder", "state/console", &ids);
        let images = templates
            .iter()
            .map(|name| format!("{name}.ext4"))
            .chain([".grown".to_owned()]);
        strays("the template", "pool/templates", &images.collect());
        for clone in names_in(&self.host.folder.join("pool/templates/.grown")) {
            let of = clone.split_once('@').map_or("", |(template, _)| template);
            if !templates.contains(of) || clone.ends_with(".partial") {
                leaked.push(format!("the kept clone {clone}"));
            }
        }
        let mut count = |what: &str, found: usize, right: usize| {
            if found != right {
                leaked.push(format!("{found} {what}, and {right} would be right"));
            }
        };
        count("taps", self.host.taps().len(), running.len());
        count("forwards", self.forwards(), running.len());
        count("machines", self.machines(), running.len());
        count("loop devices", self.loop_devices().len(), 1);
        let sizes: u64 = vms.iter().map(|vm| vm.disk_size_gib << 30).sum();
        let pool = self.host.client().pool().unwrap();
        count("reserved bytes", pool.reserved_bytes as usize, 0);
        count("committed bytes", pool.committed_bytes as usize, sizes as usize);

        let image = fs::metadata(&self.image).unwrap().len();
        let device = self.device_size();
        if image != device || device != pool.capacity_bytes {
            let file_system = pool.capacity_bytes;
            lost.push(format!(
                "the image has {image} bytes, the device {device}, the file system {file_system}"
            ));
        }
        findings
    }

    /// The pool's numbers when a deleted disk's promise is given back, which follows the answer; or as they stay without that.
    /// Record, file and file system must agree in size, and the file system must be sound. What runs grows its own.
    fn wrong_with_disk(&self, vm: &Vm) -> Option<String> {
        let disk = self.host.disk(vm);
        let Ok(meta) = fs::metadata(&disk) else {
            return Some(format!("the disk of {} is gone", vm.name));
        };
        let recorded = vm.disk_size_gib << 30;
        if meta.len() != recorded {
            return Some(format!(
                "the disk of {} has {} bytes of {recorded}",
                vm.name,
                meta.len()
            ));
        }
        if vm.status == VmStatus::Running {
            return None;
        }
        let header = run("dumpe2fs", &["-h", text(&disk)]);
        let number = |key: &str| -> u64 {
            let line = header.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            line.trim().parse().unwrap()
        };
        let file_system = number("Block count:") * number("Block size:");
        if file_system != recorded {
            return Some(format!(
                "the file system of {} has {file_system} bytes of {recorded}",
                vm.name
            ));
        }
        let checked = Command::new("e2fsck").args(["-fn", text(&disk)]).output().unwrap();
        (!checked.status.success()).then(|| format!("the file system of {}: {}", vm.name, said(&checked)))
    }

    /// Takes away what operations made.
    fn reset(&self) {
        if self.made().is_some() {
            self.delete().unwrap();
        }
        if self.templates().contains("made") {
            self.host.client().delete_template("made").unwrap();
        }
        if self.capacity() > POOL << 30 {
            self.host.client().shrink_pool(POOL).unwrap();
        }
    }

    fn create(&self, template: &str, disk_size_gib: u64, start: bool) -> Result<(), String> {
        self.create_named(MADE, template, disk_size_gib, start)
    }

    fn create_named(&self, name: &str, template: &str, disk_size_gib: u64, start: bool) -> Result<(), String> {
        done(self.host.client().create_vm(&CreateVm {
            name: Some(name.parse().unwrap()),
            disk_size_gib: Some(disk_size_gib),
            start,
            ..self.host.stopped(template)
        }))
    }

    fn grow(&self, disk_size_gib: u64) -> Result<(), String> {
        done(self.host.client().update_vm(MADE, &UpdateVm::grow(disk_size_gib)))
    }

    /// A stop that a crash interrupted may be under way, or just done.
    fn stop(&self) -> Result<(), String> {
        eventually("no other operation", || {
            let Err(error) = self.host.client().stop_vm(MADE) else {
                return Some(Ok(()));
            };
            let error = error.to_string();
            let is_done = error.contains("already") && self.made().is_some_and(|vm| vm.status == VmStatus::Stopped);
            (!error.contains("try again when that is done")).then_some(if is_done { Ok(()) } else { Err(error) })
        })
    }

    fn delete(&self) -> Result<(), String> {
        done(self.host.client().delete_vm(MADE))
    }

    /// By the command, which ends by itself where it is told to.
    fn import(&self, name: &str, replace: bool) -> Result<(), String> {
        let image = self.host.folder.join("told.image");
        let mut command = self.host.scaleboxd(&["template", "import", name, text(&image)]);
        if replace {
            command.arg("--replace");
        }
        let output = command.output().unwrap();
        if output.status.success() {
            return Ok(());
        }
        assert!(
            output.status.signal().is_none_or(|signal| signal == 9),
            "{}",
            said(&output)
        );
        Err(said(&output))
    }

    fn made(&self) -> Option<Vm> {
        let vms = self.host.client().vms().unwrap();
        vms.into_iter().find(|vm| vm.name == MADE)
    }

    fn templates(&self) -> BTreeSet<String> {
        let templates = self.host.client().templates().unwrap();
        templates.into_iter().map(|template| template.name).collect()
    }

    fn capacity(&self) -> u64 {
        self.host.client().pool().unwrap().capacity_bytes
    }

    fn loop_devices(&self) -> Vec<String> {
        let found = run("losetup", &["-n", "-O", "NAME", "-j", text(&self.image)]);
        found.lines().map(|line| line.trim().to_owned()).collect()
    }

    fn device_size(&self) -> u64 {
        let device = self.loop_devices().remove(0);
        run("blockdev", &["--getsize64", &device]).trim().parse().unwrap()
    }

    fn forwards(&self) -> usize {
        let table = format!("scalebox_{}", self.host.bridge);
        let map = run("nft", &["list", "map", "ip", &table, "forwards"]);
        map.split_once("elements")
            .map_or(0, |(_, elements)| elements.matches(" : ").count())
    }

    fn machines(&self) -> usize {
        let ours = |pid: &String| {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments).into_owned();
            arguments.contains("qemu-system") && arguments.contains(text(&self.host.folder))
        };
        names_in(Path::new("/proc"))
            .iter()
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
            .filter(|pid| ours(pid))
            .count()
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
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
