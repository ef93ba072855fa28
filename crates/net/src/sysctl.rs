//! Kernel settings, by `/proc/sys`.

use crate::error::{Error, Result};
use std::io;
use std::path::PathBuf;

/// One setting: its path below `/proc/sys`, and what it must be.
pub(crate) struct Sysctl {
    path: String,
    value: &'static str,
    /// Whether a kernel without it (IPv6 switched off at boot) is as good.
    optional: bool,
}

impl Sysctl {
    /// Lets the host pass packets on. The only setting that is not of our own interfaces.
    pub(crate) fn forwarding() -> Sysctl {
        Sysctl {
            path: "net/ipv4/ip_forward".to_owned(),
            value: "1",
            optional: false,
        }
    }

    /// What our bridge needs.
    pub(crate) fn of_bridge(bridge: &str) -> Vec<Sysctl> {
        let v4 = |key: &str, value| Sysctl {
            path: format!("net/ipv4/conf/{bridge}/{key}"),
            value,
            optional: false,
        };
        vec![
            // A client on the host that connects to 127.0.0.1 keeps that source until it is
            // masqueraded behind the routing.
            v4("route_localnet", "1"),
            // Guests learn the gateway's MAC, not which other addresses the host has.
            v4("arp_ignore", "1"),
            v4("accept_redirects", "0"),
            without_ipv6(bridge),
        ]
    }

    /// What a tap of ours needs.
    pub(crate) fn of_tap(tap: &str) -> Vec<Sysctl> {
        vec![without_ipv6(tap)]
    }

    /// Makes it so; writes only what differs, so that a read-only `/proc/sys` that is right already
    /// is no error.
    ///
    /// # Errors
    ///
    /// [`Error::Sysctl`].
    pub(crate) fn ensure(&self) -> Result<()> {
        let path = PathBuf::from("/proc/sys").join(&self.path);
        let written = match std::fs::read_to_string(&path) {
            Ok(now) if now.trim() == self.value => return Ok(()),
            Ok(_) => std::fs::write(&path, self.value),
            Err(error) if self.optional && error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => Err(error),
        };
        written.map_err(|source| Error::Sysctl {
            key: self.path.replace('/', "."),
            value: self.value,
            source,
        })
    }
}

/// No link-local address, no router advertisement believed, nothing accepted: on a switched-off
/// interface the kernel drops IPv6.
fn without_ipv6(interface: &str) -> Sysctl {
    Sysctl {
        path: format!("net/ipv6/conf/{interface}/disable_ipv6"),
        value: "1",
        optional: true,
    }
}
