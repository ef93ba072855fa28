//! Measures the length of functions.

use crate::sources::{Crate, is_test};
use std::path::Path;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// Lists functions with more than `max` lines, and tests with more than `max_in_tests`; one line
/// each.
///
/// The lines from the signature to the closing brace count.
pub(crate) fn longer_than(read: &Crate, max: usize, max_in_tests: usize) -> Vec<String> {
    let mut long = Vec::new();
    for source in read.files.values() {
        let mut lengths = Lengths {
            path: &source.path,
            max,
            max_in_tests,
            in_tests: false,
            long: &mut long,
        };
        lengths.visit_file(&source.syntax);
    }
    long
}

struct Lengths<'a> {
    path: &'a Path,
    max: usize,
    max_in_tests: usize,
    in_tests: bool,
    long: &'a mut Vec<String>,
}

impl Lengths<'_> {
    fn measure(&mut self, signature: &syn::Signature, body: &syn::Block, is_test: bool) {
        let lines = body.span().end().line + 1 - signature.span().start().line;
        let max = match is_test || self.in_tests {
            true => self.max_in_tests,
            false => self.max,
        };
        if lines > max {
            let (path, name) = (self.path.display(), &signature.ident);
            self.long
                .push(format!("{path}: {name} has {lines} lines, more than {max}"));
        }
    }
}

impl<'syntax> Visit<'syntax> for Lengths<'_> {
    fn visit_item_fn(&mut self, item: &'syntax syn::ItemFn) {
        self.measure(&item.sig, &item.block, is_test(&item.attrs));
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'syntax syn::ImplItemFn) {
        self.measure(&item.sig, &item.block, is_test(&item.attrs));
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_item_mod(&mut self, item: &'syntax syn::ItemMod) {
        let outer = self.in_tests;
        self.in_tests |= is_test(&item.attrs);
        visit::visit_item_mod(self, item);
        self.in_tests = outer;
    }
}

#[test]
fn a_long_function_is_reported() {
    let body = "\n    g();".repeat(5);
    let text = format!("fn f() {{{body}\n}}\n#[cfg(test)]\nmod tests {{\n#[test]\nfn t() {{{body}\n}}\n}}\n");
    let read = Crate::parse(vec![("lib.rs".into(), text)]);
    assert_eq!(longer_than(&read, 7, 7), Vec::<String>::new());
    assert_eq!(longer_than(&read, 6, 7), ["lib.rs: f has 7 lines, more than 6"]);
    assert_eq!(longer_than(&read, 6, 6).len(), 2);
}
