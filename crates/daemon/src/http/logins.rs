//! Logs failed logins: one line per peer and interval, however often the peer tries.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Minimum interval between two lines about one peer.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Limit on peers that are tracked separately. All others share one line, because addresses cost an
/// attacker nothing.
const MAX_PEERS: usize = 256;

/// The remote address of a request's connection, stored in the request's extensions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub IpAddr);

/// The failed logins that were logged, by peer.
#[derive(Debug, Default)]
pub(crate) struct FailedLogins {
    peers: Mutex<HashMap<IpAddr, Attempts>>,
}

#[derive(Debug)]
struct Attempts {
    logged: Instant,
    /// Attempts since the last line.
    unlogged: u64,
}

impl FailedLogins {
    /// Logs a failed login, unless one of this peer was logged recently.
    pub(crate) fn record(&self, peer: Option<Peer>) {
        let peer = peer.map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |peer| peer.0);
        if let Some(attempts) = self.count(peer, Instant::now()) {
            tracing::warn!(%peer, attempts, "failed login: a request without a valid token");
        }
    }

    /// Returns the number of attempts to log, if a line is due.
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
    fn repeated_failures_of_a_peer_are_logged_once_per_interval() {
        let logins = FailedLogins::default();
        let begun = Instant::now();
        let peer = |n: u32| IpAddr::V4(Ipv4Addr::from_bits(n));
        let at = |millis: u64| begun + Duration::from_millis(millis);
        let lines: Vec<_> = (0..=200).filter_map(|n| logins.count(peer(1), at(n * 100))).collect();
        assert_eq!(lines, [1, 100, 100]);
        assert_eq!(
            logins.count(peer(2), at(20_000)),
            Some(1),
            "another peer is counted separately"
        );
    }

    #[test]
    fn the_number_of_tracked_peers_is_limited() {
        let logins = FailedLogins::default();
        let begun = Instant::now();
        let peer = |n: u32| IpAddr::V4(Ipv4Addr::from_bits(n));
        let lines = (0..10_000).filter_map(|n| logins.count(peer(n), begun)).count();
        assert_eq!(lines, MAX_PEERS + 1);
        assert_eq!(logins.peers.lock().unwrap().len(), MAX_PEERS + 1);
        // Old entries are dropped.
        assert_eq!(logins.count(peer(0), begun + LINE_INTERVAL), Some(1));
        assert_eq!(logins.peers.lock().unwrap().len(), 1);
    }
}
