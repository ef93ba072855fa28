//! Parses request bodies: JSON objects in which every field is known, unique and not null.
//!
//! Each value stays JSON text until its field is parsed. That way a number that fits no integer
//! type (`1e400`) is rejected as out of range, and the message names the field.

use crate::suggestion::suggestion;
use scalebox_units::InvalidFormat;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// An invalid request. The daemon responds with 400 and this message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The body is empty, or only white space.
    #[error("the request has no body: send a JSON object with {}", known.join(", "))]
    NoBody {
        /// The fields that the request may have.
        known: &'static [&'static str],
    },
    /// The body is not JSON.
    #[error("the body is not JSON: {why}")]
    NotJson {
        /// The parser's error, with line and column.
        why: String,
    },
    /// The body is JSON, but not an object.
    #[error("the body must be a JSON object with {}; this is {kind}", known.join(", "))]
    NotAnObject {
        /// The JSON type of the body: `an array`, `a string` …
        kind: &'static str,
        /// The fields that the request may have.
        known: &'static [&'static str],
    },
    /// A field occurs twice, so its value is ambiguous.
    #[error("the field {0:?} is given twice")]
    Duplicate(String),
    /// The body has fields that do not exist.
    #[error("{list}; the fields are {}", known.join(", "))]
    Unknown {
        /// The unknown names, each with a suggestion where there is one.
        list: String,
        /// The fields that the request may have.
        known: &'static [&'static str],
    },
    /// A required field is missing.
    #[error("{field} is missing: {what}")]
    Missing {
        /// The name of the field.
        field: &'static str,
        /// The value to send.
        what: &'static str,
    },
    /// `disk_size_gib` is invalid. Scripts rely on the exact text of this message.
    #[error("disk_size_gib must be between 1 and {max}")]
    DiskSize {
        /// `MAX_DISK_SIZE_GIB`.
        max: u64,
    },
    /// Another number is out of range, or not a whole number.
    #[error("{field} must be a whole number between {min} and {max}")]
    Number {
        /// The name of the field.
        field: &'static str,
        /// The smallest value allowed.
        min: u64,
        /// The largest value allowed.
        max: u64,
    },
    /// A change without any field.
    #[error("there is nothing to change: send at least one of {}", known.join(", "))]
    Nothing {
        /// The fields that the request may have.
        known: &'static [&'static str],
    },
    /// A value has the wrong JSON type.
    #[error("{field} must be {expected}, not {kind}")]
    Type {
        /// The name of the field.
        field: &'static str,
        /// The required JSON type: `a string`, `true or false`, `an object`.
        expected: &'static str,
        /// The JSON type of the value: `an array`, `null` …
        kind: &'static str,
    },
    /// A string has the wrong form, or two fields contradict each other.
    #[error("{field} {form}")]
    Form {
        /// The name of the field.
        field: &'static str,
        /// The form that is required.
        form: InvalidFormat,
    },
}

impl Invalid {
    /// Returns the error for a name that does not exist, with a suggestion.
    pub(crate) fn unknown(name: &str, known: &'static [&'static str]) -> Invalid {
        let list = match suggestion(name, known) {
            Some(field) => format!("unknown field {:?} (did you mean {field}?)", shortened(name)),
            None => format!("unknown field {:?}", shortened(name)),
        };
        Invalid::Unknown { list, known }
    }

    /// Returns the field that the error is about; `None` if it is about the whole body or several
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

/// The fields of an object, each with the JSON text of its value.
#[derive(Debug)]
pub(crate) struct Fields<'a>(BTreeMap<String, &'a str>);

impl<'a> Fields<'a> {
    /// Parses an object whose fields are all in `known`.
    pub(crate) fn read(body: &'a [u8], known: &'static [&'static str]) -> Result<Self, Invalid> {
        let body = without_byte_order_mark(body);
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

    /// Parses the members of an object; `path` turns their names into those in `known`.
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
        reject_unknown(fields.keys(), known)?;
        Ok(Fields(fields))
    }

    /// Returns the JSON text of a required field.
    fn required(&self, field: &'static str, what: &'static str) -> Result<&'a str, Invalid> {
        self.0.get(field).copied().ok_or(Invalid::Missing { field, what })
    }

    /// Checks that `field` exists, without checking its value.
    pub(crate) fn require(&self, field: &'static str, what: &'static str) -> Result<(), Invalid> {
        self.required(field, what).map(drop)
    }

    /// Parses a required string.
    pub(crate) fn text<T: FromStr<Err = InvalidFormat>>(
        &self,
        field: &'static str,
        what: &'static str,
    ) -> Result<T, Invalid> {
        read_text(field, self.required(field, what)?)
    }

    /// Parses an optional string.
    pub(crate) fn optional_text<T: FromStr<Err = InvalidFormat>>(
        &self,
        field: &'static str,
    ) -> Result<Option<T>, Invalid> {
        self.0.get(field).map(|json| read_text(field, json)).transpose()
    }

    /// Parses an optional array of strings. The errors of elements name the field.
    pub(crate) fn optional_texts<T: FromStr<Err = InvalidFormat>>(
        &self,
        field: &'static str,
    ) -> Result<Option<Vec<T>>, Invalid> {
        let Some(json) = self.0.get(field).copied() else {
            return Ok(None);
        };
        let elements: Vec<&RawValue> = match json.starts_with('[') {
            true => serde_json::from_str(json).map_err(not_json)?,
            false => {
                return Err(Invalid::Type {
                    field,
                    expected: "an array of strings",
                    kind: kind(json),
                });
            }
        };
        let elements = elements
            .iter()
            .map(|element| read_member(field, "an array", element.get()));
        elements.collect::<Result<_, _>>().map(Some)
    }

    /// Parses an optional object whose names are chosen by the client and whose values are strings.
    /// The errors of values name the field.
    pub(crate) fn optional_text_map<T: FromStr<Err = InvalidFormat>>(
        &self,
        field: &'static str,
    ) -> Result<Option<BTreeMap<String, T>>, Invalid> {
        let Some(json) = self.0.get(field).copied() else {
            return Ok(None);
        };
        if !json.starts_with('{') {
            return Err(Invalid::Type {
                field,
                expected: "an object of strings",
                kind: kind(json),
            });
        }
        let Pairs(pairs) = serde_json::from_str(json).map_err(not_json)?;
        let mut map = BTreeMap::new();
        for (name, value) in pairs {
            let value = read_member(field, "an object", value.get())?;
            if map.contains_key(&name) {
                return Err(Invalid::Duplicate(format!("{field}.{}", shortened(&name))));
            }
            map.insert(name, value);
        }
        Ok(Some(map))
    }

    /// Returns whether the field is an object.
    pub(crate) fn is_object(&self, field: &'static str) -> bool {
        self.0.get(field).is_some_and(|json| json.starts_with('{'))
    }

    /// Returns the whole number, if the field is one: for values that have both forms.
    pub(crate) fn as_number(&self, field: &'static str) -> Option<u64> {
        self.0.get(field).copied().and_then(whole_number)
    }

    /// Parses a required whole number.
    pub(crate) fn number(
        &self,
        field: &'static str,
        range: RangeInclusive<u64>,
        what: &'static str,
    ) -> Result<u64, Invalid> {
        let number = self.optional_number(field, range)?;
        number.ok_or(Invalid::Missing { field, what })
    }

    /// Parses an optional whole number.
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
                min: *range.start(),
                max: *range.end(),
            }),
        }
    }

    /// Parses the optional field `disk_size_gib`.
    pub(crate) fn optional_disk_size(&self, max: u64) -> Result<Option<u64>, Invalid> {
        self.optional_number("disk_size_gib", 1..=max)
            .map_err(|_| Invalid::DiskSize { max })
    }

    /// Parses an optional object. Its fields have the name `outer.inner` in `known` and in errors.
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

    /// Returns whether the field is null, which removes a setting in a change.
    pub(crate) fn is_null(&self, field: &'static str) -> bool {
        self.0.get(field).is_some_and(|json| *json == "null")
    }

    /// Returns whether the object has no fields.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Parses an optional boolean.
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

/// Strips a byte order mark, as RFC 8259, section 8.1, allows.
pub(crate) fn without_byte_order_mark(body: &[u8]) -> &[u8] {
    body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body)
}

/// The members of an object in their order, including duplicates.
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
    // The only possible failure is a lone surrogate (`"\ud800"`), which a Rust string cannot hold.
    let not_text = |_| InvalidFormat::new("must be a valid Unicode string");
    let form = serde_json::from_str(json)
        .map_err(not_text)
        .and_then(|text: String| text.parse());
    form.map_err(|form| Invalid::Form { field, form })
}

/// Parses a string in an array or an object.
fn read_member<T: FromStr<Err = InvalidFormat>>(
    field: &'static str,
    collection: &'static str,
    json: &str,
) -> Result<T, Invalid> {
    read_text(field, json).map_err(|invalid| match invalid {
        Invalid::Type { field, kind, .. } => Invalid::Form {
            field,
            form: InvalidFormat::new(format!("must be {collection} of strings; it contains {kind}")),
        },
        other => other,
    })
}

/// Parses a whole number in any JSON form: `10`, `10.0` and `1e1` are equal (RFC 8259, section 6).
fn whole_number(json: &str) -> Option<u64> {
    if !json.starts_with(|c: char| c == '-' || c.is_ascii_digit()) {
        return None;
    }
    if let Ok(number) = json.parse() {
        return Some(number);
    }
    // An f64 represents every whole number up to 2⁵³ exactly, but not beyond.
    const MAX_EXACT_F64: f64 = (1u64 << 53) as f64;
    let number: f64 = json.parse().ok()?;
    (number.fract() == 0.0 && (0.0..=MAX_EXACT_F64).contains(&number)).then_some(number as u64)
}

/// Names the type of a JSON value, for an error message.
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

fn reject_unknown<'n>(names: impl Iterator<Item = &'n String>, known: &'static [&'static str]) -> Result<(), Invalid> {
    /// Number of names in the message; a body of 1 MiB could have a hundred thousand.
    const MAX_NAMES: usize = 8;
    let unknown: Vec<&String> = names.filter(|name| !known.contains(&name.as_str())).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let mut list = String::from(if unknown.len() == 1 {
        "unknown field "
    } else {
        "unknown fields "
    });
    for (i, name) in unknown.iter().take(MAX_NAMES).enumerate() {
        let comma = if i == 0 { "" } else { ", " };
        list += &match suggestion(name, known) {
            Some(field) => format!("{comma}{:?} (did you mean {field}?)", shortened(name)),
            None => format!("{comma}{:?}", shortened(name)),
        };
    }
    if unknown.len() > MAX_NAMES {
        list += &format!(" and {} more", unknown.len() - MAX_NAMES);
    }
    Err(Invalid::Unknown { list, known })
}

/// Shortens a client's text so that a message containing it stays readable in the log.
fn shortened(name: &str) -> String {
    const MAX_CHARS: usize = 40;
    match name.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}
