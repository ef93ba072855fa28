//! Allocates the address and the port of a new VM. No I/O: only the caller's claims count as in
//! use.

use crate::config::NetConfig;
use crate::error::{Error, Result};
use std::collections::HashSet;
use std::net::Ipv4Addr;

/// The address and the port of one VM, until they are released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The guest's address.
    pub guest_ip: Ipv4Addr,
    /// The host port that is forwarded to the guest's port 22.
    pub ssh_port: u16,
}

/// The addresses and ports of a network, and which of them are in use.
///
/// The search starts after the last one allocated (next-fit), not at the first. A freed address or
/// port is reused last, so that a client does not soon find another machine's key at an address in
/// its `known_hosts`. After a restart, call [`occupy`](Addresses::occupy) with the leases of the
/// state file, oldest VM first; the search continues after the newest.
#[derive(Debug, Clone)]
pub struct Addresses {
    config: NetConfig,
    ips: HashSet<Ipv4Addr>,
    ports: HashSet<u16>,
    last_ip: Ipv4Addr,
    last_port: u16,
}

impl Addresses {
    /// Creates an allocator with everything free.
    pub fn new(config: &NetConfig) -> Addresses {
        Addresses {
            ips: HashSet::new(),
            ports: HashSet::new(),
            last_ip: config.gateway(),
            last_port: *config.ports().end(),
            config: config.clone(),
        }
    }

    /// Claims the next free address, and the next free port for which `usable` returns true.
    /// `usable` is called at most once per port;
    /// [`port_is_free_on_host`](crate::port_is_free_on_host) is meant for it.
    ///
    /// # Errors
    ///
    /// [`Error::NoFreeAddress`] or [`Error::NoFreePort`]; then nothing is claimed.
    pub fn claim(&mut self, usable: impl FnMut(u16) -> bool) -> Result<Lease> {
        let guest_ip = self.next_ip()?;
        let ssh_port = self.next_port(usable)?;
        let lease = Lease { guest_ip, ssh_port };
        self.occupy(lease);
        Ok(lease)
    }

    /// Marks a lease of the state file as in use. It may be outside of a range that has changed
    /// since; the VM keeps it.
    pub fn occupy(&mut self, lease: Lease) {
        self.ips.insert(lease.guest_ip);
        self.ports.insert(lease.ssh_port);
        if self.config.check_guest(lease.guest_ip).is_ok() {
            self.last_ip = lease.guest_ip;
        }
        if self.config.ports().contains(&lease.ssh_port) {
            self.last_port = lease.ssh_port;
        }
    }

    /// Releases a lease. Does nothing if it is free.
    pub fn release(&mut self, lease: Lease) {
        self.ips.remove(&lease.guest_ip);
        self.ports.remove(&lease.ssh_port);
    }

    /// Returns the number of ports in use.
    pub fn in_use(&self) -> usize {
        self.ports.len()
    }

    fn next_ip(&self) -> Result<Ipv4Addr> {
        let first = self.config.gateway().to_bits() + 1;
        let last = self.config.subnet().broadcast().to_bits() - 1;
        after(self.last_ip.to_bits(), first, last)
            .map(Ipv4Addr::from_bits)
            .find(|ip| !self.ips.contains(ip))
            .ok_or(Error::NoFreeAddress(self.config.subnet()))
    }

    fn next_port(&self, mut usable: impl FnMut(u16) -> bool) -> Result<u16> {
        let (min, max) = self.config.ports().into_inner();
        let mut skipped = 0;
        // The cast is exact: every value is between two ports.
        for port in after(self.last_port.into(), min.into(), max.into()).map(|port| port as u16) {
            if self.ports.contains(&port) {
                continue;
            }
            if usable(port) {
                return Ok(port);
            }
            skipped += 1;
        }
        let used = self.ports.iter().filter(|port| (min..=max).contains(port)).count();
        Err(Error::NoFreePort {
            min,
            max,
            used,
            skipped,
        })
    }
}

/// Iterates over `first..=last` once, starting after `here` and wrapping around.
fn after(here: u32, first: u32, last: u32) -> impl Iterator<Item = u32> {
    let start = if (first..last).contains(&here) { here + 1 } else { first };
    (start..=last).chain(first..start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn addresses(subnet: &str, ports: std::ops::RangeInclusive<u16>) -> Addresses {
        Addresses::new(&NetConfig::new("b", subnet.parse().expect(subnet), ports).expect("valid"))
    }

    #[test]
    fn a_freed_port_is_not_reused_next() {
        let mut addresses = addresses("10.0.0.0/24", 22001..=22010);
        let first = addresses.claim(|_| true).expect("free");
        assert_eq!((first.guest_ip, first.ssh_port), (Ipv4Addr::new(10, 0, 0, 2), 22001));
        addresses.release(first);
        let second = addresses.claim(|_| true).expect("free");
        assert_eq!((second.guest_ip, second.ssh_port), (Ipv4Addr::new(10, 0, 0, 3), 22002));
    }

    #[test]
    fn after_a_restart_the_search_continues_after_the_newest_vm() {
        let mut addresses = addresses("10.0.0.0/24", 22001..=22010);
        addresses.occupy(Lease {
            guest_ip: Ipv4Addr::new(10, 0, 0, 7),
            ssh_port: 22006,
        });
        // This lease is from an older configuration: it stays in use, and the search stays within
        // the range.
        addresses.occupy(Lease {
            guest_ip: Ipv4Addr::new(192, 168, 0, 9),
            ssh_port: 40000,
        });
        let next = addresses.claim(|_| true).expect("free");
        assert_eq!((next.guest_ip, next.ssh_port), (Ipv4Addr::new(10, 0, 0, 8), 22007));
    }

    #[test]
    fn exhausted_ports_are_reported() {
        let mut addresses = addresses("10.0.0.0/24", 22001..=22003);
        addresses.claim(|_| true).expect("free");
        addresses.claim(|_| true).expect("free");
        let before = addresses.clone();
        let error = addresses
            .claim(|_| false)
            .expect_err("another program uses the last port")
            .to_string();
        assert!(
            error.starts_with("no free port in 22001..22003: 2 are forwarded to VMs, 1 are in use by other"),
            "{error}"
        );
        assert_eq!(addresses.ips, before.ips, "a failed claim takes nothing");
    }

    #[test]
    fn exhausted_addresses_are_reported() {
        let mut addresses = addresses("10.0.0.0/30", 22001..=22100);
        let only = addresses.claim(|_| true).expect("free");
        let error = addresses
            .claim(|_| true)
            .expect_err("a /30 has room for one guest")
            .to_string();
        assert!(error.starts_with("no free address in 10.0.0.0/30"), "{error}");
        addresses.release(only);
        assert_eq!(addresses.claim(|_| true).expect("free again").guest_ip, only.guest_ip);
    }

    proptest! {
        /// Checks leases under any order of claims and releases. Each lease is claimed once at a
        /// time and is in range, and errors occur only if nothing is free.
        #[test]
        fn leases_never_overlap(
            prefix in 26u8..=30,
            ports in 1u16..=40,
            steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..200),
        ) {
            let mut addresses = addresses(&format!("10.1.2.0/{prefix}"), 22001..=22000 + ports);
            let hosts = (1usize << (32 - prefix)) - 3;
            let mut held: Vec<Lease> = Vec::new();
            for (claim, index) in steps {
                if claim {
                    match addresses.claim(|port| port % 7 != 0) {
                        Ok(lease) => {
                            for other in &held {
                                prop_assert!(other.guest_ip != lease.guest_ip && other.ssh_port != lease.ssh_port);
                            }
                            prop_assert!(addresses.config.check_guest(lease.guest_ip).is_ok());
                            prop_assert!((22001..=22000 + ports).contains(&lease.ssh_port) && lease.ssh_port % 7 != 0);
                            held.push(lease);
                        }
                        Err(Error::NoFreeAddress(_)) => prop_assert_eq!(held.len(), hosts),
                        Err(Error::NoFreePort { .. }) => {
                            prop_assert_eq!(held.len(), (22001..=22000 + ports).filter(|port| port % 7 != 0).count());
                        }
                        Err(other) => prop_assert!(false, "{}", other),
                    }
                } else if !held.is_empty() {
                    addresses.release(held.swap_remove(index.index(held.len())));
                }
                prop_assert_eq!(addresses.in_use(), held.len());
            }
        }
    }
}
