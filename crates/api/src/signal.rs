//! Signals of Linux, by name and number.

use scalebox_units::InvalidFormat;
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::ser::{Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// The names of the signals 1 to 31 (signal(7), x86 and ARM).
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];

/// Other names for signals.
const ALIASES: [(&str, u8); 4] = [("IOT", 6), ("CLD", 17), ("POLL", 29), ("UNUSED", 31)];

const MAX: u8 = 64;

const FORM: &str = "must be a signal: a name such as \"TERM\" or \"SIGTERM\", or a number between 1 and 64";

/// A signal: a number from 1 to 64. In JSON it is a name without `SIG`, such as `"KILL"`, or the
/// number of a signal without a name, as a string. A request may also have a number.
///
/// ```
/// use scalebox_api::Signal;
/// for text in ["TERM", "SIGTERM", "term", "15"] {
///     assert_eq!(text.parse::<Signal>().unwrap().number(), 15);
/// }
/// assert_eq!(Signal::new(9).unwrap().to_string(), "KILL");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signal(u8);

impl Signal {
    /// `SIGHUP`.
    pub const HUP: Signal = Signal(1);
    /// `SIGINT`.
    pub const INT: Signal = Signal(2);
    /// `SIGQUIT`.
    pub const QUIT: Signal = Signal(3);
    /// `SIGPIPE`.
    pub const PIPE: Signal = Signal(13);
    /// `SIGKILL`.
    pub const KILL: Signal = Signal(9);
    /// `SIGTERM`.
    pub const TERM: Signal = Signal(15);

    /// Returns the signal with a number from 1 to 64; `None` for another number.
    pub fn new(number: i32) -> Option<Self> {
        let number = u8::try_from(number).ok()?;
        (1..=MAX).contains(&number).then_some(Signal(number))
    }

    /// Returns the number, 1 to 64.
    pub fn number(self) -> i32 {
        self.0.into()
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.get(usize::from(self.0) - 1) {
            Some(name) => f.pad(name),
            None => f.pad(&self.0.to_string()),
        }
    }
}

impl FromStr for Signal {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        let invalid = || InvalidFormat::new(FORM);
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            return text.parse().ok().and_then(Signal::new).ok_or_else(invalid);
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let alias = ALIASES
            .iter()
            .find(|(alias, _)| *alias == name)
            .map(|&(_, number)| number);
        let number = (1..)
            .zip(NAMES)
            .find(|(_, known)| *known == name)
            .map(|(number, _)| number);
        number.or(alias).map(Signal).ok_or_else(invalid)
    }
}

impl Serialize for Signal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Signal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameOrNumber;
        impl Visitor<'_> for NameOrNumber {
            type Value = Signal;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a signal's name or number")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Signal, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Signal, E> {
                let number = i32::try_from(number).ok().and_then(Signal::new);
                number.ok_or_else(|| E::custom(FORM))
            }
        }
        deserializer.deserialize_any(NameOrNumber)
    }
}

#[cfg(feature = "openapi")]
mod schema {
    use crate::signal::{MAX, NAMES, Signal};
    use std::borrow::Cow;
    use utoipa::openapi::schema::{ObjectBuilder, Schema, SchemaType, Type};
    use utoipa::openapi::{OneOfBuilder, RefOr};
    use utoipa::{PartialSchema, ToSchema};

    impl ToSchema for Signal {
        fn name() -> Cow<'static, str> {
            "Signal".into()
        }
    }

    impl PartialSchema for Signal {
        fn schema() -> RefOr<Schema> {
            let object = |kind| ObjectBuilder::new().schema_type(SchemaType::Type(kind));
            let name = object(Type::String).pattern(Some(format!("^(SIG)?({})$", NAMES.join("|"))));
            let number = object(Type::Integer).minimum(Some(1)).maximum(Some(i32::from(MAX)));
            let either = OneOfBuilder::new().item(name).item(number);
            let description = "A signal: a name such as `TERM` or `SIGTERM`, or a number.";
            either.description(Some(description)).examples(["TERM"]).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_signal_survives_a_round_trip() {
        for number in 1..=64 {
            let signal = Signal::new(number).unwrap();
            assert_eq!(signal.to_string().parse(), Ok(signal));
            let json = serde_json::to_value(signal).unwrap();
            assert_eq!(serde_json::from_value::<Signal>(json).unwrap(), signal);
        }
    }

    #[test]
    fn names_have_the_numbers_of_linux() {
        for (name, number) in [
            ("SIGKILL", 9),
            ("Term", 15),
            ("WINCH", 28),
            ("SYS", 31),
            ("CLD", 17),
            ("64", 64),
        ] {
            assert_eq!(name.parse::<Signal>().unwrap().number(), number, "{name}");
        }
        assert_eq!(serde_json::from_value::<Signal>(json!(2)).unwrap(), Signal::INT);
        assert_eq!(Signal::new(34).unwrap().to_string(), "34");
    }

    #[test]
    fn other_names_and_numbers_are_rejected() {
        for text in [
            "",
            "0",
            "65",
            "-1",
            "SIG",
            "SIGSIGTERM",
            "TERMINATE",
            "9999999999",
            "TERM ",
        ] {
            assert!(text.parse::<Signal>().is_err(), "{text:?}");
        }
        for json in [json!(0), json!(65), json!(-9), json!(1.5), json!(null), json!(u64::MAX)] {
            assert!(serde_json::from_value::<Signal>(json).is_err());
        }
    }
}
