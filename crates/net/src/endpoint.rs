//! What one VM gets: a tap, a MAC, an address, a port on the host.

use crate::error::{Error, Result};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// What the name of a tap of ours begins with. Twelve hex digits follow: 14 bytes of the 15 that a
/// name may have.
const TAP_PREFIX: &str = "sb";

/// Hex digits in a VM's key.
const KEY_DIGITS: usize = 12;

/// A MAC address. It is shown and read as `02:5b:ac:10:00:02`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// Locally administered and unicast (the two low bits of the first byte), and ours: a bridge
    /// whose MAC begins with these was made by this crate.
    const OURS: [u8; 2] = [0x02, 0x5b];

    /// The MAC of the machine with this address. Deriving it makes it unique wherever the address
    /// is, with nothing to remember.
    pub fn from_ip(ip: Ipv4Addr) -> Mac {
        let [a, b, c, d] = ip.octets();
        Mac([Mac::OURS[0], Mac::OURS[1], a, b, c, d])
    }

    /// The six bytes, in the order in which they are sent.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Whether this crate gives out such addresses.
    pub(crate) fn is_ours(address: &[u8]) -> bool {
        address.starts_with(&Mac::OURS)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A text that is not a MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no MAC address: write six bytes such as 02:5b:ac:10:00:02")]
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

/// How much may pass in each direction, in megabits (10⁶) a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mbps(u32);

impl Mbps {
    /// So many megabits a second, at least one.
    pub const fn new(megabits: u32) -> Mbps {
        Mbps(if megabits == 0 { 1 } else { megabits })
    }

    /// The most that is held to, 100 Gbit/s, which no guest reaches. nftables multiplies a rate by
    /// 10⁹ in 64 bits: from 147,574 on it refuses the rate, or takes a small one for it
    /// (`nft_limit_init`).
    const MAX: u32 = 100_000;

    pub(crate) fn bytes_per_second(self) -> u64 {
        u64::from(self.0.min(Mbps::MAX)) * 125_000
    }
}

/// Where one VM is on the network, whose its tap is, and how much it may send and receive. All of
/// it but owner and rate follows from the VM's key, its address and its port, so that the same
/// three give the same endpoint after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    tap: String,
    guest_ip: Ipv4Addr,
    ssh_port: u16,
    owner: u32,
    rate: Option<Mbps>,
}

impl Endpoint {
    /// The endpoint of the VM with the id `vm_key`: 12 hex digits in lower case, with or without
    /// `vm-` before them.
    ///
    /// # Errors
    ///
    /// [`Error::VmKey`] for a key of another form.
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

    /// The same with a tap that the user `uid` may open, besides root: for a VMM that does so as
    /// that user. It counts when the tap is made.
    #[must_use]
    pub fn with_owner(self, uid: u32) -> Endpoint {
        Endpoint { owner: uid, ..self }
    }

    /// The same with another limit on what it may send and receive; `None` for no limit.
    #[must_use]
    pub fn with_rate(self, rate: Option<Mbps>) -> Endpoint {
        Endpoint { rate, ..self }
    }

    /// The tap's name, for the VMM: 14 bytes.
    pub fn tap(&self) -> &str {
        &self.tap
    }

    /// The user that may open the tap.
    pub fn owner(&self) -> u32 {
        self.owner
    }

    /// The MAC that the guest's card must have; frames from another one are dropped.
    pub fn mac(&self) -> Mac {
        Mac::from_ip(self.guest_ip)
    }

    /// The guest's address; packets from another one are dropped.
    pub fn guest_ip(&self) -> Ipv4Addr {
        self.guest_ip
    }

    /// The limit on what it may send, and on what it may receive.
    pub fn rate(&self) -> Option<Mbps> {
        self.rate
    }

    /// The host's port that leads to the guest's port 22.
    pub fn ssh_port(&self) -> u16 {
        self.ssh_port
    }
}

/// Whether an interface's name has the form of our taps.
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
    fn a_key_of_another_form_names_no_tap() {
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
    fn a_mac_is_local_unicast_and_reads_back() {
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
