//! Makes system calls fail during work on an image, in e2fsprogs and in the daemon itself. A
//! template never contains deleted data or keys, a disk never has wrong content, and a failure
//! changes nothing.
//!
//! `strace` injects the errors. Wrapper scripts run the programs of e2fsprogs under it, for which
//! the daemon must be built with the feature `fault-points`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{CreateVm, Vm};
use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use support::{Host, Options, eventually, run, text};

/// The calls that change a file.
const CALLS: &str = "pwrite64,write,fallocate,ftruncate,fsync,fdatasync";
/// The calls that read a file.
const READ_CALLS: &str = "pread64,read";

/// Wrappers that run programs under `strace`, and make some of their calls fail.
struct StandIns {
    folder: PathBuf,
}

/// A call of a program to fail: the `nth` of its kind. A failed `pwrite64` is retried as `write`,
/// which fails too.
#[derive(Debug, Clone)]
struct Fault {
    program: &'static str,
    inject: String,
}

impl StandIns {
    fn new(host: &Host, programs: &[&str]) -> StandIns {
        let folder = host.faults().join("programs");
        fs::create_dir(&folder).unwrap();
        for program in programs {
            let script = format!(
                "#!/bin/bash\n\
                 here=$(dirname \"$0\") PATH=${{PATH#*:}} image=$PWD/${{@: -1}}\n\
                 [ -e \"$here/off\" ] && exec {program} \"$@\"\n\
                 exec strace -f -qq -o \"$here/{program}.$$.trace\" -P \"${{image/.\\//}}\" -e trace={CALLS},{READ_CALLS} \
                 $(cat \"$here/{program}.inject\" 2>/dev/null) {program} \"$@\"\n"
            );
            let path = folder.join(program);
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        }
        StandIns { folder }
    }

    /// Removes the faults and traces of the last operation.
    fn clear(&self) {
        for entry in fs::read_dir(&self.folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some() {
                fs::remove_file(path).unwrap();
            }
        }
    }

    /// Runs the programs without `strace` from now on, because the daemon is traced and can have
    /// only one tracer.
    fn disable(&self) {
        self.clear();
        fs::write(self.folder.join("off"), "").unwrap();
    }

    fn fail(&self, fault: &Fault) {
        self.clear();
        fs::write(self.folder.join(format!("{}.inject", fault.program)), &fault.inject).unwrap();
    }

    /// Returns how many calls have failed since the last fault was set.
    fn failed(&self) -> usize {
        let traces = self.traces("");
        traces.iter().map(|trace| trace.matches("(INJECTED)").count()).sum()
    }

    fn traces(&self, program: &str) -> Vec<String> {
        let entries = fs::read_dir(&self.folder).unwrap().map(|entry| entry.unwrap().path());
        let of_program = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.ends_with(".trace") && name.starts_with(program)
        };
        entries
            .filter(of_program)
            .map(|path| fs::read_to_string(path).unwrap())
            .collect()
    }

    /// Returns a fault for each call of `program` in the trace of its run with the most calls.
    fn faults(&self, program: &'static str) -> Vec<Fault> {
        let longest = self
            .traces(program)
            .into_iter()
            .max_by_key(|trace| trace.lines().count())
            .unwrap_or_default();
        let (mut counts, mut faults) = (BTreeMap::<&str, usize>::new(), Vec::new());
        for line in longest.lines() {
            // The line begins like `12345 pwrite64(4, …`.
            let Some(call) = line.split_whitespace().nth(1).and_then(|word| word.split('(').next()) else {
                continue;
            };
            let Some(call) = CALLS.split(',').find(|known| *known == call) else {
                continue;
            };
            *counts.entry(call).or_default() += 1;
            let mut inject = format!("-e inject={call}:error=EIO:when={}", counts[call]);
            if call == "pwrite64" {
                let again = counts.get("write").copied().unwrap_or_default() + 1;
                inject += &format!(" -e inject=write:error=EIO:when={again}");
            }
            faults.push(Fault { program, inject });
        }
        faults
    }
}

/// Makes calls of the daemon itself fail, on one path, until it is dropped.
struct Failing {
    strace: Child,
    trace: PathBuf,
}

impl Failing {
    fn of(host: &Host, path: &Path, inject: &str) -> Failing {
        let trace = host.folder.join("daemon.trace");
        let _none_yet = fs::remove_file(&trace);
        let call = inject.split(':').next().unwrap();
        let daemon = host.daemon_pid();
        let strace = Command::new("strace")
            .args(["-f", "-p", &daemon.to_string(), "-o", text(&trace), "-P", text(path)])
            .args(["-e", &format!("trace={call}"), "-e", &format!("inject={inject}")])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("strace to be attached to every thread of the daemon", || {
            let mut threads = fs::read_dir(format!("/proc/{daemon}/task")).unwrap();
            let is_traced = |thread: std::io::Result<fs::DirEntry>| {
                // The thread may have just ended.
                let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap_or_default();
                !status.contains("TracerPid:\t0\n")
            };
            threads.all(is_traced).then_some(())
        });
        Failing { strace, trace }
    }

    /// Stops injecting faults, and returns how many calls failed.
    fn end(mut self) -> usize {
        self.detach();
        fs::read_to_string(&self.trace).unwrap().matches("(INJECTED)").count()
    }

    fn detach(&mut self) {
        run("kill", &["-INT", &self.strace.id().to_string()]);
        self.strace.wait().unwrap();
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        if self.strace.try_wait().unwrap().is_none() {
            self.detach();
        }
    }
}

/// Creates an ext4 image with the files of `root`.
fn image(host: &Host, name: &str, options: &[&str], fill: impl FnOnce(&Path)) -> PathBuf {
    let (root, image) = (host.folder.join(format!("{name}.root")), host.folder.join(name));
    fs::create_dir(&root).unwrap();
    fill(&root);
    let args = [
        &["-q", "-t", "ext4"],
        options,
        &["-d", text(&root), text(&image), "64M"],
    ]
    .concat();
    run("mke2fs", &args);
    image
}

fn base_images(host: &Host) -> Vec<PathBuf> {
    let entries = fs::read_dir(host.folder.join("pool/templates/.grown"))
        .into_iter()
        .flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Asserts that nearly all faults were reached. Only the changed parts of the superblock are
/// written, so a run may make one or two calls fewer than the traced one.
fn assert_reached(reached: usize, faults: usize) {
    assert!(reached + 3 >= faults, "{reached} of {faults} faults were reached");
}

/// Returns all data in an image, without holes.
fn data_of(image: &Path) -> Vec<u8> {
    let mut file = File::open(image).unwrap();
    let size = file.metadata().unwrap().len();
    let (mut at, mut data) = (0, Vec::new());
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start))
            .unwrap()
            .min(size);
        file.seek(SeekFrom::Start(start)).unwrap();
        (&file).take(at - start).read_to_end(&mut data).unwrap();
    }
    data
}

fn create(host: &Host, template: &str, size: u64) -> Result<Vm, (u16, String)> {
    let request = CreateVm {
        disk_size_gib: Some(size),
        ..host.stopped(template)
    };
    let made = host.client().create_vm(&request);
    made.map_err(|error| (error.status().unwrap_or_default(), error.to_string()))
}

/// Creates a host with a template whose growth moves the file `/data`. Returns the content of the
/// file.
fn host_with_a_file_that_is_moved() -> (Host, StandIns, Vec<u8>) {
    let mut host = Host::new(&Options::default());
    let stand_ins = StandIns::new(&host, &["resize2fs"]);
    let noise = (0..10_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes());
    let noise: Vec<u8> = noise.collect();
    // Blocks of the file are where the descriptors of new groups must go.
    let options = ["-b", "1024", "-O", "^resize_inode,^64bit"];
    let image = image(&host, "image", &options, |root| {
        fs::write(root.join("data"), &noise).unwrap()
    });
    host.scaleboxd_ok(&["template", "import", "full", text(&image)]);
    host.serve();
    (host, stand_ins, noise)
}

#[test]
fn a_growth_with_failed_writes_is_rejected_or_leaves_every_file_unchanged() {
    let (host, stand_ins, noise) = host_with_a_file_that_is_moved();
    let dump = host.folder.join("dump");
    let holds_the_file = |vm: &Vm| {
        let _none_yet = fs::remove_file(&dump);
        run(
            "debugfs",
            &["-R", &format!("dump /data {}", text(&dump)), text(&host.disk(vm))],
        );
        fs::read(&dump).is_ok_and(|bytes| bytes == noise)
    };
    let delete = |vm: Option<Vm>| {
        if let Some(vm) = vm {
            host.client().delete_vm(&vm.id).unwrap();
        }
        base_images(&host)
            .iter()
            .for_each(|image| fs::remove_file(image).unwrap());
    };
    let vm = create(&host, "full", 1).unwrap();
    assert!(holds_the_file(&vm));
    let faults = stand_ins.faults("resize2fs");
    delete(Some(vm));
    let (mut reached, mut refused, mut right) = (0, 0, 0);
    for fault in &faults {
        stand_ins.fail(fault);
        let made = create(&host, "full", 1);
        reached += usize::from(stand_ins.failed() > 0);
        match &made {
            Ok(vm) => {
                assert!(holds_the_file(vm), "{fault:?}: the content of the file has changed");
                run("e2fsck", &["-fn", text(&host.disk(vm))]);
                right += 1;
            }
            Err((status, error)) => {
                assert!(
                    *status == 500 && error.contains("the host cannot"),
                    "{fault:?}: {status} {error}"
                );
                assert!(!error.contains(text(&host.folder)), "{fault:?}: {error}");
                assert_eq!(
                    base_images(&host),
                    Vec::<PathBuf>::new(),
                    "{fault:?}: no base image is kept"
                );
                refused += 1;
            }
        }
        delete(made.ok());
    }
    println!(
        "growth: {} calls of resize2fs failed; {refused} rejected, {right} correct",
        faults.len()
    );
    assert!(faults.len() > 50 && refused > 0 && right > 0);
    assert_reached(reached, faults.len());
    stand_ins.clear();
    assert!(
        holds_the_file(&create(&host, "full", 1).unwrap()),
        "without a fault it works"
    );
}

/// Lines of private keys, and as many files that are deleted.
const KEYS: usize = 200;

fn key_line(nth: usize) -> String {
    format!("{:064}-private-key", nth.wrapping_mul(2_654_435_761))
}

/// Returns the secrets that are found in an image.
fn secrets_in(image: &Path) -> Vec<String> {
    let data = data_of(image);
    let found = |needle: &String| data.windows(needle.len()).any(|window| window == needle.as_bytes());
    // All secrets have one word in common, so one search is enough if there is none.
    if !found(&"-private-key".to_owned()) {
        return Vec::new();
    }
    (0..KEYS + 3).map(key_line).filter(found).collect()
}

fn host_with_keys(programs: &[&str]) -> (Host, StandIns, Vm) {
    let mut host = Host::new(&Options::default());
    let stand_ins = StandIns::new(&host, programs);
    let image = image(&host, "image", &["-b", "4096"], |root| {
        fs::create_dir_all(root.join("etc/ssh")).unwrap();
        fs::create_dir_all(root.join("root/.ssh")).unwrap();
        fs::create_dir_all(root.join("var/log/journal/0123")).unwrap();
        for nth in 0..KEYS {
            let lines = (nth..(nth + 3).min(KEYS)).map(key_line).collect::<Vec<_>>().join("\n");
            fs::write(root.join(format!("etc/ssh/ssh_host_{nth}_key")), lines).unwrap();
        }
        fs::write(
            root.join("var/log/journal/0123/system.journal"),
            key_line(0).repeat(999),
        )
        .unwrap();
        fs::write(root.join("etc/hostname"), key_line(1)).unwrap();
        fs::write(root.join("kept"), "kept\n").unwrap();
        for nth in KEYS..KEYS + 3 {
            fs::write(root.join(key_line(nth)), key_line(nth).repeat(3000)).unwrap();
        }
    });
    for nth in KEYS..KEYS + 3 {
        run(
            "debugfs",
            &["-w", "-R", &format!("rm /{}", key_line(nth)), text(&image)],
        );
    }
    assert_eq!(
        secrets_in(&image).len(),
        KEYS + 3,
        "all secrets are found, the deleted ones too"
    );
    host.scaleboxd_ok(&["template", "import", "used", text(&image)]);
    host.serve();
    let vm = host.create_stopped("used", Some(1));
    (host, stand_ins, vm)
}

/// Takes a snapshot and checks the outcome. Returns whether there is a template, which is removed.
fn snapshot(host: &Host, vm: &Vm, fault: &str) -> bool {
    let (status, answer) = host.send(
        "POST",
        &format!("/vms/{}/snapshot", vm.id),
        br#"{"template_name": "derived"}"#,
    );
    let template = host.folder.join("pool/templates/derived.ext4");
    if status == 201 {
        assert_eq!(secrets_in(&template), Vec::<String>::new(), "{fault}");
        run("e2fsck", &["-fn", text(&template)]);
        assert_eq!(
            run("debugfs", &["-R", "cat /kept", text(&template)]),
            "kept\n",
            "{fault}"
        );
        host.client().delete_template("derived").unwrap();
        return true;
    }
    assert_eq!(status, 500, "{fault}: {answer}");
    assert!(!template.exists(), "{fault}: a failed snapshot does not exist");
    assert!(
        !answer.contains("e2fsck -") && !answer.contains("./."),
        "{fault}: {answer}"
    );
    false
}

#[test]
fn a_snapshot_with_failed_calls_contains_no_secrets_or_fails() {
    let programs = ["debugfs", "e2fsck"];
    let (host, stand_ins, vm) = host_with_keys(&programs);
    assert!(snapshot(&host, &vm, "none"));
    let faults: Vec<Fault> = programs
        .into_iter()
        .flat_map(|program| stand_ins.faults(program))
        .collect();
    let (mut reached, mut failed, mut made) = (0, 0, 0);
    for fault in &faults {
        stand_ins.fail(fault);
        match snapshot(&host, &vm, &format!("{fault:?}")) {
            true => made += 1,
            false => failed += 1,
        }
        reached += usize::from(stand_ins.failed() > 0);
    }
    println!(
        "snapshot: {} calls of {programs:?} failed; {failed} failed, {made} created",
        faults.len()
    );
    assert!(faults.len() > 15 && failed > 0);
    assert_reached(reached, faults.len());
    stand_ins.disable();

    // Faults in the daemon's own calls on the clone.
    let partial = host.folder.join("pool/templates/.derived.partial");
    let (mut calls, mut failed) = (0, 0);
    for (call, places) in [
        ("fallocate", &[1, 2, 3, 5, 8, 13, 21, 34][..]),
        ("pwrite64", &[1, 2]),
        ("fsync", &[1]),
        ("lseek", &[1, 9, 99]),
    ] {
        for nth in places {
            let fault = format!("{call}:error=EIO:when={nth}");
            let failing = Failing::of(&host, &partial, &fault);
            let made = snapshot(&host, &vm, &fault);
            let reached = failing.end();
            assert!(*nth > 3 || reached > 0, "{fault} was not reached: {reached} {made}");
            assert!(
                reached == 0 || !made,
                "{fault}: the call failed, but the snapshot did not"
            );
            calls += reached;
            failed += usize::from(!made);
        }
    }
    println!("snapshot: {calls} calls of the daemon failed; {failed} failed");
    assert!(snapshot(&host, &vm, "none any more"));
}

#[test]
fn a_program_that_fails_to_read_or_is_killed_is_not_reported_as_damage() {
    let programs = ["e2fsck", "resize2fs", "debugfs"];
    let (host, stand_ins, vm) = host_with_keys(&programs);
    let image = fs::read(host.folder.join("image")).unwrap();
    let grow = format!("/vms/{}", vm.id);
    let snapshot = format!("/vms/{}/snapshot", vm.id);
    let operations: [(&str, &str, &[u8], &[&str]); 4] = [
        ("POST", "/templates/new/import", &image, &["e2fsck"]),
        ("PATCH", &grow, br#"{"disk_size_gib": 2}"#, &["e2fsck", "resize2fs"]),
        ("POST", "/vms", b"", &["e2fsck", "resize2fs"]),
        (
            "POST",
            &snapshot,
            br#"{"template_name": "derived"}"#,
            &["e2fsck", "debugfs"],
        ),
    ];
    let create = format!(
        "{{\"template\": \"used\", \"ssh_public_key\": \"{}\", \"disk_size_gib\": 3, \"start\": false}}",
        support::KEY
    );
    let faults = [
        "pread64:error=EIO:when=1+ -e inject=read:error=EIO:when=1+",
        "pread64:error=EIO:when=5+ -e inject=read:error=EIO:when=1+",
        "pread64:error=ENOMEM:when=3+ -e inject=read:error=ENOMEM:when=1+",
        "pread64:signal=KILL:when=4",
    ];
    for (method, path, body, of) in operations {
        let body = if path == "/vms" { create.as_bytes() } else { body };
        for program in of {
            for inject in faults {
                let fault = Fault {
                    program,
                    inject: format!("-e inject={inject}"),
                };
                stand_ins.fail(&fault);
                let (status, answer) = host.send(method, path, body);
                assert!(
                    stand_ins.failed() > 0 || inject.contains("signal"),
                    "{fault:?} was not reached"
                );
                assert_eq!(status, 500, "{method} {path}, {fault:?}: {answer}");
                assert!(
                    answer.contains("the host cannot"),
                    "{method} {path}, {fault:?}: {answer}"
                );
                assert!(
                    !answer.contains(text(&host.folder)),
                    "{method} {path}, {fault:?}: {answer}"
                );
            }
        }
    }
    stand_ins.clear();
    let vms = host.client().vms().unwrap();
    assert_eq!(
        (vms.len(), vms[0].disk_size_gib),
        (1, 1),
        "nothing was created, nothing was lost"
    );
    for (method, path, body, _) in operations {
        let body = if path == "/vms" { create.as_bytes() } else { body };
        let (status, answer) = host.send(method, path, body);
        assert!(status < 300, "{method} {path}: {status} {answer}");
    }
}

#[test]
fn a_failed_flush_of_the_templates_folder_changes_nothing() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", Some(1));
    let (templates, image) = (host.folder.join("pool/templates"), host.folder.join("tiny.image"));
    let content = |name: &str| data_of(&templates.join(format!("{name}.ext4")));
    let before = content("tiny");
    let other = host.folder.join("other.image");
    run("mke2fs", &["-q", "-t", "ext4", "-L", "other", text(&other), "64M"]);
    let (bytes, others) = (fs::read(&image).unwrap(), fs::read(&other).unwrap());
    let snapshot = format!("/vms/{}/snapshot", vm.id);
    let operations: [(&str, &str, &[u8]); 4] = [
        ("POST", &snapshot, br#"{"template_name": "new"}"#),
        ("POST", "/templates/new/import", &bytes),
        ("POST", "/templates/tiny/import?replace=true", &others),
        ("DELETE", "/templates/tiny", b""),
    ];
    let names = |host: &Host| -> Vec<String> {
        let templates = host.client().templates().unwrap();
        templates.into_iter().map(|template| template.name).collect()
    };
    // Makes the flush fail, and the opening before it.
    for fault in ["fsync:error=EIO", "openat:error=EMFILE"] {
        for (method, path, body) in operations {
            let failing = Failing::of(&host, &templates, fault);
            let (status, answer) = host.send(method, path, body);
            assert!(
                failing.end() > 0,
                "{fault}: {method} {path} did not reach it: {status} {answer}"
            );
            assert_eq!(status, 500, "{fault}: {method} {path}: {answer}");
            for restarted in [false, true] {
                if restarted {
                    host.crash();
                    host.serve();
                }
                assert_eq!(names(&host), ["tiny"], "{fault}: {method} {path}, {restarted}");
                assert!(content("tiny") == before, "{fault}: {method} {path}, {restarted}");
            }
            let left: Vec<_> = fs::read_dir(&templates)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            assert!(
                left.iter().all(|name| !text(Path::new(name)).contains("partial")),
                "{left:?}"
            );
        }
    }
    for (method, path, body) in operations {
        let (status, answer) = host.send(method, path, body);
        assert!(
            status < 300 || answer.contains("new exists already"),
            "{method} {path}: {status} {answer}"
        );
    }
    assert_eq!(names(&host), ["new"]);
}
