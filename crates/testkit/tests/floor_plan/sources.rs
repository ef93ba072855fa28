//! The source files of a crate, parsed, and the files that each of them uses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, Meta, UseTree};

/// A module's path in its crate; the crate's root is the empty one.
pub(crate) type ModulePath = Vec<String>;

/// A crate's source files.
pub(crate) struct Crate {
    pub files: BTreeMap<ModulePath, Source>,
}

pub(crate) struct Source {
    /// The path of the file, relative to the crate's folder.
    pub path: PathBuf,
    pub syntax: syn::File,
    /// The names that the file exports from other modules (`pub use`), with their paths.
    exports: BTreeMap<String, ModulePath>,
}

impl Crate {
    /// Reads all files below `folder`.
    pub(crate) fn read(folder: &Path) -> Crate {
        let mut texts = Vec::new();
        collect(folder, folder, &mut texts);
        assert!(!texts.is_empty(), "{}: no Rust files", folder.display());
        Crate::parse(texts)
    }

    /// Parses the texts of files with these paths, like [`Crate::read`].
    pub(crate) fn parse(texts: Vec<(PathBuf, String)>) -> Crate {
        let files = texts.into_iter().map(|(path, text)| {
            let syntax = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let source = Source {
                exports: BTreeMap::new(),
                syntax,
                path: path.clone(),
            };
            (module_of(&path), source)
        });
        let mut read = Crate { files: files.collect() };
        let modules: Vec<ModulePath> = read.files.keys().cloned().collect();
        for module in modules {
            let exports = read.exports_of(&module);
            if let Some(source) = read.files.get_mut(&module) {
                source.exports = exports;
            }
        }
        read
    }

    /// Returns the files that the file of `module` uses, outside its tests.
    pub(crate) fn uses(&self, module: &ModulePath) -> BTreeSet<ModulePath> {
        let paths = self.paths(module);
        let found = paths.iter().filter_map(|path| self.resolve(module, path));
        found.filter(|used| used != module).collect()
    }

    /// Returns whether the file of `module` names `path`, or an item in it, outside its tests.
    pub(crate) fn names(&self, module: &ModulePath, path: &[&str]) -> bool {
        let found = self.paths(module);
        found
            .iter()
            .any(|found| found.windows(path.len()).any(|part| part == path))
    }

    /// Returns the paths in the file of `module`, as written there, outside its tests.
    fn paths(&self, module: &ModulePath) -> Vec<Vec<String>> {
        let mut paths = Paths::default();
        for item in &self.files[module].syntax.items {
            if !is_test(item_attributes(item)) {
                paths.visit_item(item);
            }
        }
        paths.found
    }

    fn exports_of(&self, module: &ModulePath) -> BTreeMap<String, ModulePath> {
        let mut exports = BTreeMap::new();
        for item in &self.files[module].syntax.items {
            let Item::Use(item) = item else { continue };
            if matches!(item.vis, syn::Visibility::Inherited) {
                continue;
            }
            for (path, name) in leaves(item) {
                if let Some(target) = self.nearest(&absolute(module, &path, &self.files)) {
                    exports.insert(name, target);
                }
            }
        }
        exports
    }

    /// Returns the file with the item that `path`, as written in `module`, names; `None` for other
    /// crates.
    fn resolve(&self, module: &ModulePath, path: &[String]) -> Option<ModulePath> {
        if !matches!(path.first()?.as_str(), "crate" | "self" | "super") && !self.is_child(module, &path[0]) {
            return None;
        }
        let whole = absolute(module, path, &self.files);
        let file = self.nearest(&whole)?;
        // A name that the file only exports belongs to the file that defines it.
        match whole
            .get(file.len())
            .and_then(|name| self.files[&file].exports.get(name))
        {
            Some(origin) => Some(origin.clone()),
            None => Some(file),
        }
    }

    fn is_child(&self, module: &ModulePath, name: &str) -> bool {
        let mut child = module.clone();
        child.push(name.to_owned());
        self.files.contains_key(&child)
    }

    /// Returns the file of `path`, or of the nearest module above it.
    fn nearest(&self, path: &[String]) -> Option<ModulePath> {
        (0..=path.len())
            .rev()
            .map(|length| path[..length].to_vec())
            .find(|path| self.files.contains_key(path))
    }
}

fn collect(root: &Path, folder: &Path, texts: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, texts);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            texts.push((path.strip_prefix(root).unwrap().to_owned(), text));
        }
    }
}

/// Returns the module of a file: `vm` for `vm/mod.rs` and `vm.rs`, the root for `lib.rs` and
/// `main.rs`.
fn module_of(path: &Path) -> ModulePath {
    let text = path.with_extension("").to_str().unwrap().replace('/', "::");
    let mut module: ModulePath = text.split("::").map(str::to_owned).collect();
    let is_root = module.len() == 1 && matches!(module[0].as_str(), "lib" | "main");
    if is_root || module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    module
}

/// Returns the path from the crate's root.
fn absolute(module: &ModulePath, path: &[String], files: &BTreeMap<ModulePath, Source>) -> ModulePath {
    let mut base = module.clone();
    let mut rest = path;
    while let Some(first) = rest.first() {
        match first.as_str() {
            "crate" => base.clear(),
            "self" => {}
            "super" => drop(base.pop()),
            _ => break,
        }
        rest = &rest[1..];
    }
    debug_assert!(files.contains_key(module));
    base.extend(rest.iter().cloned());
    base
}

/// Returns the paths that a `use` item names, each with the name that the item defines.
fn leaves(item: &ItemUse) -> Vec<(Vec<String>, String)> {
    fn walk(tree: &UseTree, at: &mut Vec<String>, found: &mut Vec<(Vec<String>, String)>) {
        match tree {
            UseTree::Path(path) => {
                at.push(path.ident.to_string());
                walk(&path.tree, at, found);
                at.pop();
            }
            UseTree::Name(name) if name.ident == "self" => {
                found.push((at.clone(), at.last().cloned().unwrap_or_default()));
            }
            UseTree::Name(name) => {
                let name = name.ident.to_string();
                found.push(([at.clone(), vec![name.clone()]].concat(), name));
            }
            UseTree::Rename(rename) => {
                let path = [at.clone(), vec![rename.ident.to_string()]].concat();
                found.push((path, rename.rename.to_string()));
            }
            UseTree::Glob(_) => found.push((at.clone(), "*".to_owned())),
            UseTree::Group(group) => group.items.iter().for_each(|tree| walk(tree, at, found)),
        }
    }
    let mut found = Vec::new();
    walk(&item.tree, &mut Vec::new(), &mut found);
    found
}

#[derive(Default)]
struct Paths {
    found: Vec<Vec<String>>,
}

impl<'syntax> Visit<'syntax> for Paths {
    fn visit_item_use(&mut self, item: &'syntax ItemUse) {
        self.found.extend(leaves(item).into_iter().map(|(path, _)| path));
    }

    fn visit_path(&mut self, path: &'syntax syn::Path) {
        self.found
            .push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    // `pub(crate)` uses nothing.
    fn visit_visibility(&mut self, _: &'syntax syn::Visibility) {}

    fn visit_item_mod(&mut self, item: &'syntax ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'syntax syn::ItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }
}

/// Returns whether an item is for tests alone.
pub(crate) fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let path = attribute.path();
        let is_cfg_test = path.is_ident("cfg")
            && matches!(&attribute.meta, Meta::List(list) if list.tokens.to_string().contains("test"));
        is_cfg_test || path.segments.last().is_some_and(|segment| segment.ident == "test")
    })
}

fn item_attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Mod(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        _ => &[],
    }
}
