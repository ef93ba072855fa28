//! Finds dependencies that the floor plan does not allow.

use crate::sources::{Crate, ModulePath};
use std::collections::{BTreeMap, BTreeSet};

/// Lists uses of a folder that is not before the user's own in `order`; one line each.
///
/// Files at the crate's root are free. A folder that is not in `order` is reported as well.
pub(crate) fn between_folders(read: &Crate, order: &[&str]) -> Vec<String> {
    let mut upward = Vec::new();
    for (module, source) in &read.files {
        let Some(folder) = module.first() else { continue };
        let Some(own) = order.iter().position(|name| name == folder) else {
            upward.push(format!("{}: not in a folder of the floor plan", source.path.display()));
            continue;
        };
        for used in read.uses(module) {
            let found = used
                .first()
                .and_then(|folder| order.iter().position(|name| name == folder));
            if found.is_none_or(|found| found > own) {
                upward.push(format!("{} uses {}", source.path.display(), name(&used)));
            }
        }
    }
    upward
}

/// Lists dependency cycles: groups of files that use one another, directly or through other files
/// of the group.
pub(crate) fn rings(read: &Crate) -> Vec<Vec<String>> {
    let uses: BTreeMap<_, _> = read.files.keys().map(|module| (module, read.uses(module))).collect();
    let reached: BTreeMap<_, _> = uses.keys().map(|module| (*module, reach(module, &uses))).collect();
    let mut rings: BTreeSet<Vec<String>> = BTreeSet::new();
    for (module, from_here) in &reached {
        if from_here.contains(*module) {
            let together = from_here.iter().filter(|other| reached[other].contains(*module));
            rings.insert(together.map(name).collect());
        }
    }
    rings.into_iter().collect()
}

fn reach(from: &ModulePath, uses: &BTreeMap<&ModulePath, BTreeSet<ModulePath>>) -> BTreeSet<ModulePath> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<&ModulePath> = uses[from].iter().collect();
    while let Some(module) = next.pop() {
        if reached.insert(module.clone()) {
            next.extend(&uses[module]);
        }
    }
    reached
}

fn name(module: &ModulePath) -> String {
    match module.is_empty() {
        true => "the crate's root".to_owned(),
        false => module.join("::"),
    }
}

fn parsed(files: &[(&str, &str)]) -> Crate {
    Crate::parse(
        files
            .iter()
            .map(|(path, text)| ((*path).into(), (*text).to_owned()))
            .collect(),
    )
}

#[test]
fn an_upward_use_is_reported() {
    let order = ["state", "vm"];
    let files = |upward: &'static str| {
        parsed(&[
            ("main.rs", "mod state; mod vm; use vm::create;"),
            ("state/mod.rs", upward),
            ("vm/mod.rs", "pub mod create;"),
            ("vm/create.rs", "use crate::state::State;"),
        ])
    };
    assert_eq!(
        between_folders(&files("pub struct State;"), &order),
        Vec::<String>::new()
    );
    for upward in [
        "use crate::vm::create;",
        "fn f() { crate::vm::create::g() }",
        "use super::vm;",
        "use crate::{vm::create};",
    ] {
        assert_eq!(between_folders(&files(upward), &order).len(), 1, "{upward}");
    }
    assert_eq!(
        between_folders(&files("#[cfg(test)] mod tests { use crate::vm::create; }"), &order),
        Vec::<String>::new()
    );
}

#[test]
fn a_file_outside_the_folders_is_reported() {
    let read = parsed(&[("main.rs", "mod attic;"), ("attic.rs", "")]);
    assert_eq!(between_folders(&read, &["state"]).len(), 1);
}

#[test]
fn a_ring_is_found_also_through_a_name_that_the_root_passes_on() {
    let files = |used: &'static str| {
        parsed(&[
            (
                "lib.rs",
                "mod error; mod http; mod size; pub use error::Error; pub use http::Client;",
            ),
            ("error.rs", used),
            ("http.rs", "use crate::Error; use crate::size::Size;"),
            ("size.rs", "pub struct Size;"),
        ])
    };
    for unused in ["pub struct Error;", "pub(crate) struct Error;"] {
        assert_eq!(rings(&files(unused)), Vec::<Vec<String>>::new(), "{unused}");
    }
    for used in ["use crate::Client;", "use crate::http::Client;"] {
        assert_eq!(rings(&files(used)), [["error", "http"]], "{used}");
    }
}
