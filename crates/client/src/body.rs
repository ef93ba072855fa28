//! Reading a request's body: a JSON object whose fields are all known, each given once and none of
//! them null.
//!
//! The fields are kept as text until the rule of each reads its own. So a number that no integer
//! holds (`1e400`) is judged as what it is, a value out of range, and the sentence that refuses it
//! names the field.

use scalebox_units::InvalidFormat;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// What is wrong with a request; the answer is a 400 with this sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Nothing, or only white space.
    #[error("the request has no body: send a JSON object with {}", known.join(", "))]
    NoBody {
        /// The fields that the request may have.
        known: &'static [&'static str],
    },
    /// Not JSON.
    #[error("the body is not JSON: {why}")]
    NotJson {
        /// The reader's words, with line and column.
        why: String,
    },
    /// JSON, but an array or a bare value.
    #[error("the body must be a JSON object with {}; this is {kind}", known.join(", "))]
    NotAnObject {
        /// `an array`, `a string` …
        kind: &'static str,
        /// The fields that the request may have.
        known: &'static [&'static str],
    },
    /// A field twice: which of the two counts would be a guess.
    #[error("the field {0:?} is given twice")]
    Duplicate(String),
    /// Fields that no rule reads, all of them.
    #[error("{list}; the fields are {}", known.join(", "))]
    Unknown {
        /// The names, each with the one that was perhaps meant.
        list: String,
        /// The fields that the request may have.
        known: &'static [&'static str],
    },
    /// A field that must be there.
    #[error("{field} is missing: {what}")]
    Missing {
        /// The field.
        field: &'static str,
        /// What to send in it.
        what: &'static str,
    },
    /// `disk_size_gib` outside its bounds, in the words of the seed document, whatever the value
    /// was.
    #[error("disk_size_gib must be between 1 and {max}")]
    DiskSize {
        /// `MAX_DISK_SIZE_GIB`.
        max: u64,
    },
    /// Another number outside its bounds, or no whole number.
    #[error("{field} must be a whole number between {least} and {most}")]
    Number {
        /// The field.
        field: &'static str,
        /// The smallest value allowed.
        least: u64,
        /// The largest value allowed.
        most: u64,
    },
    /// A change that changes nothing.
    #[error("there is nothing to change: send at least one of {}", known.join(", "))]
    Nothing {
        /// The fields that the request may have.
        known: &'static [&'static str],
    },
    /// A value of another type than the field's.
    #[error("{field} must be {expected}, not {kind}")]
    Type {
        /// The field.
        field: &'static str,
        /// `a string`, `true or false`, `an object`.
        expected: &'static str,
        /// `an array`, `null` …
        kind: &'static str,
    },
    /// A string of the wrong form.
    #[error("{field} {form}")]
    Form {
        /// The field.
        field: &'static str,
        /// What the form is.
        form: InvalidFormat,
    },
}

impl Invalid {
    /// The field that the error is about; `None` where it is about the body as a whole, or several
    /// fields.
    pub fn field(&self) -> Option<&str> {
        match self {
            Invalid::Missing { field, .. }
            | Invalid::Number { field, .. }
            | Invalid::Type { field, .. }
            | Invalid::Form { field, .. } => Some(field),
            Invalid::DiskSize { .. } => Some("disk_size_gib"),
            Invalid::Duplicate(field) => Some(field),
            Invalid::NoBody { .. }
            | Invalid::NotJson { .. }
            | Invalid::NotAnObject { .. }
            | Invalid::Unknown { .. }
            | Invalid::Nothing { .. } => None,
        }
    }
}

/// The fields of a body, each as the JSON text of its value.
#[derive(Debug)]
pub(crate) struct Fields<'a>(BTreeMap<String, &'a str>);

impl<'a> Fields<'a> {
    /// Reads an object that has no other fields than those in `known`.
    pub(crate) fn read(body: &'a [u8], known: &'static [&'static str]) -> Result<Self, Invalid> {
        let body = without_mark(body);
        if body.trim_ascii().is_empty() {
            return Err(Invalid::NoBody { known });
        }
        let value: &RawValue = serde_json::from_slice(body).map_err(not_json)?;
        if !value.get().starts_with('{') {
            return Err(Invalid::NotAnObject {
                kind: kind(value.get()),
                known,
            });
        }
        Fields::of(value.get(), known, |name| name)
    }

    /// The members of an object, called by what `path` makes of their names.
    fn of(object: &'a str, known: &'static [&'static str], path: impl Fn(String) -> String) -> Result<Self, Invalid> {
        let Pairs(pairs) = serde_json::from_str(object).map_err(not_json)?;
        let mut fields = BTreeMap::new();
        for (name, value) in pairs {
            let name = path(name);
            if fields.contains_key(&name) {
                return Err(Invalid::Duplicate(shortened(&name)));
            }
            fields.insert(name, value.get());
        }
        refuse_unknown(fields.keys(), known)?;
        Ok(Fields(fields))
    }

    /// The field's JSON text, which is there.
    fn required(&self, field: &'static str, what: &'static str) -> Result<&'a str, Invalid> {
        self.0.get(field).copied().ok_or(Invalid::Missing { field, what })
    }

    /// Refuses a request without `field`; the value is not looked at.
    pub(crate) fn require(&self, field: &'static str, what: &'static str) -> Result<(), Invalid> {
        self.required(field, what).map(drop)
    }

    /// A string that must be there, in the form of `T`.
    pub(crate) fn text<T: FromStr<Err = InvalidFormat>>(
        &self,
        field: &'static str,
        what: &'static str,
    ) -> Result<T, Invalid> {
        read_text(field, self.required(field, what)?)
    }

    /// A string, if it is there, in the form of `T`.
    pub(crate) fn optional_text<T: FromStr<Err = InvalidFormat>>(
        &self,
        field: &'static str,
    ) -> Result<Option<T>, Invalid> {
        self.0.get(field).map(|json| read_text(field, json)).transpose()
    }

    /// A whole number that must be there.
    pub(crate) fn number(
        &self,
        field: &'static str,
        range: RangeInclusive<u64>,
        what: &'static str,
    ) -> Result<u64, Invalid> {
        let number = self.optional_number(field, range)?;
        number.ok_or(Invalid::Missing { field, what })
    }

    /// A whole number, if it is there.
    pub(crate) fn optional_number(
        &self,
        field: &'static str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, Invalid> {
        let Some(json) = self.0.get(field) else {
            return Ok(None);
        };
        match whole_number(json) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(Invalid::Number {
                field,
                least: *range.start(),
                most: *range.end(),
            }),
        }
    }

    /// `disk_size_gib`, if it is there.
    pub(crate) fn optional_disk_size(&self, max: u64) -> Result<Option<u64>, Invalid> {
        self.optional_number("disk_size_gib", 1..=max)
            .map_err(|_| Invalid::DiskSize { max })
    }

    /// The fields of an object, if it is there. `known` names them with their path, `outer.inner`,
    /// and so does every refusal.
    pub(crate) fn optional_object(
        &self,
        field: &'static str,
        known: &'static [&'static str],
    ) -> Result<Option<Fields<'a>>, Invalid> {
        let Some(json) = self.0.get(field).copied() else {
            return Ok(None);
        };
        if !json.starts_with('{') {
            return Err(Invalid::Type {
                field,
                expected: "an object",
                kind: kind(json),
            });
        }
        let name = |inner| format!("{field}.{inner}");
        Fields::of(json, known, name).map(Some)
    }

    /// Whether the field is there and null: in a change, that takes away what it names.
    pub(crate) fn is_null(&self, field: &'static str) -> bool {
        self.0.get(field).is_some_and(|json| *json == "null")
    }

    /// Whether there is no field at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True or false, if it is there.
    pub(crate) fn optional_bool(&self, field: &'static str) -> Result<Option<bool>, Invalid> {
        match self.0.get(field).copied() {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(json) => Err(Invalid::Type {
                field,
                expected: "true or false",
                kind: kind(json),
            }),
        }
    }
}

/// What follows a byte order mark, which RFC 8259, section 8.1, lets a reader ignore.
pub(crate) fn without_mark(body: &[u8]) -> &[u8] {
    body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body)
}

/// The members of an object in their order, with those that come twice.
struct Pairs<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Pairs<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Pairs<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<'de>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

fn not_json(error: serde_json::Error) -> Invalid {
    Invalid::NotJson { why: error.to_string() }
}

fn read_text<T: FromStr<Err = InvalidFormat>>(field: &'static str, json: &str) -> Result<T, Invalid> {
    if !json.starts_with('"') {
        return Err(Invalid::Type {
            field,
            expected: "a string",
            kind: kind(json),
        });
    }
    // What is left to fail is half a surrogate pair (`"\ud800"`), which no Rust string holds.
    let not_text = |_| InvalidFormat::new("must be a string of Unicode text");
    let form = serde_json::from_str(json)
        .map_err(not_text)
        .and_then(|text: String| text.parse());
    form.map_err(|form| Invalid::Form { field, form })
}

/// JSON does not tell `10` from `10.0` or `1e1` (RFC 8259, section 6): all three are ten.
fn whole_number(json: &str) -> Option<u64> {
    if !json.starts_with(|c: char| c == '-' || c.is_ascii_digit()) {
        return None;
    }
    if let Ok(number) = json.parse() {
        return Some(number);
    }
    // Above 2⁵³ not every whole number has a float of its own, so that the nearest would be a
    // guess.
    const EXACT: f64 = (1u64 << 53) as f64;
    let number: f64 = json.parse().ok()?;
    (number.fract() == 0.0 && (0.0..=EXACT).contains(&number)).then_some(number as u64)
}

/// What a JSON text is, for a sentence.
fn kind(json: &str) -> &'static str {
    match json.bytes().next() {
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b'"') => "a string",
        Some(b't' | b'f') => "true or false",
        Some(b'n') => "null",
        _ => "a number",
    }
}

fn refuse_unknown<'n>(names: impl Iterator<Item = &'n String>, known: &'static [&'static str]) -> Result<(), Invalid> {
    /// An answer names this many; a body of 1 MiB could hold a hundred thousand.
    const NAMED: usize = 8;
    let unknown: Vec<&String> = names.filter(|name| !known.contains(&name.as_str())).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let mut list = String::from(if unknown.len() == 1 {
        "unknown field "
    } else {
        "unknown fields "
    });
    for (i, name) in unknown.iter().take(NAMED).enumerate() {
        let comma = if i == 0 { "" } else { ", " };
        list += &match meant(name, known) {
            Some(meant) => format!("{comma}{:?} (did you mean {meant}?)", shortened(name)),
            None => format!("{comma}{:?}", shortened(name)),
        };
    }
    if unknown.len() > NAMED {
        list += &format!(" and {} more", unknown.len() - NAMED);
    }
    Err(Invalid::Unknown { list, known })
}

/// A client's own words in an answer, at a length that a log line bears.
fn shortened(name: &str) -> String {
    const SHOWN: usize = 40;
    match name.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

/// The known field that a misspelt one stands for: the same but for case and punctuation
/// (`diskSizeGib`), a few letters off (`disk_size_gb`), or words of it (`ssh_key`, `memory`).
fn meant(name: &str, known: &'static [&'static str]) -> Option<&'static str> {
    if name.len() > 64 {
        return None;
    }
    let words_of = |field: &str| -> Vec<String> { field.split('_').map(str::to_owned).collect() };
    let (letters, words) = (letters(name), words_of(&name.to_lowercase()));
    let within = |field: &&&'static str| {
        let all = words_of(field);
        words.iter().all(|word| all.iter().any(|known| akin(word, known)))
    };
    let nearest = known
        .iter()
        .map(|field| (distance(&letters, &self::letters(field)), *field))
        .min();
    match nearest {
        Some((off, field)) if off <= 1 + field.len() / 5 && off < letters.len() => Some(field),
        _ => known.iter().find(within).copied(),
    }
}

/// One begins with the other: `vcpus` and `vcpu`, `memory` and `mem`.
fn akin(a: &str, b: &str) -> bool {
    a.len().min(b.len()) >= 3 && (a.starts_with(b) || b.starts_with(a))
}

/// In lower case, without punctuation.
fn letters(name: &str) -> Vec<char> {
    name.chars()
        .filter(|c| c.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect()
}

/// How many letters to add, drop or exchange to make one of the other (Levenshtein's distance, one
/// row at a time).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let exchanged = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = exchanged.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
