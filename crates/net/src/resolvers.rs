//! Finds DNS servers that guests can use: the host's own, if guests can reach them.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// The resolver configuration that the host's programs use.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The servers behind systemd-resolved's stub on 127.0.0.53 (`man systemd-resolved.service`,
/// /etc/resolv.conf).
const RESOLVED_UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// DNS servers, in the host's order of preference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolvers {
    /// IPv4 only, because guests have no IPv6. Empty if all of the host's servers are on loopback
    /// (dnsmasq, unbound) or use IPv6, so that guests cannot reach them; then a server must be
    /// configured.
    pub servers: Vec<Ipv4Addr>,
    /// The file that lists them.
    pub source: PathBuf,
    /// The error, if the file exists but cannot be read.
    pub unreadable: Option<String>,
}

/// Returns the host's DNS servers, except for those on loopback. If only systemd-resolved's stub is
/// left, returns the servers behind it. Link-local servers (some clouds use 169.254.169.254) are
/// returned only if there are no others.
pub fn host_resolvers() -> Resolvers {
    resolvers_of(Path::new(RESOLV_CONF), Path::new(RESOLVED_UPSTREAM))
}

fn resolvers_of(resolv_conf: &Path, upstream: &Path) -> Resolvers {
    let files = [read(resolv_conf), read(upstream)];
    let by_kind = [false, true].into_iter().flat_map(|link_local| {
        files.iter().map(move |found| Resolvers {
            servers: found
                .servers
                .iter()
                .copied()
                .filter(|server| server.is_link_local() == link_local)
                .collect(),
            ..found.clone()
        })
    });
    let found = by_kind.into_iter().find(|found| !found.servers.is_empty());
    let [own, _] = files;
    found.unwrap_or(own)
}

/// Reads a file's servers. A missing or unreadable file has none, which does not prevent the daemon
/// from starting.
fn read(path: &Path) -> Resolvers {
    let (text, unreadable) = match std::fs::read(path) {
        // Comments may be in any encoding.
        Ok(bytes) => (String::from_utf8_lossy(&bytes).into_owned(), None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (String::new(), None),
        Err(error) => (String::new(), Some(error.to_string())),
    };
    Resolvers {
        servers: parse(&text),
        source: path.to_owned(),
        unreadable,
    }
}

/// Returns the IPv4 servers of the `nameserver` lines (`man resolv.conf`), except for unusable
/// ones.
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
        if unusable_resolver(server).is_none() && !servers.contains(&server) {
            servers.push(server);
        }
    }
    servers
}

/// Returns why guests cannot use this address as their resolver; `None` if they can.
pub fn unusable_resolver(server: Ipv4Addr) -> Option<&'static str> {
    if server.is_loopback() {
        Some("loopback addresses refer to the guest itself")
    } else if server.is_unspecified() || server.octets()[0] == 0 {
        Some("it is not a host address")
    } else if server.is_multicast() {
        Some("it is a multicast address")
    } else if server.octets()[0] >= 240 {
        Some("it is reserved")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the servers found, and the name of the file that lists them. `None` means that the
    /// file is missing.
    fn resolvers(resolv_conf: Option<&[u8]>, upstream: Option<&[u8]>) -> (Vec<String>, String) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str, content: Option<&[u8]>| {
            let path = dir.path().join(name);
            content
                .into_iter()
                .for_each(|content| std::fs::write(&path, content).expect("write"));
            path
        };
        let found = resolvers_of(&path("resolv.conf", resolv_conf), &path("upstream", upstream));
        assert_eq!(found.unreadable, None);
        let source = found.source.file_name().expect("a name").to_string_lossy().into_owned();
        (found.servers.iter().map(ToString::to_string).collect(), source)
    }

    #[test]
    fn resolvers_are_found_in_all_common_configurations() {
        const STUB: &[u8] = b"# This is /run/systemd/resolve/stub-resolv.conf\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n";
        for (what, own, upstream, servers, source) in [
            (
                "the host's own, in order, without duplicates",
                Some(&b"# nameserver 9.9.9.9\nsearch example.org\nnameserver 192.0.2.53\nnameserver ::1\nnameserver 2001:db8::1\n\
                    nameserver\t198.51.100.53 # second\nnameserver 192.0.2.53\nnameserver not-an-address\n"[..]),
                Some(&b"nameserver 203.0.113.1\n"[..]),
                &["192.0.2.53", "198.51.100.53"][..],
                "resolv.conf",
            ),
            ("those behind systemd-resolved's stub", Some(STUB), Some(b"nameserver 203.0.113.1\n"), &["203.0.113.1"], "upstream"),
            (
                "NetworkManager's file",
                Some(b"# Generated by NetworkManager\nsearch lan\nnameserver 192.168.1.1\noptions ndots:1 timeout:2\n"),
                None,
                &["192.168.1.1"],
                "resolv.conf",
            ),
            ("a comment in Latin-1", Some(b"# f\xfcr das B\xfcro\nnameserver 192.0.2.53\n"), None, &["192.0.2.53"], "resolv.conf"),
            ("DOS line endings", Some(b"nameserver 192.0.2.53\r\n"), None, &["192.0.2.53"], "resolv.conf"),
            ("a server on loopback", Some(b"nameserver 127.0.0.1\n"), None, &[], "resolv.conf"),
            (
                "IPv6 only",
                Some(b"nameserver fe80::1%eth0\nnameserver 2001:db8::1\n"),
                None,
                &[],
                "resolv.conf",
            ),
            ("an empty file", Some(b""), None, &[], "resolv.conf"),
            ("no file", None, None, &[], "resolv.conf"),
            (
                "a cloud's link-local server as the only one",
                Some(b"nameserver 169.254.169.254\n"),
                None,
                &["169.254.169.254"],
                "resolv.conf",
            ),
            (
                "a cloud's link-local server behind the stub",
                Some(STUB),
                Some(b"nameserver 169.254.169.254\n"),
                &["169.254.169.254"],
                "upstream",
            ),
            (
                "link-local servers are ignored if there are others",
                Some(b"nameserver 169.254.1.1\nnameserver 192.0.2.53\n"),
                None,
                &["192.0.2.53"],
                "resolv.conf",
            ),
            ("addresses that are not host addresses", Some(b"nameserver 0.0.0.0\nnameserver 224.0.0.1\nnameserver 255.255.255.255\n"), None, &[], "resolv.conf"),
        ] {
            assert_eq!(resolvers(own, upstream), (servers.iter().map(ToString::to_string).collect(), source.to_owned()), "{what}");
        }
    }

    #[test]
    fn unreadable_files_are_reported_and_dangling_links_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let found = resolvers_of(dir.path(), Path::new("/nonexistent"));
        assert!(found.servers.is_empty() && found.unreadable.is_some(), "{found:?}");
        let dangling = dir.path().join("resolv.conf");
        std::os::unix::fs::symlink("/nonexistent", &dangling).expect("a link");
        let found = resolvers_of(&dangling, Path::new("/nonexistent"));
        assert!(found.servers.is_empty() && found.unreadable.is_none(), "{found:?}");
    }
}
