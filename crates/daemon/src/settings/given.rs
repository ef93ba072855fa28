//! The values that are set, as text, and their parsers.

use crate::settings::error::SettingsError;
use crate::settings::table::{self, DefaultValue, Form};
use std::collections::HashMap;
use std::path::PathBuf;
use std::str::FromStr;

/// The place that a value was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A variable of the environment.
    Environment,
    /// The configuration file.
    File,
}

/// The values that are set, by key.
#[derive(Debug, Default)]
pub(crate) struct Given(HashMap<&'static str, (String, Source)>);

impl Given {
    /// Sets a value, and replaces the value of another source.
    pub(crate) fn set(&mut self, key: &'static str, value: String, source: Source) {
        self.0.insert(key, (value, source));
    }

    /// Returns the value, if it is set.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(|(value, _)| value.as_str())
    }

    /// Returns the source of the value, if it is set.
    pub(crate) fn source(&self, key: &str) -> Option<Source> {
        self.0.get(key).map(|(_, source)| *source)
    }

    /// Returns the value, or the default in the table; `None` if neither exists.
    pub(crate) fn get_or_default(&self, key: &str) -> Option<&str> {
        let default = || match table::find(key)?.default {
            DefaultValue::Fixed(value) => Some(value),
            DefaultValue::Depends(_) => None,
        };
        self.get(key).or_else(default)
    }

    /// Returns the error that the value cannot be used; it does not show the token.
    pub(crate) fn wrong(&self, key: &'static str, expected: impl Into<String>) -> SettingsError {
        let value = match key {
            table::SECRET => "…",
            _ => self.get(key).unwrap_or_default(),
        };
        SettingsError::Value {
            key,
            value: value.to_owned(),
            expected: expected.into(),
        }
    }

    /// Returns the error that the value does not have the form in the table.
    pub(crate) fn malformed(&self, key: &'static str) -> SettingsError {
        self.wrong(key, table::requirement(key))
    }

    /// Parses a whole number.
    pub(crate) fn number<T: TryFrom<u64>>(&self, key: &'static str) -> Result<T, SettingsError> {
        let is_allowed = |number: &u64| match table::find(key).map(|setting| &setting.form) {
            Some(Form::Number(range)) => range.contains(number),
            _ => false,
        };
        let number = self.get_or_default(key).and_then(|text| text.parse().ok());
        let number = number.filter(is_allowed).and_then(|number| number.try_into().ok());
        number.ok_or_else(|| self.malformed(key))
    }

    /// Returns the word of the table that is set.
    pub(crate) fn word(&self, key: &'static str) -> Result<&'static str, SettingsError> {
        let words = match table::find(key).map(|setting| &setting.form) {
            Some(Form::Word(words)) => *words,
            _ => &[],
        };
        let text = self.get_or_default(key);
        let word = words.iter().find(|word| Some(**word) == text);
        word.copied().ok_or_else(|| self.malformed(key))
    }

    /// Parses an absolute path.
    pub(crate) fn path(&self, key: &'static str) -> Result<PathBuf, SettingsError> {
        let path = self.get_or_default(key).map(PathBuf::from);
        path.filter(|path| path.is_absolute())
            .ok_or_else(|| self.malformed(key))
    }

    /// Parses a value with a parser of its own; `None` if it is not set and has no default.
    pub(crate) fn parsed<T: FromStr>(&self, key: &'static str) -> Result<Option<T>, SettingsError> {
        let text = self.get_or_default(key);
        text.map(|text| text.parse().map_err(|_| self.malformed(key)))
            .transpose()
    }
}
