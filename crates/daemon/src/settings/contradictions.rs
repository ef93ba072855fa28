//! Checks for settings that are each valid but contradict one another. All commands use this check.
//!
//! Settings that cannot work stop the command. Settings that work but may mislead are caveats,
//! which `serve` logs and `doctor` lists.

use crate::settings::error::SettingsError;
use crate::settings::values::Settings;
use scalebox_storage::Backing;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// A setting with a surprising effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caveat {
    /// The effect.
    pub finding: String,
    /// The remedy.
    pub fix: String,
}

/// Rejects settings that contradict each other.
///
/// # Errors
/// [`SettingsError::Value`], naming the setting to change.
pub(crate) fn check(settings: &Settings) -> Result<(), SettingsError> {
    disk_sizes(settings)?;
    paths(settings)?;
    resolvers(settings)
}

/// Lists the settings that work but may surprise.
pub(crate) fn caveats(settings: &Settings) -> Vec<Caveat> {
    let mut caveats = Vec::new();
    if !settings.api.ip().is_loopback() {
        caveats.push(Caveat {
            finding: format!(
                "the API listens on {}, which other hosts can reach, and tokens are sent unencrypted",
                settings.api
            ),
            fix: "set API_BIND=127.0.0.1 and put a TLS proxy in front: see docs/install.md".to_owned(),
        });
    }
    if let (Backing::Existing, Some(size)) = (&settings.backing, &settings.storage_size) {
        caveats.push(Caveat {
            finding: format!(
                "STORAGE_SIZE={size} has no effect with POOL_IMAGE=none: the pool is as large as its file system"
            ),
            fix: "remove STORAGE_SIZE".to_owned(),
        });
    }
    caveats
}

fn wrong(key: &'static str, value: impl Display, expected: impl Into<String>) -> SettingsError {
    SettingsError::Value {
        key,
        value: value.to_string(),
        expected: expected.into(),
    }
}

fn disk_sizes(settings: &Settings) -> Result<(), SettingsError> {
    let (default, max) = (settings.default_disk_size, settings.max_disk_size);
    if default > max {
        let expected = format!("must not be larger than MAX_DISK_SIZE_GIB, which is {max}");
        return Err(wrong("DEFAULT_DISK_SIZE_GIB", default, expected));
    }
    Ok(())
}

/// Rejects resolvers in `SUBNET`: guests cannot reach each other. They can reach the host's own
/// resolvers.
fn resolvers(settings: &Settings) -> Result<(), SettingsError> {
    let net = &settings.net;
    let a_guest = |server: &&std::net::Ipv4Addr| net.subnet().contains(*server) && **server != net.gateway();
    match settings.guest_dns.iter().find(a_guest) {
        Some(server) => Err(wrong(
            "GUEST_DNS",
            server,
            format!(
                "is in SUBNET ({}), where guests cannot reach each other: set a server outside of it",
                net.subnet()
            ),
        )),
        None => Ok(()),
    }
}

/// A setting and its path, if it has one.
type PathSetting<'a> = (&'static str, Option<&'a Path>);

/// Rejects paths that depend on each other. The pool's folder is covered while the pool is mounted
/// and empty while it is not, and `RUN_DIR` is emptied by a reboot.
fn paths(settings: &Settings) -> Result<(), SettingsError> {
    let image = match &settings.backing {
        Backing::Image(image) => Some(image.as_path()),
        Backing::Device(_) | Backing::Existing => None,
    };
    let image: PathSetting = ("POOL_IMAGE", image);
    let data: PathSetting = ("DATA_DIR", Some(&settings.data_dir));
    let state: PathSetting = ("STATE_DIR", Some(&settings.state_dir));
    let run: PathSetting = ("RUN_DIR", Some(&settings.run_dir));
    let fstab: PathSetting = ("FSTAB", settings.fstab.as_deref());
    let hidden = "files there are hidden while the pool is mounted, and are needed to mount it";
    let volatile = "RUN_DIR does not survive a reboot";
    let image_is_file = "POOL_IMAGE is a file";
    for (inner, outer, why) in [
        (image, data, hidden),
        (state, data, hidden),
        (run, data, hidden),
        (fstab, data, hidden),
        (image, run, volatile),
        (state, run, volatile),
        (data, run, volatile),
        (data, image, image_is_file),
        (state, image, image_is_file),
        (run, image, image_is_file),
    ] {
        let ((key, Some(path)), (outer_key, Some(outer))) = (inner, outer) else {
            continue;
        };
        if resolved(path).starts_with(resolved(outer)) {
            let expected = format!("must not be in {outer_key} ({}): {why}", outer.display());
            return Err(wrong(key, path.display(), expected));
        }
    }
    Ok(())
}

/// Resolves symbolic links in the part of the path that exists.
fn resolved(path: &Path) -> PathBuf {
    let existing = path
        .ancestors()
        .find_map(|ancestor| Some((ancestor, ancestor.canonicalize().ok()?)));
    match existing {
        Some((ancestor, real)) => match path.strip_prefix(ancestor) {
            Ok(rest) if rest.as_os_str().is_empty() => real,
            Ok(rest) => real.join(rest),
            Err(_) => path.to_owned(),
        },
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejection(pairs: &[(&'static str, &str)]) -> Option<String> {
        Settings::of(pairs).err().map(|error| error.to_string())
    }

    /// The settings, the rejected setting, and the setting whose path contains its path.
    type Clash = (&'static [(&'static str, &'static str)], &'static str, &'static str);
    const CLASHES: [Clash; 10] = [
        (
            &[("DATA_DIR", "/srv/pool"), ("POOL_IMAGE", "/srv/pool/pool.img")],
            "POOL_IMAGE",
            "DATA_DIR",
        ),
        (
            &[("DATA_DIR", "/srv/pool/"), ("POOL_IMAGE", "/srv//pool/./pool.img")],
            "POOL_IMAGE",
            "DATA_DIR",
        ),
        (
            &[("DATA_DIR", "/srv/pool"), ("STATE_DIR", "/srv/pool/state")],
            "STATE_DIR",
            "DATA_DIR",
        ),
        (
            &[("DATA_DIR", "/srv/pool"), ("STATE_DIR", "/srv/pool")],
            "STATE_DIR",
            "DATA_DIR",
        ),
        (
            &[("DATA_DIR", "/srv/pool"), ("RUN_DIR", "/srv/pool/run")],
            "RUN_DIR",
            "DATA_DIR",
        ),
        (
            &[("DATA_DIR", "/srv/pool"), ("FSTAB", "/srv/pool/fstab")],
            "FSTAB",
            "DATA_DIR",
        ),
        (
            &[("RUN_DIR", "/srv/run"), ("DATA_DIR", "/srv/run/pool")],
            "DATA_DIR",
            "RUN_DIR",
        ),
        (
            &[("RUN_DIR", "/srv/run"), ("POOL_IMAGE", "/srv/run/pool.img")],
            "POOL_IMAGE",
            "RUN_DIR",
        ),
        (
            &[("RUN_DIR", "/srv/run"), ("STATE_DIR", "/srv/run")],
            "STATE_DIR",
            "RUN_DIR",
        ),
        (
            &[("POOL_IMAGE", "/srv/p.img"), ("STATE_DIR", "/srv/p.img/state")],
            "STATE_DIR",
            "POOL_IMAGE",
        ),
    ];

    #[test]
    fn paths_that_hide_each_other_are_rejected() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/srv/pool", folder.path().join("link")).unwrap();
        let link = format!("{}/link/image", folder.path().display());
        for (pairs, key, outer) in CLASHES {
            let rejected = rejection(pairs).unwrap_or_else(|| panic!("{pairs:?}"));
            assert!(
                rejected.starts_with(&format!("{key}=")) && rejected.contains(&format!("must not be in {outer} (")),
                "{rejected}"
            );
        }
        for valid in [
            &[][..],
            &[("POOL_IMAGE", "none"), ("DATA_DIR", "/srv/pool")],
            &[
                ("DATA_DIR", "/srv/pool"),
                ("POOL_IMAGE", "/srv/pool.img"),
                ("STATE_DIR", "/srv/pool-state"),
            ],
            &[
                ("STATE_DIR", "/srv/state"),
                ("RUN_DIR", "/srv/state/run"),
                ("DATA_DIR", "/srv/state/pool"),
            ],
        ] {
            assert_eq!(rejection(valid), None, "{valid:?}");
        }
        // A link to the same place.
        std::fs::create_dir(folder.path().join("real")).unwrap();
        std::fs::remove_file(folder.path().join("link")).unwrap();
        std::os::unix::fs::symlink("real", folder.path().join("link")).unwrap();
        let real = format!("{}/real", folder.path().display());
        assert!(rejection(&[("DATA_DIR", &real), ("POOL_IMAGE", &link)]).is_some());
    }

    #[test]
    fn a_resolver_in_the_guest_subnet_is_rejected_unless_it_is_the_host() {
        let rejected = rejection(&[("GUEST_DNS", "172.16.0.9")]).unwrap();
        assert!(rejected.contains("guests cannot reach each other"), "{rejected}");
        assert_eq!(rejection(&[("GUEST_DNS", "172.16.0.1")]), None);
    }

    #[test]
    fn an_exposed_api_and_an_ineffective_storage_size_are_caveats() {
        let caveats = |pairs: &[(&'static str, &str)]| {
            let found = super::caveats(&Settings::of(pairs).unwrap());
            found.into_iter().map(|caveat| caveat.finding).collect::<Vec<_>>()
        };
        assert_eq!(caveats(&[]), Vec::<String>::new());
        assert_eq!(
            caveats(&[("API_BIND", "::1"), ("STORAGE_SIZE", "30G")]),
            Vec::<String>::new()
        );
        let found = caveats(&[("API_BIND", "0.0.0.0"), ("POOL_IMAGE", "none"), ("STORAGE_SIZE", "30G")]);
        assert!(
            found.len() == 2 && found[0].contains("unencrypted") && found[1].contains("STORAGE_SIZE=30G has no effect"),
            "{found:?}"
        );
    }
}
