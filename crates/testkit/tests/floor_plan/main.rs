//! Checks the floor plan of the workspace. Dependencies point down, between crates and between the
//! daemon's folders; the files of a crate have no dependency cycle; functions are short; and the
//! texts of libraries state facts.
//!
//! The lists below are ordered from the ground floor up: an entry may use the entries above it in
//! its list. `docs/architecture.md` describes the crates and folders.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a check that cannot read the sources must fail"
)]

mod arrows;
mod functions;
mod sources;
mod texts;

use sources::Crate;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// The crates, by floor. A crate uses crates of lower floors only; tests may use any.
const CRATE_FLOORS: &[&[&str]] = &[
    &["scalebox-agent-api", "scalebox-agent-binary", "scalebox-fault-points"],
    &["scalebox-mounts", "scalebox-programs", "scalebox-units"],
    &["scalebox-storage", "scalebox-net", "scalebox-api"],
    &["scalebox-vmm", "scalebox-guest", "scalebox-images", "scalebox-client"],
    &["scalebox-agent"],
    &["scalebox-testkit"],
    &["scaleboxd", "scalebox", "scalebox-bench"],
];

/// The folders of the daemon. A file uses only folders before its own; `main.rs` uses any.
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

/// The files that start processes without `scalebox-programs`. A machine outlives its daemon, `ssh`
/// replaces `scalebox`, and the agent runs commands in the guest, not on the host. All other files
/// run programs through that crate.
const STARTS_PROCESSES: &[&str] = &[
    "agent/src/exec/launch.rs",
    "agent/src/init/agent_process.rs",
    "agent/src/init/mod.rs",
    "agent/src/system/shutdown.rs",
    "cli/src/ssh.rs",
    "vmm/src/firecracker/binary.rs",
    "vmm/src/qemu/binary.rs",
    "vmm/src/supervise/launch.rs",
];

/// The crates that state facts. `host/advice.rs` of the daemon adds the remedies for their errors.
const STATE_FACTS: &[&str] = &[
    "guest", "images", "mounts", "net", "programs", "storage", "units", "vmm",
];

/// Words of the daemon's advice, apart from settings.
const ADVICE: &[&str] = &["apt-get install", "`scalebox", "scaleboxd pool", "--replace"];

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
    let mut found = Vec::new();
    for folder in source_folders() {
        let name = folder.strip_prefix(workspace()).unwrap().to_str().unwrap();
        let rings = arrows::rings(&Crate::read(&folder));
        found.extend(rings.iter().map(|ring| format!("{name}: {}", ring.join(" -> "))));
    }
    assert!(found.is_empty(), "{found:#?}");
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
            let is_test = module.last().is_some_and(|name| name.ends_with("tests"));
            if !is_test && read.names(module, &["process", "Command"]) {
                found.push(format!("{name}/src/{}", source.path.display()));
            }
        }
    }
    found.sort();
    assert_eq!(found, STARTS_PROCESSES);
}

#[test]
fn libraries_name_no_setting_or_command_of_the_daemon() {
    let daemon = Crate::read(&workspace().join("crates/daemon/src"));
    let table = ["settings".to_owned(), "table".to_owned()].to_vec();
    let settings = texts::keys(&daemon.files[&table].syntax);
    assert!(
        settings.len() > 20 && settings.contains("DATA_DIR") && settings.contains("SUBNET"),
        "{settings:?}"
    );
    for name in STATE_FACTS {
        let read = Crate::read(&workspace().join("crates").join(name).join("src"));
        let found = texts::naming(&read, &settings, ADVICE);
        assert!(found.is_empty(), "{name}: {}", found.join("\n"));
    }
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

/// Returns the `src` folders of all crates.
fn source_folders() -> Vec<std::path::PathBuf> {
    let crates = std::fs::read_dir(workspace().join("crates")).unwrap();
    let folders = crates.map(|entry| entry.unwrap().path().join("src"));
    folders.chain([workspace().join("bench/src")]).collect()
}

/// Returns the dependencies of each crate in the workspace, except those of its tests.
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
