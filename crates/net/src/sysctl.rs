//! Kernel settings, through `/proc/sys`.

use crate::error::{Error, Result};
use std::io;
use std::path::PathBuf;

/// A setting: its path below `/proc/sys`, and the required value.
pub(crate) struct Sysctl {
    path: String,
    value: &'static str,
    /// `true` if the setting may be missing (IPv6 disabled at boot).
    optional: bool,
}

impl Sysctl {
    /// Enables IP forwarding: the only setting that does not belong to our own interfaces.
    pub(crate) fn forwarding() -> Sysctl {
        Sysctl {
            path: "net/ipv4/ip_forward".to_owned(),
            value: "1",
            optional: false,
        }
    }

    /// Returns the settings of our bridge.
    pub(crate) fn of_bridge(bridge: &str) -> Vec<Sysctl> {
        let v4 = |key: &str, value| Sysctl {
            path: format!("net/ipv4/conf/{bridge}/{key}"),
            value,
            optional: false,
        };
        vec![
            // A connection from the host to 127.0.0.1 keeps that source address until it is
            // masqueraded after routing.
            v4("route_localnet", "1"),
            // ARP replies only reveal the gateway's MAC, not which other addresses the host has.
            v4("arp_ignore", "1"),
            v4("accept_redirects", "0"),
            without_ipv6(bridge),
        ]
    }

    /// Returns the settings of a tap.
    pub(crate) fn of_tap(tap: &str) -> Vec<Sysctl> {
        vec![without_ipv6(tap)]
    }

    /// Writes the setting if it differs, so that a correct setting in a read-only `/proc/sys` is
    /// not an error.
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

/// Disables IPv6 on an interface: no link-local address, no router advertisements, and all IPv6
/// packets are dropped.
fn without_ipv6(interface: &str) -> Sysctl {
    Sysctl {
        path: format!("net/ipv6/conf/{interface}/disable_ipv6"),
        value: "1",
        optional: true,
    }
}
