//! Which bridge, which subnet, which ports: checked once, here, so that nothing below has to.

use crate::error::{Error, Result};
use ipnet::Ipv4Net;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

/// Longest name of an interface, in bytes (`IFNAMSIZ` less the closing zero).
const MAX_NAME: usize = 15;

/// Names that mean something else under `/proc/sys/net/ipv4/conf`.
const RESERVED: [&str; 3] = ["all", "default", "lo"];

/// What no guest reaches, whatever the settings say: link-local addresses, behind which clouds keep
/// their hosts' credentials (169.254.169.254); multicast; what is reserved, broadcast included.
const NEVER_REACHED: [Ipv4Net; 3] = [
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4),
    Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// Networks that are not the internet: private ones (RFC 1918) and those of carriers (RFC 6598).
pub const PRIVATE_NETWORKS: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
];

/// The settings of one network. Two networks with different bridges and subnets live side by side
/// on one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    bridge: String,
    subnet: Ipv4Net,
    ports: RangeInclusive<u16>,
    denied: Vec<Ipv4Net>,
    resolvers: Vec<Ipv4Addr>,
}

impl NetConfig {
    /// Checks and takes the settings. Host bits of `subnet` are ignored: `172.16.5.1/16` is
    /// `172.16.0.0/16`.
    ///
    /// # Errors
    ///
    /// [`Error::BridgeName`], [`Error::Subnet`] (prefix outside /8 to /30, or not unicast),
    /// [`Error::Ports`].
    ///
    /// ```
    /// use scalebox_net::NetConfig;
    /// let config = NetConfig::new("scalebox0", "172.16.0.0/16".parse()?, 22001..=32000)?;
    /// assert_eq!(config.gateway().to_string(), "172.16.0.1");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(bridge: &str, subnet: Ipv4Net, ports: RangeInclusive<u16>) -> Result<NetConfig> {
        check_bridge(bridge)?;
        let subnet = subnet.trunc();
        check_subnet(subnet)?;
        if ports.is_empty() || *ports.start() < 1024 {
            return Err(Error::Ports {
                min: *ports.start(),
                max: *ports.end(),
            });
        }
        Ok(NetConfig {
            bridge: bridge.to_owned(),
            subnet,
            ports,
            denied: Ipv4Net::aggregate(&NEVER_REACHED.to_vec()),
            resolvers: Vec::new(),
        })
    }

    /// The same, with further networks that guests do not reach.
    #[must_use]
    pub fn denying(mut self, networks: &[Ipv4Net]) -> NetConfig {
        self.denied.extend(networks.iter().map(Ipv4Net::trunc));
        self.denied = Ipv4Net::aggregate(&self.denied);
        self
    }

    /// The same, with resolvers that guests may ask, wherever they are.
    #[must_use]
    pub fn with_resolvers(mut self, resolvers: &[Ipv4Addr]) -> NetConfig {
        self.resolvers = resolvers.to_vec();
        self.resolvers.sort_unstable();
        self.resolvers.dedup();
        self
    }

    /// The networks that guests do not reach, besides the host and each other; apart from one
    /// another, in order.
    pub fn denied(&self) -> &[Ipv4Net] {
        &self.denied
    }

    pub(crate) fn resolvers(&self) -> &[Ipv4Addr] {
        &self.resolvers
    }

    /// The bridge's name.
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// The subnet of the guests, without host bits.
    pub fn subnet(&self) -> Ipv4Net {
        self.subnet
    }

    /// The host's ports that are forwarded to guests, both ends included.
    pub fn ports(&self) -> RangeInclusive<u16> {
        self.ports.clone()
    }

    /// The bridge's own address and the guests' default route: the first host of the subnet.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.subnet.network().to_bits() + 1)
    }

    /// Whether a guest can have this address.
    pub(crate) fn check_guest(&self, ip: Ipv4Addr) -> Result<()> {
        let nobodys = [self.subnet.network(), self.gateway(), self.subnet.broadcast()];
        if self.subnet.contains(&ip) && !nobodys.contains(&ip) {
            Ok(())
        } else {
            Err(Error::NotAGuestAddress {
                ip,
                subnet: self.subnet,
            })
        }
    }
}

/// The kernel allows nearly any byte in a name. This one also becomes a path below `/proc/sys` and
/// a word in a rule.
fn check_bridge(name: &str) -> Result<()> {
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    let begins_with_a_letter = name.starts_with(|c: char| c.is_ascii_alphabetic());
    if plain && begins_with_a_letter && name.len() <= MAX_NAME && !RESERVED.contains(&name) {
        Ok(())
    } else {
        Err(Error::BridgeName(name.to_owned()))
    }
}

fn check_subnet(subnet: Ipv4Net) -> Result<()> {
    let first = subnet.network();
    let why = if subnet.prefix_len() > 30 {
        "has no room for a gateway and a guest"
    } else if subnet.prefix_len() < 8 {
        "is wider than a /8"
    } else if first.is_loopback() || first.is_multicast() || first.is_link_local() || first.octets()[0] == 0 {
        "is not for ordinary hosts"
    } else if first.octets()[0] >= 240 {
        "is reserved"
    } else {
        return Ok(());
    };
    Err(Error::Subnet { subnet, why })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Ipv4Net {
        text.parse().expect(text)
    }

    #[test]
    fn a_bridge_name_is_nothing_but_a_name() {
        let too_long = "a".repeat(16);
        for name in [
            "", "all", "default", "lo", "../x", "a b", "a\"b", "a;b", "0br", "-br", "br*", "b.r", "é", &too_long,
        ] {
            let error = NetConfig::new(name, subnet("10.0.0.0/24"), 22001..=22002)
                .expect_err(name)
                .to_string();
            assert!(error.contains("such as scalebox0"), "{error}");
        }
        for name in ["scalebox0", "a", "b-0_x", "abcdefghijklmno"] {
            assert!(
                NetConfig::new(name, subnet("10.0.0.0/24"), 22001..=22002).is_ok(),
                "{name}"
            );
        }
    }

    #[test]
    fn a_subnet_holds_a_gateway_and_a_guest() {
        for text in [
            "10.0.0.0/31",
            "10.0.0.1/32",
            "10.0.0.0/7",
            "127.0.0.0/16",
            "224.0.0.0/8",
            "169.254.0.0/16",
            "0.0.0.0/8",
            "240.0.0.0/8",
        ] {
            let error = NetConfig::new("b", subnet(text), 22001..=22002)
                .expect_err(text)
                .to_string();
            assert!(error.contains("172.16.0.0/16"), "{error}");
        }
        let config = NetConfig::new("b", subnet("172.16.5.1/16"), 22001..=22002).expect("a /16");
        assert_eq!(config.subnet(), subnet("172.16.0.0/16"));
        assert_eq!(config.gateway(), Ipv4Addr::new(172, 16, 0, 1));
    }

    #[test]
    #[allow(clippy::reversed_empty_ranges)]
    fn ports_are_a_range_above_the_well_known_ones() {
        for ports in [22002..=22001, 22..=23000, 0..=0] {
            assert!(matches!(
                NetConfig::new("b", subnet("10.0.0.0/24"), ports),
                Err(Error::Ports { .. })
            ));
        }
    }
}
