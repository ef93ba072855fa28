//! Finds words and phrases in the texts of a crate.

use crate::sources::{Crate, is_test};
use std::collections::BTreeSet;
use std::path::Path;
use syn::visit::{self, Visit};

/// Lists the texts of a crate that contain one of `phrases` or, as a whole word, one of `words`.
/// Each is one line. Tests and comments are not searched.
pub(crate) fn naming(read: &Crate, words: &BTreeSet<String>, phrases: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for source in read.files.values() {
        let mut texts = Texts {
            path: &source.path,
            words,
            phrases,
            found: &mut found,
        };
        texts.visit_file(&source.syntax);
    }
    found
}

/// Returns the texts of literals `key: "TEXT"` in a file, outside its tests and comments.
pub(crate) fn keys(file: &syn::File) -> BTreeSet<String> {
    let mut keys = Keys::default();
    keys.visit_file(file);
    keys.0
}

struct Texts<'a> {
    path: &'a Path,
    words: &'a BTreeSet<String>,
    phrases: &'a [&'a str],
    found: &'a mut Vec<String>,
}

impl Texts<'_> {
    fn check(&mut self, text: &str) {
        let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        let mut named = text.split(|letter| !is_part(letter));
        let names_word = named.any(|word| self.words.contains(word));
        if names_word || self.phrases.iter().any(|phrase| text.contains(phrase)) {
            self.found.push(format!("{}: {text}", self.path.display()));
        }
    }
}

impl<'syntax> Visit<'syntax> for Texts<'_> {
    fn visit_lit_str(&mut self, text: &'syntax syn::LitStr) {
        self.check(&text.value());
    }

    /// Checks the texts of `#[error("…")]`, but not of doc comments.
    fn visit_attribute(&mut self, attribute: &'syntax syn::Attribute) {
        if let syn::Meta::List(list) = &attribute.meta {
            self.check(&list.tokens.to_string());
        }
    }

    fn visit_macro(&mut self, call: &'syntax syn::Macro) {
        self.check(&call.tokens.to_string());
    }

    fn visit_item_mod(&mut self, item: &'syntax syn::ItemMod) {
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

#[derive(Default)]
struct Keys(BTreeSet<String>);

impl<'syntax> Visit<'syntax> for Keys {
    fn visit_field_value(&mut self, field: &'syntax syn::FieldValue) {
        let is_key = matches!(&field.member, syn::Member::Named(name) if name == "key");
        if let syn::Expr::Lit(value) = &field.expr
            && let syn::Lit::Str(text) = &value.lit
            && is_key
        {
            self.0.insert(text.value());
        }
        visit::visit_field_value(self, field);
    }
}

#[test]
fn texts_that_name_a_word_or_a_phrase_are_reported() {
    let text = r##"
        /// Set DATA_DIR.
        #[derive(Debug)]
        enum Error {
            #[error("no pool: set DATA_DIR")]
            Attribute,
            #[error("METADATA_DIR is fine")]
            LongerWord,
        }
        fn f() {
            let _ = format!("{x}: run apt-get install {y}");
            let _ = "a literal: DATA_DIR";
        }
        #[cfg(test)]
        mod tests {
            const TEXT: &str = "DATA_DIR";
        }
    "##;
    let read = Crate::parse(vec![("lib.rs".into(), text.to_owned())]);
    let words = BTreeSet::from(["DATA_DIR".to_owned()]);
    assert_eq!(naming(&read, &words, &["apt-get install"]).len(), 3);
    assert_eq!(naming(&read, &words, &[]).len(), 2);
    assert_eq!(naming(&read, &BTreeSet::new(), &["no such phrase"]).len(), 0);
}
