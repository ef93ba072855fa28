//! The floor plan of the workspace: arrows point down, between crates, between the daemon's folders
//! and between the files of a crate; and functions are short.
//!
//! An arrow from A to B means that A uses B. The lists below are ordered from the ground floor up:
//! an entry may use what stands above it in its list. `docs/architecture.md` describes the rooms.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a check that cannot read the sources must fail"
)]

mod arrows;
mod functions;
mod sources;

use sources::Crate;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// The crates, by floor. A crate uses crates of lower floors only; tests may use any.
const CRATE_FLOORS: &[&[&str]] = &[
    &["scalebox-agent-api", "scalebox-fault-points"],
    &["scalebox-mounts", "scalebox-programs", "scalebox-units"],
    &["scalebox-storage", "scalebox-net", "scalebox-api"],
    &["scalebox-vmm", "scalebox-guest", "scalebox-images", "scalebox-client"],
    &["scalebox-agent"],
    &["scalebox-testkit"],
    &["scaleboxd", "scalebox", "scalebox-bench"],
];

/// The folders of the daemon. The files of one use folders before it only; `main.rs` uses any.
const DAEMON_FOLDERS: &[&str] = &[
    "settings",
    "state",
    "host",
    "pool",
    "templates",
    "vm",
    "watch",
    "http",
    "commands",
    "simulated",
];

/// The files that start a process themselves, because it outlives them or replaces them: a machine,
/// and `ssh`; and the agent, which runs commands in the guest, not on the host. All other programs
/// are run through `scalebox-programs`.
const STARTS_PROCESSES: &[&str] = &[
    "agent/src/exec/launch.rs",
    "cli/src/ssh.rs",
    "vmm/src/firecracker/binary.rs",
    "vmm/src/qemu/binary.rs",
    "vmm/src/supervise/launch.rs",
];

const MAX_LINES: usize = 60;
const MAX_LINES_IN_TESTS: usize = 80;

#[test]
fn crates_use_crates_of_lower_floors_only() {
    let floor = |name: &str| {
        let floor = CRATE_FLOORS.iter().position(|floor| floor.contains(&name));
        floor.unwrap_or_else(|| panic!("{name} has no floor: enter it in CRATE_FLOORS"))
    };
    let dependencies = workspace_dependencies();
    assert!(dependencies.len() > 5, "{dependencies:?}");
    for (name, uses) in &dependencies {
        for used in uses {
            assert!(
                floor(used) < floor(name),
                "{name} uses {used}, which is not on a lower floor"
            );
        }
    }
}

#[test]
fn folders_of_the_daemon_use_folders_below_them_only() {
    let daemon = Crate::read(&workspace().join("crates/daemon/src"));
    let upward = arrows::between_folders(&daemon, DAEMON_FOLDERS);
    assert!(upward.is_empty(), "{}", upward.join("\n"));
}

#[test]
fn no_ring_of_files_uses_itself() {
    for folder in source_folders() {
        let found = arrows::rings(&Crate::read(&folder));
        let name = folder.strip_prefix(workspace()).unwrap().to_str().unwrap();
        let rings: Vec<_> = found.iter().map(|ring| ring.join(" -> ")).collect();
        assert!(rings.is_empty(), "{name}: {}", rings.join("\n"));
    }
}

#[test]
fn outside_programs_are_run_through_one_crate() {
    let mut found = Vec::new();
    for folder in source_folders() {
        let name = folder.parent().and_then(Path::file_name).unwrap().to_str().unwrap();
        // The benchmark measures programs.
        if ["bench", "programs"].contains(&name) {
            continue;
        }
        let read = Crate::read(&folder);
        for (module, source) in &read.files {
            let is_test = module.last().is_some_and(|name| name == "tests");
            if !is_test && read.names(module, &["process", "Command"]) {
                found.push(format!("{name}/src/{}", source.path.display()));
            }
        }
    }
    found.sort();
    assert_eq!(found, STARTS_PROCESSES);
}

#[test]
fn functions_are_short() {
    let mut long = Vec::new();
    for folder in source_folders() {
        long.extend(functions::longer_than(
            &Crate::read(&folder),
            MAX_LINES,
            MAX_LINES_IN_TESTS,
        ));
        let tests = folder.with_file_name("tests");
        if tests.is_dir() {
            long.extend(functions::longer_than(
                &Crate::read(&tests),
                MAX_LINES_IN_TESTS,
                MAX_LINES_IN_TESTS,
            ));
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap()
}

/// The `src` folders of all crates.
fn source_folders() -> Vec<std::path::PathBuf> {
    let crates = std::fs::read_dir(workspace().join("crates")).unwrap();
    let folders = crates.map(|entry| entry.unwrap().path().join("src"));
    folders.chain([workspace().join("bench/src")]).collect()
}

/// The crates of the workspace that each of them is built with, apart from its tests.
fn workspace_dependencies() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--locked", "--format-version", "1"])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap().to_owned();
    let packages = metadata["packages"].as_array().unwrap();
    let uses = |package: &serde_json::Value| {
        let all = package["dependencies"].as_array().unwrap();
        let built = all
            .iter()
            .filter(|used| used["kind"].is_null() && !used["path"].is_null());
        built.map(name).collect()
    };
    packages.iter().map(|package| (name(package), uses(package))).collect()
}
