//! The tap, MAC, address and host port of one VM.

use scalebox_units::{Mac, VmId};
use std::net::Ipv4Addr;

/// Prefix of our taps' names. Twelve hex digits follow: 14 bytes of the 15 that a name may have.
const TAP_PREFIX: &str = "sb";

/// Prefix of this crate's MACs: locally administered and unicast (the two low bits of the first
/// byte). A bridge with this prefix was created by this crate.
const MAC_PREFIX: [u8; 2] = [0x02, 0x5b];

/// Derives the MAC of the machine with this address. It is unique wherever the address is, and
/// nothing has to be stored.
pub fn mac_from_ip(ip: Ipv4Addr) -> Mac {
    let [a, b, c, d] = ip.octets();
    Mac::new([MAC_PREFIX[0], MAC_PREFIX[1], a, b, c, d])
}

/// Returns whether a link's address has this crate's prefix.
pub(crate) fn has_our_prefix(address: &[u8]) -> bool {
    address.starts_with(&MAC_PREFIX)
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
/// owner and rate is derived from the VM's id, address and port, and is therefore the same after a
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
    /// Creates the endpoint of the VM `id`.
    ///
    /// ```
    /// use scalebox_net::Endpoint;
    /// let endpoint = Endpoint::new(&"vm-0123456789ab".parse()?, "172.16.0.2".parse()?, 22001);
    /// assert_eq!(endpoint.tap(), "sb0123456789ab");
    /// assert_eq!(endpoint.mac().to_string(), "02:5b:ac:10:00:02");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(id: &VmId, guest_ip: Ipv4Addr, ssh_port: u16) -> Endpoint {
        Endpoint {
            tap: format!("{TAP_PREFIX}{}", id.digits()),
            guest_ip,
            ssh_port,
            owner: 0,
            rate: None,
        }
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
        mac_from_ip(self.guest_ip)
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
    name.strip_prefix(TAP_PREFIX).is_some_and(VmId::are_digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_local_unicast() {
        let mac = mac_from_ip(Ipv4Addr::new(172, 16, 255, 254));
        assert_eq!(mac.octets()[0] & 0b11, 0b10);
        assert!(mac.is_unicast() && has_our_prefix(&mac.octets()));
    }

    #[test]
    fn taps_are_recognized_by_their_names() {
        assert!(is_tap_name("sb0123456789ab"));
        for name in ["sbtest0", "sb0123456789a", "sb0123456789AB", "0123456789ab", "tap0"] {
            assert!(!is_tap_name(name), "{name}");
        }
    }
}
