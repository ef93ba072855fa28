//! The settings of a network: bridge, subnet and ports. They are checked here once.

use crate::endpoint::Endpoint;
use crate::error::{Error, Result};
use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

/// Maximum length of an interface name (`IFNAMSIZ` minus the terminating zero).
const MAX_NAME_BYTES: usize = 15;

/// Names with a special meaning under `/proc/sys/net/ipv4/conf`.
const RESERVED: [&str; 3] = ["all", "default", "lo"];

/// Networks that no guest can reach, whatever the settings. They are link-local addresses, where
/// clouds serve their hosts' credentials (169.254.169.254); multicast; and reserved addresses,
/// including broadcast.
const ALWAYS_DENIED: [Ipv4Net; 3] = [
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4),
    Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// Networks that are not part of the internet: private (RFC 1918) and carrier-grade NAT (RFC 6598).
pub const PRIVATE_NETWORKS: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
];

/// The settings of one network. Networks with different bridges and subnets can coexist on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    bridge: String,
    subnet: Ipv4Net,
    ports: RangeInclusive<u16>,
    denied: Vec<Ipv4Net>,
    resolvers: Vec<Ipv4Addr>,
}

impl NetConfig {
    /// Validates the settings. Host bits of `subnet` are ignored: `172.16.5.1/16` becomes
    /// `172.16.0.0/16`.
    ///
    /// # Errors
    ///
    /// [`Error::BridgeName`], [`Error::Subnet`] (prefix length not from 8 to 30, or not unicast),
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
            denied: Ipv4Net::aggregate(&ALWAYS_DENIED.to_vec()),
            resolvers: Vec::new(),
        })
    }

    /// Adds networks that guests cannot reach.
    #[must_use]
    pub fn with_denied(mut self, networks: &[Ipv4Net]) -> NetConfig {
        self.denied.extend(networks.iter().map(Ipv4Net::trunc));
        self.denied = Ipv4Net::aggregate(&self.denied);
        self
    }

    /// Sets the resolvers that guests may query, even if they are in a denied network.
    #[must_use]
    pub fn with_resolvers(mut self, resolvers: &[Ipv4Addr]) -> NetConfig {
        self.resolvers = resolvers.to_vec();
        self.resolvers.sort_unstable();
        self.resolvers.dedup();
        self
    }

    /// Returns the networks that guests cannot reach, in addition to the host and each other. They
    /// are disjoint and sorted.
    pub fn denied(&self) -> &[Ipv4Net] {
        &self.denied
    }

    pub(crate) fn resolvers(&self) -> &[Ipv4Addr] {
        &self.resolvers
    }

    /// Returns the bridge's name.
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// Returns the guests' subnet, without host bits.
    pub fn subnet(&self) -> Ipv4Net {
        self.subnet
    }

    /// Returns the range of host ports that are forwarded to guests.
    pub fn ports(&self) -> RangeInclusive<u16> {
        self.ports.clone()
    }

    /// Returns the bridge's own address, which is the guests' default route: the first host of the
    /// subnet.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.subnet.network().to_bits() + 1)
    }

    /// Checks that a guest can have this address.
    pub(crate) fn check_guest(&self, ip: Ipv4Addr) -> Result<()> {
        let reserved = [self.subnet.network(), self.gateway(), self.subnet.broadcast()];
        if self.subnet.contains(&ip) && !reserved.contains(&ip) {
            Ok(())
        } else {
            Err(Error::NotAGuestAddress {
                ip,
                subnet: self.subnet,
            })
        }
    }

    /// Checks that guests can have these addresses, and that no two endpoints share a tap, an
    /// address or a port.
    pub(crate) fn check_endpoints<'a>(&self, wanted: impl IntoIterator<Item = &'a Endpoint>) -> Result<()> {
        let (mut taps, mut ips, mut ports) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for endpoint in wanted {
            self.check_guest(endpoint.guest_ip())?;
            let tap = endpoint.tap();
            let check_unused = |what: String, owner: Option<&str>| match owner {
                Some(owner) => Err(Error::Taken {
                    what,
                    owner: owner.to_owned(),
                }),
                None => Ok(()),
            };
            check_unused(format!("tap {tap}"), taps.insert(tap, tap))?;
            check_unused(
                format!("address {}", endpoint.guest_ip()),
                ips.insert(endpoint.guest_ip(), tap),
            )?;
            check_unused(
                format!("port {}", endpoint.ssh_port()),
                ports.insert(endpoint.ssh_port(), tap),
            )?;
        }
        Ok(())
    }
}

/// Checks the bridge's name. The kernel allows almost any byte in it, but this name also becomes a
/// path below `/proc/sys` and a word in rules.
fn check_bridge(name: &str) -> Result<()> {
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    let starts_with_letter = name.starts_with(|c: char| c.is_ascii_alphabetic());
    if plain && starts_with_letter && name.len() <= MAX_NAME_BYTES && !RESERVED.contains(&name) {
        Ok(())
    } else {
        Err(Error::BridgeName(name.to_owned()))
    }
}

fn check_subnet(subnet: Ipv4Net) -> Result<()> {
    let first = subnet.network();
    let why = if subnet.prefix_len() > 30 {
        "is too small for a gateway and a guest"
    } else if subnet.prefix_len() < 8 {
        "is larger than a /8"
    } else if first.is_loopback() || first.is_multicast() || first.is_link_local() || first.octets()[0] == 0 {
        "is not a range for ordinary hosts"
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
    fn invalid_bridge_names_are_rejected() {
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
    fn invalid_subnets_are_rejected() {
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
    fn empty_ranges_and_privileged_ports_are_rejected() {
        for ports in [22002..=22001, 22..=23000, 0..=0] {
            assert!(matches!(
                NetConfig::new("b", subnet("10.0.0.0/24"), ports),
                Err(Error::Ports { .. })
            ));
        }
    }
}
