//! Checks the addresses that a registry refers to: redirects and token services.
//!
//! A registry responds with addresses of other hosts, to which the daemon then connects. Without a
//! check, it could make the daemon connect to services that only this host reaches. Public
//! addresses are always allowed; private ones only if the registry itself has a private or loopback
//! address, and loopback only if the registry is on loopback. Each connection looks its name up and
//! checks the address, so a name cannot change its address after the check.

use crate::oci::error::{OciError, quoted};
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, OnceLock};

/// A kind of address. A registry may refer to addresses of its own kind or of an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Public,
    Private,
    Loopback,
    /// Link-local addresses, among them the metadata services of clouds; multicast, and other
    /// addresses that no registry can have.
    Never,
}

impl Place {
    pub(crate) fn of(address: IpAddr) -> Place {
        match address {
            IpAddr::V4(address) => Place::of_v4(address),
            IpAddr::V6(address) => Place::of_v6(address),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Place {
        let [first, second, ..] = address.octets();
        match (first, second) {
            (127, _) => Place::Loopback,
            // Shared address space of carriers (RFC 6598), and benchmarks (RFC 2544).
            (100, 64..=127) | (198, 18 | 19) => Place::Private,
            (0, _) | (192, 0) | (224.., _) => Place::Never,
            _ if address.is_private() => Place::Private,
            _ if address.is_link_local() => Place::Never,
            _ => Place::Public,
        }
    }

    fn of_v6(address: Ipv6Addr) -> Place {
        let segments = address.segments();
        let embedded = |high: u16, low: u16| {
            let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
            Place::of_v4(Ipv4Addr::new(a, b, c, d))
        };
        match segments {
            [0, 0, 0, 0, 0, 0, 0, 1] => Place::Loopback,
            [0, 0, 0, 0, 0, 0, 0, 0] => Place::Never,
            // Mapped and translated IPv4 addresses (RFC 4291, RFC 6052), and 6to4.
            [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
            [0x2002, high, low, ..] => embedded(high, low),
            [first, ..] if first & 0xfe00 == 0xfc00 => Place::Private,
            [first, ..] if first & 0xe000 == 0x2000 => Place::Public,
            _ => Place::Never,
        }
    }
}

/// The addresses that one registry may refer to.
#[derive(Debug)]
pub(crate) struct Reach {
    /// The host name of the registry.
    registry: String,
    /// The kind of its address, once the name is looked up.
    place: OnceLock<Place>,
}

impl Reach {
    /// Creates the reach of the registry with the URL `base`.
    pub(crate) fn of(base: &Url) -> Arc<Reach> {
        let reach = Reach {
            registry: base.host_str().unwrap_or_default().to_owned(),
            place: OnceLock::new(),
        };
        if let Some(address) = literal(base) {
            reach.place.get_or_init(|| Place::of(address));
        }
        Arc::new(reach)
    }

    fn allows(&self, host: &str, address: IpAddr) -> bool {
        let place = Place::of(address);
        match host == self.registry {
            // The registry's first address decides, and later ones must be of the same kind or an
            // earlier one.
            true => place != Place::Never && place <= *self.place.get_or_init(|| place),
            false => place != Place::Never && place <= self.place.get().copied().unwrap_or(Place::Public),
        }
    }

    /// Returns the URL that `from` redirects to, if it may be followed.
    ///
    /// # Errors
    /// [`OciError::Redirect`].
    pub(crate) fn follow(&self, from: &Url, location: &[u8]) -> Result<Url, OciError> {
        let refuse = |reason| OciError::Redirect {
            host: authority(from),
            target: quoted(location),
            reason,
        };
        let text = std::str::from_utf8(location).map_err(|_| refuse("it is not a URL"))?;
        let target = from.join(text).map_err(|_| refuse("it is not a URL"))?;
        match (from.scheme(), target.scheme()) {
            (_, "https") | ("http", "http") => {}
            ("https", "http") => return Err(refuse("it is not encrypted")),
            _ => return Err(refuse("it is not HTTP")),
        }
        if !target.username().is_empty() || target.password().is_some() {
            return Err(refuse("it contains credentials"));
        }
        // A literal address is not looked up, so it is checked here.
        match (literal(&target), target.host_str()) {
            (_, None) => Err(refuse("it has no host")),
            (Some(address), Some(host)) if !self.allows(host, address) => {
                Err(refuse("this address must not be reached through the registry"))
            }
            _ => Ok(target),
        }
    }
}

/// Returns the address that a URL has instead of a host name.
pub(crate) fn literal(url: &Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Returns host and port of a URL, for messages.
pub(crate) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// Looks up names for connections, and removes forbidden addresses.
pub(crate) struct Resolver(pub(crate) Arc<Reach>);

/// All addresses of a name are forbidden.
#[derive(Debug, thiserror::Error)]
#[error("{host} has the forbidden address {address}")]
pub(crate) struct Forbidden {
    pub(crate) host: String,
    pub(crate) address: IpAddr,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let reach = Arc::clone(&self.0);
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            let (allowed, forbidden): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|address| reach.allows(&host, address.ip()));
            match (allowed.is_empty(), forbidden.first()) {
                (true, Some(address)) => {
                    let address = address.ip();
                    Err(Box::new(Forbidden { host, address }).into())
                }
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_place() {
        for (address, place) in [
            ("8.8.8.8", Place::Public),
            ("2606:4700::1111", Place::Public),
            ("10.1.2.3", Place::Private),
            ("172.31.0.1", Place::Private),
            ("192.168.1.1", Place::Private),
            ("100.64.0.1", Place::Private),
            ("fd00::1", Place::Private),
            ("127.0.0.2", Place::Loopback),
            ("::1", Place::Loopback),
            ("::ffff:127.0.0.1", Place::Loopback),
            ("64:ff9b::a00:1", Place::Private),
            ("2002:7f00:1::", Place::Loopback),
            ("169.254.169.254", Place::Never),
            ("fe80::1", Place::Never),
            ("0.0.0.0", Place::Never),
            ("::", Place::Never),
            ("224.0.0.1", Place::Never),
            ("255.255.255.255", Place::Never),
            ("ff02::1", Place::Never),
        ] {
            assert_eq!(Place::of(address.parse().unwrap()), place, "{address}");
        }
    }

    #[test]
    fn redirects_lead_only_to_places_that_the_registry_may_reach() {
        let follows = |base: &str, target: &str| {
            let base: Url = base.parse().unwrap();
            Reach::of(&base).follow(&base, target.as_bytes()).is_ok()
        };
        for (base, target, fine) in [
            ("https://1.1.1.1/", "https://cdn.example/blob?x=1", true),
            ("https://1.1.1.1/v2/a", "/v2/b", true),
            ("https://1.1.1.1/", "https://127.0.0.1/", false),
            ("https://1.1.1.1/", "https://[::1]:5000/", false),
            ("https://1.1.1.1/", "https://10.0.0.1/", false),
            ("https://1.1.1.1/", "https://2130706433/", false),
            ("https://10.0.0.1/", "https://10.0.0.2/", true),
            ("https://10.0.0.1/", "https://127.0.0.1/", false),
            ("http://127.0.0.1:5000/", "http://127.0.0.1:6000/", true),
            ("http://127.0.0.1:5000/", "http://169.254.169.254/latest", false),
            ("https://1.1.1.1/", "http://cdn.example/", false),
            ("https://1.1.1.1/", "file:///etc/passwd", false),
            ("https://1.1.1.1/", "https://user:secret@cdn.example/", false),
            ("https://1.1.1.1/", "https://", false),
        ] {
            assert_eq!(follows(base, target), fine, "{base} to {target}");
        }
    }
}
