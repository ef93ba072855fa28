//! The tap, MAC, address and host port of one VM.

use crate::error::{Error, Result};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Prefix of our taps' names. Twelve hex digits follow: 14 bytes of the 15 that a name may have.
const TAP_PREFIX: &str = "sb";

/// Number of hex digits in a VM's key.
const KEY_DIGITS: usize = 12;

/// A MAC address, formatted and parsed as `02:5b:ac:10:00:02`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// Prefix of this crate's MACs: locally administered and unicast (the two low bits of the first
    /// byte). A bridge with this prefix was created by this crate.
    const PREFIX: [u8; 2] = [0x02, 0x5b];

    /// Derives the MAC of the machine with this address. It is unique wherever the address is, and
    /// nothing has to be stored.
    pub fn from_ip(ip: Ipv4Addr) -> Mac {
        let [a, b, c, d] = ip.octets();
        Mac([Mac::PREFIX[0], Mac::PREFIX[1], a, b, c, d])
    }

    /// Returns the six bytes, in transmission order.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Returns whether the address has this crate's prefix.
    pub(crate) fn has_our_prefix(address: &[u8]) -> bool {
        address.starts_with(&Mac::PREFIX)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The error for a text that is not a MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address; write six bytes such as 02:5b:ac:10:00:02")]
pub struct ParseMacError(String);

impl FromStr for Mac {
    type Err = ParseMacError;

    fn from_str(text: &str) -> std::result::Result<Mac, ParseMacError> {
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|byte| {
                if byte.len() == 2 {
                    u8::from_str_radix(byte, 16).ok()
                } else {
                    None
                }
            })
            .collect();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(Mac)
            .ok_or_else(|| ParseMacError(text.to_owned()))
    }
}

/// A rate limit per direction, in megabits (10⁶ bits) per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mbps(u32);

impl Mbps {
    /// Creates a limit; zero becomes one megabit per second.
    pub const fn new(megabits: u32) -> Mbps {
        Mbps(if megabits == 0 { 1 } else { megabits })
    }

    /// Maximum rate that is enforced: 100 Gbit/s, which no guest reaches.
    ///
    /// nftables multiplies a rate by 10⁹ in 64 bits: from 147,574 Mbit/s on it rejects the rate or
    /// truncates it (`nft_limit_init`).
    const MAX: u32 = 100_000;

    pub(crate) fn bytes_per_second(self) -> u64 {
        u64::from(self.0.min(Mbps::MAX)) * 125_000
    }
}

/// The network identity of one VM, with the owner of its tap and its rate limit. Everything but
/// owner and rate is derived from the VM's key, address and port, and is therefore the same after a
/// restart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    tap: String,
    guest_ip: Ipv4Addr,
    ssh_port: u16,
    owner: u32,
    rate: Option<Mbps>,
}

impl Endpoint {
    /// Creates the endpoint of the VM with the id `vm_key`: 12 lower-case hex digits, with or
    /// without the prefix `vm-`.
    ///
    /// # Errors
    ///
    /// [`Error::VmKey`] for a malformed key.
    ///
    /// ```
    /// use scalebox_net::Endpoint;
    /// let endpoint = Endpoint::new("vm-0123456789ab", "172.16.0.2".parse()?, 22001)?;
    /// assert_eq!(endpoint.tap(), "sb0123456789ab");
    /// assert_eq!(endpoint.mac().to_string(), "02:5b:ac:10:00:02");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(vm_key: &str, guest_ip: Ipv4Addr, ssh_port: u16) -> Result<Endpoint> {
        let digits = vm_key.strip_prefix("vm-").unwrap_or(vm_key);
        if !is_key(digits) {
            return Err(Error::VmKey(vm_key.to_owned()));
        }
        Ok(Endpoint {
            tap: format!("{TAP_PREFIX}{digits}"),
            guest_ip,
            ssh_port,
            owner: 0,
            rate: None,
        })
    }

    /// Sets the user that may open the tap besides root, for a VMM that runs as that user. Takes
    /// effect when the tap is created.
    #[must_use]
    pub fn with_owner(self, uid: u32) -> Endpoint {
        Endpoint { owner: uid, ..self }
    }

    /// Sets the rate limit per direction; `None` means no limit.
    #[must_use]
    pub fn with_rate(self, rate: Option<Mbps>) -> Endpoint {
        Endpoint { rate, ..self }
    }

    /// Returns the tap's name, 14 bytes long.
    pub fn tap(&self) -> &str {
        &self.tap
    }

    /// Returns the user that may open the tap.
    pub fn owner(&self) -> u32 {
        self.owner
    }

    /// Returns the MAC of the guest's interface; frames with another source are dropped.
    pub fn mac(&self) -> Mac {
        Mac::from_ip(self.guest_ip)
    }

    /// Returns the guest's address; packets with another source are dropped.
    pub fn guest_ip(&self) -> Ipv4Addr {
        self.guest_ip
    }

    /// Returns the rate limit per direction.
    pub fn rate(&self) -> Option<Mbps> {
        self.rate
    }

    /// Returns the host port that is forwarded to the guest's port 22.
    pub fn ssh_port(&self) -> u16 {
        self.ssh_port
    }
}

/// Returns whether an interface name has the form of our taps.
pub(crate) fn is_tap_name(name: &str) -> bool {
    name.strip_prefix(TAP_PREFIX).is_some_and(is_key)
}

fn is_key(digits: &str) -> bool {
    digits.len() == KEY_DIGITS && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_keys_are_rejected() {
        let ip = Ipv4Addr::new(10, 0, 0, 2);
        for key in [
            "",
            "vm-",
            "vm-0123456789a",
            "vm-0123456789abc",
            "vm-0123456789AB",
            "vm-01234567 9ab",
            "vm-vm-0123456789ab",
            "../../etc/pass",
        ] {
            assert!(matches!(Endpoint::new(key, ip, 1), Err(Error::VmKey(_))), "{key:?}");
        }
        assert_eq!(
            Endpoint::new("0123456789ab", ip, 1).expect("bare"),
            Endpoint::new("vm-0123456789ab", ip, 1).expect("with vm-")
        );
    }

    #[test]
    fn macs_are_local_unicast_and_round_trip() {
        let mac = Mac::from_ip(Ipv4Addr::new(172, 16, 255, 254));
        assert_eq!(mac.octets()[0] & 0b11, 0b10);
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for text in [
            "",
            "02:5b:ac:10:00",
            "02:5b:ac:10:00:02:03",
            "2:5b:ac:10:0:2",
            "zz:5b:ac:10:00:02",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text:?}");
        }
    }
}
