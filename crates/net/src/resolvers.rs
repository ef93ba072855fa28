//! The DNS servers that guests can use: the host's own, where they can be reached from a guest.

use crate::error::{Error, Result};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// What the host's programs read.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The servers behind systemd-resolved's stub on 127.0.0.53 (`man systemd-resolved.service`, /etc/resolv.conf).
const RESOLVED_UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// DNS servers, in the host's order of preference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolvers {
    /// IPv4 only: guests have nothing else. Empty when the host's servers are all its own (a dnsmasq or unbound on
    /// loopback), which guests cannot reach: then somebody must name a server.
    pub servers: Vec<Ipv4Addr>,
    /// The file they are from.
    pub source: PathBuf,
}

/// The host's DNS servers, without those on loopback. Where only systemd-resolved's stub is left, the servers behind
/// it.
///
/// # Errors
///
/// [`Error::Read`] for a file that is there and cannot be read. A missing one is an empty list.
pub fn host_resolvers() -> Result<Resolvers> {
    resolvers_of(Path::new(RESOLV_CONF), Path::new(RESOLVED_UPSTREAM))
}

fn resolvers_of(resolv_conf: &Path, upstream: &Path) -> Result<Resolvers> {
    let own = read(resolv_conf)?;
    if !own.servers.is_empty() {
        return Ok(own);
    }
    let behind_the_stub = read(upstream)?;
    Ok(if behind_the_stub.servers.is_empty() {
        own
    } else {
        behind_the_stub
    })
}

fn read(path: &Path) -> Result<Resolvers> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(source) => {
            return Err(Error::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    Ok(Resolvers {
        servers: parse(&text),
        source: path.to_owned(),
    })
}

/// The `nameserver` lines (`man resolv.conf`) that name an IPv4 server elsewhere.
fn parse(text: &str) -> Vec<Ipv4Addr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(Ok(IpAddr::V4(server))) = words.next().map(str::parse) else {
            continue;
        };
        let elsewhere = !server.is_loopback() && !server.is_unspecified() && !server.is_link_local();
        if elsewhere && !servers.contains(&server) {
            servers.push(server);
        }
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolvers(resolv_conf: &str, upstream: Option<&str>) -> (Vec<String>, String) {
        let dir = tempfile::tempdir().expect("a directory");
        let own = dir.path().join("resolv.conf");
        let behind = dir.path().join("upstream");
        std::fs::write(&own, resolv_conf).expect("write");
        if let Some(text) = upstream {
            std::fs::write(&behind, text).expect("write");
        }
        let found = resolvers_of(&own, &behind).expect("read");
        let source = found.source.file_name().expect("a name").to_string_lossy().into_owned();
        (found.servers.iter().map(ToString::to_string).collect(), source)
    }

    #[test]
    fn the_hosts_own_servers_come_first_and_in_order() {
        let text = "# nameserver 9.9.9.9\nsearch example.org\nnameserver 192.0.2.53\nnameserver ::1\nnameserver 2001:db8::1\n\
                    nameserver\t198.51.100.53 # second\nnameserver 192.0.2.53\nnameserver not-an-address\n";
        let (servers, source) = resolvers(text, Some("nameserver 203.0.113.1\n"));
        assert_eq!(
            (servers, source.as_str()),
            (vec!["192.0.2.53".into(), "198.51.100.53".into()], "resolv.conf")
        );
    }

    #[test]
    fn behind_the_stub_are_the_real_ones() {
        let (servers, source) = resolvers(
            "nameserver 127.0.0.53\noptions edns0\n",
            Some("nameserver 203.0.113.1\n"),
        );
        assert_eq!((servers, source.as_str()), (vec!["203.0.113.1".into()], "upstream"));
    }

    #[test]
    fn a_host_that_is_its_own_server_has_none_for_guests() {
        assert_eq!(resolvers("nameserver 127.0.0.1\n", None).0, Vec::<String>::new());
        let nowhere = resolvers_of(Path::new("/nonexistent/a"), Path::new("/nonexistent/b")).expect("empty");
        assert!(nowhere.servers.is_empty());
    }
}
