//! The DNS servers that guests can use: the host's own, where they can be reached from a guest.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// What the host's programs read.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The servers behind systemd-resolved's stub on 127.0.0.53 (`man systemd-resolved.service`,
/// /etc/resolv.conf).
const RESOLVED_UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// DNS servers, in the host's order of preference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolvers {
    /// IPv4 only: guests have nothing else. Empty when the host's servers are all its own (a
    /// dnsmasq or unbound on loopback) or of IPv6, which guests cannot reach: then somebody must
    /// name a server.
    pub servers: Vec<Ipv4Addr>,
    /// The file they are from.
    pub source: PathBuf,
    /// Why that file could not be read, where it is there and could not be.
    pub unreadable: Option<String>,
}

/// The host's DNS servers, without those on loopback. Where only systemd-resolved's stub is left,
/// the servers behind it. Link-local ones (a cloud's at 169.254.169.254) count where there are no
/// others.
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

/// A file that is missing has no servers; neither has one that cannot be read, which is no reason
/// not to start.
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
        if unusable_resolver(server).is_none() && !servers.contains(&server) {
            servers.push(server);
        }
    }
    servers
}

/// Why no guest can have this address as its resolver; `None` where one can.
pub fn unusable_resolver(server: Ipv4Addr) -> Option<&'static str> {
    if server.is_loopback() {
        Some("a guest would ask itself there")
    } else if server.is_unspecified() || server.octets()[0] == 0 {
        Some("it is not the address of a machine")
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

    /// The servers found, and the name of the file they are from. `None`: there is no such file.
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
    fn resolvers_are_found_in_all_usual_forms() {
        const STUB: &[u8] = b"# This is /run/systemd/resolve/stub-resolv.conf\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n";
        for (what, own, upstream, servers, source) in [
            (
                "the host's own, in order, each once",
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
            ("lines that end as in DOS", Some(b"nameserver 192.0.2.53\r\n"), None, &["192.0.2.53"], "resolv.conf"),
            ("a server of the host's own", Some(b"nameserver 127.0.0.1\n"), None, &[], "resolv.conf"),
            (
                "IPv6 with a scope, and nothing else",
                Some(b"nameserver fe80::1%eth0\nnameserver 2001:db8::1\n"),
                None,
                &[],
                "resolv.conf",
            ),
            ("an empty file", Some(b""), None, &[], "resolv.conf"),
            ("no file", None, None, &[], "resolv.conf"),
            (
                "a cloud's, link-local, where there is no other",
                Some(b"nameserver 169.254.169.254\n"),
                None,
                &["169.254.169.254"],
                "resolv.conf",
            ),
            (
                "a cloud's behind the stub",
                Some(STUB),
                Some(b"nameserver 169.254.169.254\n"),
                &["169.254.169.254"],
                "upstream",
            ),
            (
                "others before link-local ones",
                Some(b"nameserver 169.254.1.1\nnameserver 192.0.2.53\n"),
                None,
                &["192.0.2.53"],
                "resolv.conf",
            ),
            ("addresses that are no machine's", Some(b"nameserver 0.0.0.0\nnameserver 224.0.0.1\nnameserver 255.255.255.255\n"), None, &[], "resolv.conf"),
        ] {
            assert_eq!(resolvers(own, upstream), (servers.iter().map(ToString::to_string).collect(), source.to_owned()), "{what}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_reported_and_a_link_to_nowhere_is_no_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let found = resolvers_of(dir.path(), Path::new("/nonexistent"));
        assert!(found.servers.is_empty() && found.unreadable.is_some(), "{found:?}");
        let dangling = dir.path().join("resolv.conf");
        std::os::unix::fs::symlink("/nonexistent", &dangling).expect("a link");
        let found = resolvers_of(&dangling, Path::new("/nonexistent"));
        assert!(found.servers.is_empty() && found.unreadable.is_none(), "{found:?}");
    }
}
