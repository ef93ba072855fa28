//! Which address and which port a new VM gets. No I/O: what is in use is what the caller has
//! claimed.

use crate::config::NetConfig;
use crate::error::{Error, Result};
use std::collections::HashSet;
use std::net::Ipv4Addr;

/// An address and a port that belong to one VM until they are released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The guest's address.
    pub guest_ip: Ipv4Addr,
    /// The host's port that leads to its port 22.
    pub ssh_port: u16,
}

/// The addresses and ports of a network, and who has them.
///
/// The search begins after the last one given out (next-fit), not at the first: an address and a
/// port that were just freed come back last, so that a client's `known_hosts` does not meet another
/// machine's key at once. After a restart, [`occupy`](Addresses::occupy) the leases of the state
/// file, oldest VM first, and the search goes on behind the newest.
#[derive(Debug, Clone)]
pub struct Addresses {
    config: NetConfig,
    ips: HashSet<Ipv4Addr>,
    ports: HashSet<u16>,
    last_ip: Ipv4Addr,
    last_port: u16,
}

impl Addresses {
    /// All free.
    pub fn new(config: &NetConfig) -> Addresses {
        Addresses {
            ips: HashSet::new(),
            ports: HashSet::new(),
            last_ip: config.gateway(),
            last_port: *config.ports().end(),
            config: config.clone(),
        }
    }

    /// Takes the next free address and the next free port that is `usable`, which is asked once a
    /// port at most; what [`port_is_free_on_host`](crate::port_is_free_on_host) says belongs there.
    ///
    /// # Errors
    ///
    /// [`Error::NoFreeAddress`] or [`Error::NoFreePort`]; then nothing is taken.
    pub fn claim(&mut self, usable: impl FnMut(u16) -> bool) -> Result<Lease> {
        let guest_ip = self.next_ip()?;
        let ssh_port = self.next_port(usable)?;
        let lease = Lease { guest_ip, ssh_port };
        self.occupy(lease);
        Ok(lease)
    }

    /// Marks a lease of the state file as taken. It may lie outside a range that has changed since:
    /// it stays the VM's.
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

    /// Gives a lease back. Giving back what is free changes nothing.
    pub fn release(&mut self, lease: Lease) {
        self.ips.remove(&lease.guest_ip);
        self.ports.remove(&lease.ssh_port);
    }

    /// How many ports are taken.
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
        // The cast is exact: the walk stays between two ports.
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

/// `first..=last`, once around, beginning behind `here`.
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
    fn a_freed_port_is_not_the_next_one_given_out() {
        let mut addresses = addresses("10.0.0.0/24", 22001..=22010);
        let first = addresses.claim(|_| true).expect("free");
        assert_eq!((first.guest_ip, first.ssh_port), (Ipv4Addr::new(10, 0, 0, 2), 22001));
        addresses.release(first);
        let second = addresses.claim(|_| true).expect("free");
        assert_eq!((second.guest_ip, second.ssh_port), (Ipv4Addr::new(10, 0, 0, 3), 22002));
    }

    #[test]
    fn after_a_restart_the_search_goes_on_behind_the_newest_vm() {
        let mut addresses = addresses("10.0.0.0/24", 22001..=22010);
        addresses.occupy(Lease {
            guest_ip: Ipv4Addr::new(10, 0, 0, 7),
            ssh_port: 22006,
        });
        // Of an older configuration: it stays taken, and the search is not led outside the range.
        addresses.occupy(Lease {
            guest_ip: Ipv4Addr::new(192, 168, 0, 9),
            ssh_port: 40000,
        });
        let next = addresses.claim(|_| true).expect("free");
        assert_eq!((next.guest_ip, next.ssh_port), (Ipv4Addr::new(10, 0, 0, 8), 22007));
    }

    #[test]
    fn exhausted_ports_are_a_clear_error() {
        let mut addresses = addresses("10.0.0.0/24", 22001..=22003);
        addresses.claim(|_| true).expect("free");
        addresses.claim(|_| true).expect("free");
        let before = addresses.clone();
        let error = addresses
            .claim(|_| false)
            .expect_err("a program has the last one")
            .to_string();
        assert!(
            error.starts_with("no free port in 22001..22003: 2 are forwarded to VMs, 1 are in use by other"),
            "{error}"
        );
        assert_eq!(addresses.ips, before.ips, "nothing is taken by a refusal");
    }

    #[test]
    fn exhausted_addresses_are_a_clear_error() {
        let mut addresses = addresses("10.0.0.0/30", 22001..=22100);
        let only = addresses.claim(|_| true).expect("free");
        let error = addresses
            .claim(|_| true)
            .expect_err("one guest fits in a /30")
            .to_string();
        assert!(error.starts_with("no free address in 10.0.0.0/30"), "{error}");
        addresses.release(only);
        assert_eq!(addresses.claim(|_| true).expect("free again").guest_ip, only.guest_ip);
    }

    proptest! {
        /// Whatever is claimed and released in whatever order: never twice at a time, never
        /// outside, and an error only when there is really nothing left.
        #[test]
        fn no_two_leases_meet(
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
