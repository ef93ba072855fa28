//! Requests without the token, in the log: a line for each peer and interval, however often it
//! tries.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines about one peer.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Peers that are told apart. What comes beside them shares one line: addresses cost an attacker
/// nothing.
const MAX_PEERS: usize = 256;

/// The peer of a request's connection, among the request's extensions.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// What was logged of whom.
#[derive(Debug, Default)]
pub struct FailedLogins {
    peers: Mutex<HashMap<IpAddr, Attempts>>,
}

#[derive(Debug)]
struct Attempts {
    logged: Instant,
    /// Since then.
    unlogged: u64,
}

impl FailedLogins {
    /// Logs a failed login, unless a line about that peer was logged a moment ago.
    pub fn note(&self, peer: Option<Peer>) {
        let peer = peer.map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |peer| peer.0);
        if let Some(attempts) = self.count(peer, Instant::now()) {
            tracing::warn!(%peer, attempts, "failed login: a request without the API's token");
        }
    }

    /// The attempts that a line is to tell of, if one is due.
    fn count(&self, peer: IpAddr, now: Instant) -> Option<u64> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.len() >= MAX_PEERS {
            peers.retain(|_, attempts| now - attempts.logged < LINE_INTERVAL);
        }
        let full = peers.len() >= MAX_PEERS && !peers.contains_key(&peer);
        let peer = if full { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { peer };
        match peers.get_mut(&peer) {
            Some(attempts) if now - attempts.logged < LINE_INTERVAL => {
                attempts.unlogged += 1;
                None
            }
            earlier => {
                let unlogged = earlier.map_or(0, |attempts| attempts.unlogged);
                let attempts = Attempts {
                    logged: now,
                    unlogged: 0,
                };
                peers.insert(peer, attempts);
                Some(unlogged + 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn a_peer_that_tries_over_and_over_has_a_line_for_each_interval() {
        let logins = FailedLogins::default();
        let begun = Instant::now();
        let peer = |n: u32| IpAddr::V4(Ipv4Addr::from_bits(n));
        let at = |millis: u64| begun + Duration::from_millis(millis);
        let lines: Vec<_> = (0..=200).filter_map(|n| logins.count(peer(1), at(n * 100))).collect();
        assert_eq!(lines, [1, 100, 100]);
        assert_eq!(logins.count(peer(2), at(20_000)), Some(1), "another peer has its own");
    }

    #[test]
    fn a_crowd_of_peers_takes_no_more_room_than_a_few() {
        let logins = FailedLogins::default();
        let begun = Instant::now();
        let peer = |n: u32| IpAddr::V4(Ipv4Addr::from_bits(n));
        let lines = (0..10_000).filter_map(|n| logins.count(peer(n), begun)).count();
        assert_eq!(lines, MAX_PEERS + 1);
        assert_eq!(logins.peers.lock().unwrap().len(), MAX_PEERS + 1);
        // Those of the crowd are forgotten.
        assert_eq!(logins.count(peer(0), begun + LINE_INTERVAL), Some(1));
        assert_eq!(logins.peers.lock().unwrap().len(), 1);
    }
}
