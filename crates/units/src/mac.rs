//! MAC addresses.

use crate::format::InvalidFormat;
use std::fmt;
use std::str::FromStr;

/// A MAC address. It is displayed and parsed as `02:5b:ac:10:00:02`.
///
/// ```
/// use scalebox_units::Mac;
/// let mac: Mac = "02:5B:ac:10:00:02".parse().unwrap();
/// assert_eq!(mac, Mac::new([0x02, 0x5b, 0xac, 0x10, 0x00, 0x02]));
/// assert_eq!(mac.to_string(), "02:5b:ac:10:00:02");
/// assert!("2:5b:ac:10:0:2".parse::<Mac>().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// Creates an address from its six bytes in transmission order.
    pub const fn new(octets: [u8; 6]) -> Mac {
        Mac(octets)
    }

    /// Returns the six bytes in transmission order.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Returns whether one network card can have this address: neither a group's nor all zeros.
    pub const fn is_unicast(self) -> bool {
        let [a, b, c, d, e, f] = self.0;
        a & 1 == 0 && (a | b | c | d | e | f) != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Mac, InvalidFormat> {
        let byte = |digits: &str| {
            // The digits are checked first, because `from_str_radix` accepts a sign.
            let hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            u8::from_str_radix(digits, 16).ok().filter(|_| hex)
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(Mac)
            .ok_or_else(|| InvalidFormat::new("must be six bytes in hex such as 02:5b:ac:10:00:02"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_addresses_are_rejected() {
        for text in [
            "",
            "02:5b:ac:10:00",
            "02:5b:ac:10:00:02:03",
            "2:5b:ac:10:0:2",
            "zz:5b:ac:10:00:02",
            "+2:5b:ac:10:00:02",
            "02:5b:ac:10:00:02 ",
            "02-5b-ac-10-00-02",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn group_addresses_and_zeros_are_not_unicast() {
        let is_unicast = |text: &str| text.parse::<Mac>().unwrap().is_unicast();
        assert!(is_unicast("52:54:00:12:34:56"));
        for text in ["53:54:00:12:34:56", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert!(!is_unicast(text), "{text}");
        }
    }
}
