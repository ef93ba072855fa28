//! Operations that durably change a host, and the conditions that must hold after each, whatever
//! failed.

use crate::registry::{Layout, Registry};
use crate::support::{Host, Options, eventually, output_of, run, text};
use crate::tiny_guest;
use scalebox_api::{CreateVm, PullTemplate, SnapshotVm, UpdateVm, Vm, VmStatus};
use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The size of the pools, in GiB: the minimum.
const POOL: u64 = 20;
/// The name of the VM that operations create and change.
const MADE: &str = "made";
/// The name of the template that a build makes.
const BUILT: &str = "debian-base";
/// The name of a VM that exists throughout, with a file in it.
const KEPT: &str = "kept";
const CONTENT: &str = "kept content\n";

/// An operation on a host. `perform` returns why it failed.
pub(crate) struct Operation {
    pub name: &'static str,
    /// Number of times that the daemon is killed at each step of the operation.
    pub times: usize,
    pub prepare: fn(&Scene),
    pub perform: fn(&Scene) -> Result<(), String>,
    /// Returns whether the operation has taken effect.
    pub reached: fn(&Scene) -> bool,
    /// `true` if the operation kills a VM's machine, or deletes the VM or the template. From its
    /// start on, these need not exist any more.
    pub ends: bool,
    /// `true` if the operation is a separate command rather than a request to the daemon.
    pub command: bool,
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

pub(crate) const DISKS: &[Operation] = &[
    Operation {
        name: "create, stopped",
        perform: |scene| scene.create("base", 1, false),
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
        prepare: |scene| scene.create("base", 1, false).unwrap(),
        perform: |scene| scene.grow(3),
        reached: |scene| scene.made().is_some_and(|vm| vm.disk_size_gib == 3),
        ..OPERATION
    },
    Operation {
        name: "delete, stopped",
        prepare: |scene| scene.create("base", 1, false).unwrap(),
        perform: Scene::delete,
        reached: |scene| scene.made().is_none(),
        ends: true,
        ..OPERATION
    },
];

pub(crate) const MACHINES: &[Operation] = &[
    Operation {
        name: "create, started",
        prepare: Scene::remove_initramfs,
        perform: |scene| scene.create("base", 1, true),
        reached: |scene| scene.made().is_some(),
        ..OPERATION
    },
    Operation {
        name: "start",
        prepare: |scene| {
            scene.create("base", 1, false).unwrap();
            scene.remove_initramfs();
        },
        perform: |scene| done(scene.host.client().start_vm(MADE)),
        reached: |scene| scene.made().is_some_and(|vm| vm.status == VmStatus::Running),
        ..OPERATION
    },
    Operation {
        name: "limit, running",
        prepare: |scene| scene.create("base", 1, true).unwrap(),
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
        prepare: |scene| scene.create("base", 1, true).unwrap(),
        perform: Scene::stop,
        reached: |scene| scene.made().is_some_and(|vm| vm.status == VmStatus::Stopped),
        ends: true,
        ..OPERATION
    },
    Operation {
        name: "delete, running",
        prepare: |scene| scene.create("base", 1, true).unwrap(),
        perform: Scene::delete,
        reached: |scene| scene.made().is_none(),
        ends: true,
        ..OPERATION
    },
];

pub(crate) const POOLS: &[Operation] = &[
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
        prepare: |scene| scene.create("base", 1, false).unwrap(),
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
            // Includes a base image that was kept for a size of it.
            scene.create("made", 2, false).unwrap();
            scene.delete().unwrap();
        },
        perform: |scene| done(scene.host.client().delete_template("made")),
        reached: |scene| !scene.templates().contains(MADE),
        ends: true,
        ..OPERATION
    },
];

/// A build takes seconds; therefore these run only once per step.
pub(crate) const BUILDS: &[Operation] = &[
    Operation {
        name: "template build",
        times: 1,
        prepare: |scene| {
            // It replaces an earlier build, whose kernel it leaves without a use.
            scene.prepare_build();
            scene.build().unwrap();
            scene.remove_unused_kernels();
            scene.prepare_build();
        },
        perform: Scene::build,
        reached: Scene::is_built,
        command: true,
        ..OPERATION
    },
    Operation {
        name: "template delete, the last with its kernel",
        times: 1,
        prepare: |scene| {
            scene.prepare_build();
            scene.build().unwrap();
            scene.remove_unused_kernels();
            scene.import(MADE, false).unwrap();
            // From here on, only the imported template has the earlier kernel.
            scene.prepare_build();
            scene.build().unwrap();
        },
        perform: |scene| done(scene.host.client().delete_template(MADE)),
        reached: |scene| !scene.templates().contains(MADE),
        ends: true,
        ..OPERATION
    },
];

/// A pull takes seconds; therefore it runs only once per step.
pub(crate) const PULLS: &[Operation] = &[Operation {
    name: "template pull",
    times: 1,
    prepare: Scene::remove_layers,
    perform: Scene::pull,
    reached: |scene| scene.templates().contains(MADE),
    ..OPERATION
}];

/// The guest has no agent, and the daemon waits seconds for one; therefore this runs only once per
/// step.
pub(crate) const LIVE: &[Operation] = &[Operation {
    name: "grow, running",
    times: 1,
    prepare: |scene| scene.create("base", 1, true).unwrap(),
    perform: |scene| scene.grow(3),
    reached: |scene| scene.made().is_some_and(|vm| vm.disk_size_gib == 3),
    ..OPERATION
}];

fn done<T, E: Display>(result: Result<T, E>) -> Result<(), String> {
    result.map(drop).map_err(|error| error.to_string())
}

#[derive(Default)]
pub(crate) struct Findings {
    pub lost: Vec<String>,
    pub leaked: Vec<String>,
}

/// The state of a host before an operation, as reported to clients.
pub(crate) struct Reported {
    vms: Vec<Vm>,
    templates: BTreeSet<String>,
}

pub(crate) struct Scene {
    pub host: Host,
    pub image: PathBuf,
    /// With the image `box:1`; started by the first pull.
    registry: OnceLock<Registry>,
}

impl Scene {
    pub(crate) fn new() -> Scene {
        let mut host = Host::new(&Options {
            pool_size: &format!("{POOL}G"),
            ..Options::default()
        });
        let (image, files) = (host.folder.join("base.image"), host.folder.join("files"));
        fs::create_dir(&files).unwrap();
        fs::write(files.join("content"), CONTENT).unwrap();
        run("mke2fs", &["-q", "-t", "ext4", "-d", text(&files), text(&image), "64M"]);
        tiny_guest::Guest::Obedient.write_to(&host.kernel_folder().join("vmlinuz"));
        fs::write(host.kernel_folder().join("initrd.img"), "none").unwrap();
        host.scaleboxd_ok(&["template", "import", "base", text(&image)]);
        host.serve();
        let scene = Scene {
            image: host.folder.join("pool.img"),
            host,
            registry: OnceLock::new(),
        };
        scene.create_named(KEPT, "base", 1, false).unwrap();
        scene
    }

    pub(crate) fn reported(&self) -> Reported {
        Reported {
            vms: self.host.client().vms().unwrap(),
            templates: self.templates(),
        }
    }

    /// Compares the host with the reported state, and its layers with each other. Repeats that
    /// until all match or a time limit passes, because some removals happen in the background.
    pub(crate) fn check(&self, operation: &Operation, reported: &Reported, findings: &mut Findings) {
        let begun = Instant::now();
        let found = eventually("a consistent host", || {
            let found = self.check_once(operation, reported);
            let is_right = found.lost.is_empty() && found.leaked.is_empty();
            (is_right || begun.elapsed() > Duration::from_secs(30)).then_some(found)
        });
        findings.lost.extend(found.lost);
        findings.leaked.extend(found.leaked);
    }

    fn check_once(&self, operation: &Operation, reported: &Reported) -> Findings {
        let vms = self.host.client().vms().unwrap();
        let templates = self.templates();
        let mut findings = Findings {
            lost: self.lost(operation, reported, &vms, &templates),
            leaked: self.orphans(&vms, &templates),
        };
        let Findings { lost, leaked } = &mut findings;
        let running = vms.iter().filter(|vm| vm.status == VmStatus::Running).count();
        let mut count = |kind: &str, found: usize, right: usize| {
            if found != right {
                leaked.push(format!("{found} {kind} instead of {right}"));
            }
        };
        count("taps", self.host.taps().len(), running);
        count("forwards", self.forwards(), running);
        count("machines", self.machines(), running);
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

    /// Lists the reported VMs and templates that are missing or changed, and damaged disks.
    fn lost(
        &self,
        operation: &Operation,
        reported: &Reported,
        vms: &[Vm],
        templates: &BTreeSet<String>,
    ) -> Vec<String> {
        let mut lost = Vec::new();
        for before in &reported.vms {
            let may_end = operation.ends && before.name == MADE;
            match vms.iter().find(|vm| vm.id == before.id) {
                None if may_end => {}
                None => lost.push(format!("VM {} is missing", before.name)),
                Some(vm) if vm.disk_size_gib < before.disk_size_gib => {
                    lost.push(format!("the disk of {} became smaller", vm.name))
                }
                Some(vm) if before.status == VmStatus::Running && vm.status != before.status && !may_end => {
                    lost.push(format!("VM {} was running, and is {}", vm.name, vm.status));
                }
                Some(_) => {}
            }
        }
        for template in &reported.templates {
            let may_end = operation.ends && template == MADE;
            if !may_end && !templates.contains(template) {
                lost.push(format!("the template {template} is missing"));
            }
        }
        for vm in vms {
            lost.extend(self.wrong_with_disk(vm));
        }
        let kept = vms.iter().find(|vm| vm.name == KEPT).map(|vm| self.host.disk(vm));
        if kept.is_none_or(|disk| run("debugfs", &["-R", "cat /content", text(&disk)]) != CONTENT) {
            lost.push(format!("the file in {KEPT} has changed"));
        }
        lost
    }

    /// Lists the files and folders that belong to no VM and no template.
    fn orphans(&self, vms: &[Vm], templates: &BTreeSet<String>) -> Vec<String> {
        let mut leaked = Vec::new();
        let disks: BTreeSet<String> = vms.iter().map(|vm| format!("{}.ext4", vm.id)).collect();
        let ids: BTreeSet<String> = vms.iter().map(|vm| vm.id.clone()).collect();
        let running = vms.iter().filter(|vm| vm.status == VmStatus::Running);
        let running_ids: BTreeSet<String> = running.map(|vm| vm.id.clone()).collect();
        let mut orphans = |kind: &str, folder: &str, known: &BTreeSet<String>| {
            for name in names_in(&self.host.folder.join(folder)) {
                if !known.contains(&name) {
                    leaked.push(format!("{kind} {name}"));
                }
            }
        };
        orphans("the disk", "pool/vms", &disks);
        orphans("the machine's folder", "run/vms", &running_ids);
        orphans("the console's folder", "state/console", &ids);
        let files = templates
            .iter()
            .flat_map(|name| [format!("{name}.json"), self.image_of(name)])
            .chain([".grown".to_owned()]);
        orphans("the template", "pool/templates", &files.collect());
        orphans("the kernel", "pool/kernels", &self.kernels());
        orphans("the work folder", "pool/build", &BTreeSet::new());
        let layers = names_in(&self.host.folder.join("pool/layers/sha256"));
        let is_complete = |name: &String| !name.ends_with(".partial");
        orphans(
            "the layer",
            "pool/layers/sha256",
            &layers.into_iter().filter(is_complete).collect(),
        );
        for base_image in names_in(&self.host.folder.join("pool/templates/.grown")) {
            let of = base_image.split_once('@').map_or("", |(template, _)| template);
            if !templates.contains(of) || base_image.ends_with(".partial") {
                leaked.push(format!("the base image {base_image}"));
            }
        }
        leaked
    }

    /// Returns the file name of a template's image.
    fn image_of(&self, template: &str) -> String {
        let record = fs::read(self.host.folder.join(format!("pool/templates/{template}.json")));
        let record: serde_json::Value = serde_json::from_slice(&record.unwrap_or_default()).unwrap_or_default();
        record["image"].as_str().unwrap_or_default().to_owned()
    }

    /// Returns the kernels that may exist. These are the kernels that a template names; the newest,
    /// which stays; and the one before it, which stays until the next deletion or start.
    fn kernels(&self) -> BTreeSet<String> {
        let templates = self.host.client().templates().unwrap();
        let folder = self.host.folder.join("pool/kernels");
        let modified = |name: &String| fs::metadata(folder.join(name)).unwrap().modified().unwrap();
        let mut complete = names_in(&folder);
        complete.retain(|name| !name.starts_with('.'));
        complete.sort_by_key(modified);
        let newest = complete.into_iter().rev().take(2);
        templates
            .into_iter()
            .filter_map(|template| template.kernel)
            .chain(newest)
            .collect()
    }

    /// Checks a disk. Record, file and file system must have the same size, and the file system
    /// must not be damaged. A running guest grows its own file system.
    fn wrong_with_disk(&self, vm: &Vm) -> Option<String> {
        let disk = self.host.disk(vm);
        let Ok(meta) = fs::metadata(&disk) else {
            return Some(format!("the disk of {} is missing", vm.name));
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
        (!checked.status.success()).then(|| format!("the file system of {}: {}", vm.name, output_of(&checked)))
    }

    /// Removes everything that operations created.
    pub(crate) fn reset(&self) {
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

    /// Stops the VM. An earlier stop, which a crash interrupted, may be in progress or just
    /// completed.
    fn stop(&self) -> Result<(), String> {
        eventually("no other operation", || {
            let Err(error) = self.host.client().stop_vm(MADE) else {
                return Some(Ok(()));
            };
            let error = error.to_string();
            let is_done = error.contains("already") && self.made().is_some_and(|vm| vm.status == VmStatus::Stopped);
            (!error.contains("try again later")).then_some(if is_done { Ok(()) } else { Err(error) })
        })
    }

    fn delete(&self) -> Result<(), String> {
        done(self.host.client().delete_vm(MADE))
    }

    /// Runs as a separate command, which fault points end like the daemon.
    fn import(&self, name: &str, replace: bool) -> Result<(), String> {
        let image = self.host.folder.join("base.image");
        let mut arguments = vec!["template", "import", name, text(&image)];
        arguments.extend(replace.then_some("--replace"));
        self.command(&arguments)
    }

    fn command(&self, arguments: &[&str]) -> Result<(), String> {
        let output = self.host.scaleboxd(arguments).output().unwrap();
        if output.status.success() {
            return Ok(());
        }
        assert!(
            output.status.signal().is_none_or(|signal| signal == 9),
            "{}",
            output_of(&output)
        );
        Err(output_of(&output))
    }

    /// Puts a finished build into a cache: a small template with a kernel that is not installed
    /// yet.
    fn prepare_build(&self) {
        static BUILDS: AtomicUsize = AtomicUsize::new(0);
        let fingerprint = scalebox_images::Recipe::default().fingerprint();
        let finished = self.host.folder.join("cache").join(fingerprint);
        fs::create_dir_all(&finished).unwrap();
        fs::copy(self.host.folder.join("base.image"), finished.join("rootfs.ext4")).unwrap();
        tiny_guest::Guest::Obedient.write_to(&finished.join("vmlinux"));
        let number = BUILDS.fetch_add(1, Ordering::Relaxed);
        fs::write(finished.join("initrd.img"), format!("initramfs {number}")).unwrap();
        fs::write(finished.join("modules.img"), "modules").unwrap();
    }

    /// Runs as a separate command, which fault points end like the daemon.
    fn build(&self) -> Result<(), String> {
        let cache = self.host.folder.join("cache");
        self.command(&["template", "build", BUILT, "--replace", "--cache", text(&cache)])
    }

    /// Pulls an image with one layer, and waits for the end of the job.
    fn pull(&self) -> Result<(), String> {
        let registry = self.registry.get_or_init(|| {
            let (registry, image) = (Registry::open(), Layout::new());
            image.layer(|root| fs::write(root.join("content"), CONTENT).unwrap());
            registry.push(&image, "box:1");
            registry
        });
        let client = self.host.client();
        let request = PullTemplate::of(format!("{}/box:1", registry.host));
        let mut job = client
            .pull_template(MADE, &request)
            .map_err(|error| error.to_string())?;
        while job.is_running() {
            thread::sleep(Duration::from_millis(20));
            job = client.job(&job.id).map_err(|error| error.to_string())?;
        }
        match job.error {
            None if job.status == "done" => Ok(()),
            None => Err(job.status),
            Some(error) => Err(error.error),
        }
    }

    /// Removes the layers that earlier pulls have kept, so that the next pull downloads them.
    fn remove_layers(&self) {
        for name in names_in(&self.host.folder.join("pool/layers/sha256")) {
            fs::remove_file(self.host.folder.join("pool/layers/sha256").join(name)).unwrap();
        }
    }

    /// Removes the initramfs that VMs boot, so that the next start makes it.
    fn remove_initramfs(&self) {
        let folder = self.host.folder.join("pool/kernels/initramfs");
        if folder.exists() {
            fs::remove_dir_all(folder).unwrap();
        }
    }

    /// Deletes a template: the daemon then removes the kernels that nothing uses.
    fn remove_unused_kernels(&self) {
        self.import(MADE, false).unwrap();
        self.host.client().delete_template(MADE).unwrap();
    }

    /// Returns whether the template has the kernel of the build that was prepared last.
    fn is_built(&self) -> bool {
        let templates = self.host.client().templates().unwrap();
        let built = templates.into_iter().find(|template| template.name == BUILT);
        let Some(kernel) = built.and_then(|template| template.kernel) else {
            return false;
        };
        let fingerprint = scalebox_images::Recipe::default().fingerprint();
        let prepared = self.host.folder.join("cache").join(fingerprint).join("initrd.img");
        let installed = self.host.folder.join("pool/kernels").join(kernel).join("initrd.img");
        fs::read(prepared).unwrap() == fs::read(installed).unwrap()
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

pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}
