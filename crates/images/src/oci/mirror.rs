//! Mirrors of registries.

use oci_spec::distribution::Reference;
use reqwest::Url;
use std::str::FromStr;

/// A mirror of a registry: `REGISTRY=URL`, such as `docker.io=https://mirror.example:5000`.
///
/// It has the repositories of the registry under the same names. Its URL has no path and no
/// credentials; with `http`, it is reached without encryption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    registry: String,
    base: Url,
}

/// A text is not a [`Mirror`]. The message names the problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMirror {
    /// There is no `=` between two parts.
    #[error("it is not of the form REGISTRY=URL")]
    Form,
    /// The registry is not a host.
    #[error("the registry must be a host with an optional port, such as docker.io or registry.example:5000")]
    Registry,
    /// The URL is malformed, or has another scheme.
    #[error("the URL must begin with https:// or http://, followed by a host and an optional port")]
    Url,
    /// The URL contains a user name or a password.
    #[error("the URL must not contain credentials, because none are sent to a mirror")]
    Credentials,
    /// The URL has a path, a query or a fragment.
    #[error("the URL must end after the host and the port")]
    Path,
}

impl Mirror {
    /// Returns whether this is a mirror of `registry`, the host in a complete reference.
    pub(crate) fn is_of(&self, registry: &str) -> bool {
        self.registry == registry
    }

    /// Returns the URL.
    pub(crate) fn base(&self) -> &Url {
        &self.base
    }
}

impl FromStr for Mirror {
    type Err = InvalidMirror;

    fn from_str(text: &str) -> Result<Self, InvalidMirror> {
        let (registry, url) = text.split_once('=').ok_or(InvalidMirror::Form)?;
        // A reference has the registry in its complete form: `index.docker.io` is `docker.io`.
        let image: Option<Reference> = format!("{registry}/library/image").parse().ok();
        let image = image.filter(|image| image.repository() == "library/image");
        let base: Url = url.parse().map_err(|_| InvalidMirror::Url)?;
        if !matches!(base.scheme(), "https" | "http") || base.host_str().is_none() {
            return Err(InvalidMirror::Url);
        }
        if !base.username().is_empty() || base.password().is_some() {
            return Err(InvalidMirror::Credentials);
        }
        if base.path() != "/" || base.query().is_some() || base.fragment().is_some() {
            return Err(InvalidMirror::Path);
        }
        Ok(Mirror {
            registry: image.ok_or(InvalidMirror::Registry)?.registry().to_owned(),
            base,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_name_a_registry_and_a_url_without_path_and_credentials() {
        for (text, registry) in [
            ("docker.io=https://mirror.example:5000", "docker.io"),
            ("index.docker.io=https://mirror.example/", "docker.io"),
            ("ghcr.io=http://10.0.0.5:5000", "ghcr.io"),
            ("localhost:5000=https://[2001:db8::1]:443", "localhost:5000"),
        ] {
            let mirror: Mirror = text.parse().unwrap();
            assert!(mirror.is_of(registry), "{mirror:?}");
        }
        for (text, problem) in [
            ("https://mirror.example", InvalidMirror::Form),
            ("team=https://mirror.example", InvalidMirror::Registry),
            ("docker.io/library=https://mirror.example", InvalidMirror::Registry),
            ("=https://mirror.example", InvalidMirror::Registry),
            ("docker.io=mirror.example", InvalidMirror::Url),
            ("docker.io=ftp://mirror.example", InvalidMirror::Url),
            ("docker.io=https://", InvalidMirror::Url),
            (
                "docker.io=https://user:secret@mirror.example",
                InvalidMirror::Credentials,
            ),
            ("docker.io=https://mirror.example/proxy", InvalidMirror::Path),
            ("docker.io=https://mirror.example?x", InvalidMirror::Path),
        ] {
            assert_eq!(text.parse::<Mirror>(), Err(problem), "{text}");
        }
    }
}
