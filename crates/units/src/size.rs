//! Sizes as types, so that a number of GiB is never mistaken for a number of bytes.
//!
//! The kernel counts in [`Bytes`], people in [`Gib`]. Both are powers of two: one GiB is 2³⁰ bytes.
//! Conversions are named after their rounding, because the two directions differ on purpose:
//! **available space is rounded down, needs are rounded up**.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};
use std::str::FromStr;

/// A number of bytes. Sums saturate instead of wrapping: checks against a limit then reject a size
/// near 2⁶⁴.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(u64);

/// A whole number of GiB (2³⁰ bytes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Gib(u64);

impl Bytes {
    /// Zero bytes.
    pub const ZERO: Bytes = Bytes(0);

    /// Creates a size of `n` bytes.
    pub const fn new(n: u64) -> Self {
        Bytes(n)
    }

    /// Creates a size of `n` KiB (2¹⁰ bytes).
    pub const fn from_kib(n: u64) -> Self {
        Bytes(n.saturating_mul(1 << 10))
    }

    /// Creates a size of `n` MiB (2²⁰ bytes).
    pub const fn from_mib(n: u64) -> Self {
        Bytes(n.saturating_mul(1 << 20))
    }

    /// Creates a size of `n` blocks of `size` bytes, as `statfs` and `stat` count.
    pub const fn from_blocks(n: u64, size: u64) -> Self {
        Bytes(n.saturating_mul(size))
    }

    /// Returns the number of bytes.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Rounds down to whole GiB: for available space.
    pub const fn floor_gib(self) -> Gib {
        Gib(self.0 >> 30)
    }

    /// Rounds up to whole GiB: for needed space.
    pub const fn ceil_gib(self) -> Gib {
        Gib(self.0.div_ceil(1 << 30))
    }

    /// Returns the difference, or zero when `other` is larger.
    pub const fn saturating_sub(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_sub(other.0))
    }

    /// Returns `self × ratio`, rounded down.
    pub fn scaled(self, ratio: f64) -> Bytes {
        // `as` saturates at both ends and converts NaN to zero.
        Bytes((self.0 as f64 * ratio) as u64)
    }
}

impl Gib {
    /// Creates a size of `n` GiB.
    pub const fn new(n: u64) -> Self {
        Gib(n)
    }

    /// Returns the number of GiB.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Returns the same size in bytes.
    pub const fn bytes(self) -> Bytes {
        Bytes(self.0.saturating_mul(1 << 30))
    }
}

impl From<Gib> for Bytes {
    fn from(gib: Gib) -> Bytes {
        gib.bytes()
    }
}

impl Add for Bytes {
    type Output = Bytes;
    fn add(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Bytes) {
        *self = *self + other;
    }
}

impl Sub for Bytes {
    type Output = Bytes;
    /// Saturates at zero; see [`Bytes::saturating_sub`].
    fn sub(self, other: Bytes) -> Bytes {
        self.saturating_sub(other)
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(items: I) -> Bytes {
        items.fold(Bytes::ZERO, Add::add)
    }
}

impl Add for Gib {
    type Output = Gib;
    fn add(self, other: Gib) -> Gib {
        Gib(self.0.saturating_add(other.0))
    }
}

/// `1.5 GiB`, `300 MiB`, `12 B`: for people; scripts use the number.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 5] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in UNITS {
            if self.0 >= 1 << shift {
                let value = self.0 as f64 / (1u64 << shift) as f64;
                let digits = usize::from(value.fract() >= 0.05 && value < 100.0);
                return f.pad(&format!("{value:.digits$} {unit}"));
            }
        }
        f.pad(&format!("{} B", self.0))
    }
}

impl fmt::Display for Gib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The reason why a text is not a size; each message shows a valid example.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseSizeError {
    /// The text is not a number followed by a unit.
    #[error("{0:?} is not a size: write a whole number and a unit, such as 512M, 100G or 1T")]
    Form(String),
    /// The number is zero.
    #[error("{0:?} is zero: write a size such as 512M, 100G or 1T")]
    Zero(String),
    /// The size is 2⁶³ bytes or more, which no file system supports.
    #[error("{0:?} is larger than any file system: write a size such as 100G or 1T")]
    TooLarge(String),
}

/// Parses `100G`, `1T` or `512M`, with an optional `iB` or `B` after the unit, in upper or lower
/// case. The unit is required: a bare number is ambiguous between bytes and GiB.
///
/// ```
/// use scalebox_units::{Bytes, Gib};
/// assert_eq!("100G".parse(), Ok(Gib::new(100).bytes()));
/// assert_eq!("1TiB".parse(), Ok(Gib::new(1024).bytes()));
/// assert!("100".parse::<Bytes>().is_err());
/// assert!("0G".parse::<Bytes>().is_err());
/// ```
impl FromStr for Bytes {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Bytes, ParseSizeError> {
        let form = || ParseSizeError::Form(text.to_owned());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(form());
        }
        let shift = match unit.to_ascii_lowercase().as_str() {
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(form()),
        };
        let too_large = || ParseSizeError::TooLarge(text.to_owned());
        let number: u64 = number.parse().map_err(|_| too_large())?;
        if number == 0 {
            return Err(ParseSizeError::Zero(text.to_owned()));
        }
        match number.checked_mul(1 << shift) {
            Some(bytes) if bytes < 1 << 63 => Ok(Bytes(bytes)),
            _ => Err(too_large()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_space_rounds_down_and_needs_round_up() {
        let a_byte_short = Bytes::new((25 << 30) - 1);
        assert_eq!(a_byte_short.floor_gib(), Gib::new(24));
        assert_eq!(a_byte_short.ceil_gib(), Gib::new(25));
        assert_eq!(Gib::new(25).bytes().floor_gib(), Gib::new(25));
        assert_eq!(Gib::new(25).bytes().ceil_gib(), Gib::new(25));
    }

    #[test]
    fn sizes_parse_with_the_usual_units() {
        for (text, gib) in [
            ("100G", 100),
            ("1T", 1024),
            ("100g", 100),
            ("100GiB", 100),
            ("100GB", 100),
            ("2048M", 2),
        ] {
            assert_eq!(text.parse(), Ok(Gib::new(gib).bytes()), "{text}");
        }
    }

    #[test]
    fn invalid_and_zero_sizes_are_rejected_with_an_example() {
        for text in [
            "",
            "G",
            "100",
            "-1G",
            "1.5G",
            "100X",
            "100 G",
            " 100G",
            "0G",
            "0",
            "1e3G",
            "99999999999999999999G",
            "9000000000G",
        ] {
            let error = text.parse::<Bytes>().expect_err(text).to_string();
            assert!(error.contains("100G"), "{text:?}: {error}");
        }
    }

    #[test]
    fn sizes_are_displayed_with_at_most_one_decimal() {
        for (bytes, shown) in [
            (Bytes::new(12), "12 B"),
            (Bytes::from_mib(300), "300 MiB"),
            (Bytes::from_mib(1536), "1.5 GiB"),
            (Gib::new(100).bytes(), "100 GiB"),
            (Gib::new(2048).bytes(), "2 TiB"),
        ] {
            assert_eq!(bytes.to_string(), shown);
        }
    }
}
