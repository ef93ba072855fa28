//! The daemon ended, as by `kill -9`, at every step of every operation that changes something durable; and what the next start makes of it.
//!
//! Built with the feature `fault-points` alone. The steps of an operation are those that a trace of it shows, and all together must be
//! those that stand in the sources: a step that no operation here reaches fails the test.

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

use scalebox_client::{CreateVm, PoolInfo, SnapshotVm, UpdateVm, Vm, VmStatus};
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
        name: "stop",
        prepare: |scene| scene.create("told", 1, true).unwrap(),
        perform: |scene| done(scene.host.client().stop_vm(MADE)),
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

/// A step of an operation, and what came of the crashes there.
struct Row {
    operation: &'static str,
    step: String,
    crashed: usize,
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
fn a_crash_at_any_step_loses_nothing_promised_and_leaves_nothing_behind() {
    let rows: Vec<Row> = std::thread::scope(|scope| {
        let workers = [DISKS, MACHINES, POOLS, LIVE].map(|operations| scope.spawn(|| crash_all(operations)));
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    println!("{}", table(&rows));
    for row in &rows {
        for problem in row.findings.lost.iter().chain(&row.findings.leaked) {
            println!("{}, {}: {problem}", row.operation, row.step);
        }
    }
    let reached: BTreeSet<_> = rows.iter().map(|row| row.step.clone()).collect();
    assert_eq!(reached, steps_in_sources(), "crashed at, and in the sources");
    assert!(
        rows.iter()
            .all(|row| row.findings.lost.is_empty() && row.findings.leaked.is_empty())
    );
}

/// All steps of these operations, on a host of their own, whose pool is checked at the end.
fn crash_all(operations: &[Operation]) -> Vec<Row> {
    let mut scene = Scene::new();
    let mut rows = Vec::new();
    for operation in operations {
        for step in scene.trace(operation) {
            let mut findings = Findings::default();
            for _ in 0..operation.times {
                scene.crash(operation, &step, &mut findings);
            }
            rows.push(Row {
                operation: operation.name,
                step,
                crashed: operation.times,
                findings,
            });
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
        host.serve();
        let scene = Scene {
            image: host.folder.join("pool.img"),
            host,
        };
        scene.create_named(KEPT, "told", 1, false).unwrap();
        scene
    }

    fn restart(&mut self, crash_at: &str, trace: &str) {
        self.host.crash();
        let fault = if crash_at.is_empty() {
            String::new()
        } else {
            format!("end {crash_at}")
        };
        self.host.set("SCALEBOX_FAULT", &fault);
        self.host.set("SCALEBOX_FAULT_TRACE", trace);
        self.host.serve();
    }

    /// The steps of an operation, in order, each once.
    fn trace(&mut self, operation: &Operation) -> Vec<String> {
        (operation.prepare)(self);
        let trace = self.host.folder.join("trace");
        self.restart("", text(&trace));
        let _none_yet = fs::remove_file(&trace);
        (operation.perform)(self).unwrap_or_else(|error| panic!("{}: {error}", operation.name));
        // What it does behind its answer belongs to it.
        assert!(self.host.terminate().success());
        let mut steps: Vec<String> = Vec::new();
        for step in fs::read_to_string(&trace).unwrap_or_default().lines() {
            if !steps.iter().any(|known| known == step) {
                steps.push(step.to_owned());
            }
        }
        assert!(!steps.is_empty(), "{} has no step to crash at", operation.name);
        self.host.set("SCALEBOX_FAULT_TRACE", "");
        self.host.serve();
        self.reset();
        steps
    }

    /// Crashes the operation at a step, starts the daemon again, looks what is there, and does the operation again.
    fn crash(&mut self, operation: &Operation, step: &str, findings: &mut Findings) {
        (operation.prepare)(self);
        let mut promised = self.promised();
        self.restart(step, "");
        let answered = (operation.perform)(self);
        // What comes behind the answer may crash too: then what was answered holds.
        let answered = answered.is_ok();
        if operation.command {
            self.restart("", "");
        } else {
            self.host.wait_for_crash();
            self.host.set("SCALEBOX_FAULT", "");
            self.host.serve();
        }
        self.look(operation, &promised, findings);

        let reached = (operation.reached)(self);
        if answered && !reached {
            findings.lost.push("what was answered is not so".to_owned());
        }
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

    /// Compares the host with what was promised, and each layer with the others.
    fn look(&self, operation: &Operation, promised: &Promised, findings: &mut Findings) {
        let Findings { lost, leaked } = findings;
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
        let pool = self.pool_when_settled(sizes);
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
    }

    /// The pool's numbers when a deleted disk's promise is given back, which follows the answer; or as they stay without that.
    fn pool_when_settled(&self, committed: u64) -> PoolInfo {
        let begun = Instant::now();
        eventually("the pool's numbers", || {
            let pool = self.host.client().pool().unwrap();
            (pool.committed_bytes == committed || begun.elapsed() > Duration::from_secs(30)).then_some(pool)
        })
    }

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

/// The names of all steps, as they stand in the sources.
fn steps_in_sources() -> BTreeSet<String> {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut steps = BTreeSet::new();
    let sources = names_in(&crates).into_iter().map(|name| crates.join(name).join("src"));
    for file in sources.flat_map(|folder| names_in(&folder).into_iter().map(move |name| folder.join(name))) {
        if !file.is_file() {
            continue;
        }
        let source = fs::read_to_string(&file).unwrap();
        let calls = ["crash_point(\"", "fault_point(\""].map(|call| source.split(call).skip(1));
        for call in calls.into_iter().flatten() {
            let step = call.split('"').next().unwrap().to_owned();
            assert!(!steps.contains(&step), "two steps have the name {step}");
            steps.insert(step);
        }
    }
    steps
}

fn table(rows: &[Row]) -> String {
    let mut table = String::from("| operation | step | crashed | lost | leaked |\n|---|---|---|---|---|\n");
    for row in rows {
        let Findings { lost, leaked } = &row.findings;
        writeln!(
            table,
            "| {} | {} | {} | {} | {} |",
            row.operation,
            row.step,
            row.crashed,
            lost.len(),
            leaked.len()
        )
        .unwrap();
    }
    let crashes: usize = rows.iter().map(|row| row.crashed).sum();
    let (lost, leaked) = rows.iter().fold((0, 0), |(lost, leaked), row| {
        (lost + row.findings.lost.len(), leaked + row.findings.leaked.len())
    });
    write!(table, "| all | {} | {crashes} | {lost} | {leaked} |", rows.len()).unwrap();
    table
}
