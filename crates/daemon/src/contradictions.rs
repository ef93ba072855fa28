//! Settings that are each well-formed and contradict one another: one check for `pool init`,
//! `serve`, `doctor` and all other commands.
//!
//! What cannot work stops the command. What works and is not what it looks like is a caveat, which
//! `serve` logs and `doctor` lists.

use crate::settings::{Settings, SettingsError};
use scalebox_storage::Backing;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// Something an operator should know of the settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caveat {
    /// What it is.
    pub finding: String,
    /// What can be done about it.
    pub fix: String,
}

/// Refuses settings that contradict each other.
///
/// # Errors
/// [`SettingsError::Value`] with the setting to change.
pub fn check(settings: &Settings) -> Result<(), SettingsError> {
    disk_sizes(settings)?;
    paths(settings)?;
    resolvers(settings)
}

/// What works and may surprise.
pub fn caveats(settings: &Settings) -> Vec<Caveat> {
    let mut caveats = Vec::new();
    if !settings.api.ip().is_loopback() {
        caveats.push(Caveat {
            finding: format!(
                "the API listens on {}, beyond this host, and sends tokens in the clear",
                settings.api
            ),
            fix: "set API_BIND=127.0.0.1 and put a TLS proxy in front of it: see docs/install.md".to_owned(),
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

fn wrong(key: &'static str, value: impl Display, right: impl Into<String>) -> SettingsError {
    SettingsError::Value {
        key,
        value: value.to_string(),
        right: right.into(),
    }
}

fn disk_sizes(settings: &Settings) -> Result<(), SettingsError> {
    let (default, max) = (settings.default_disk_size, settings.max_disk_size);
    if default > max {
        let right = format!("it must not be larger than MAX_DISK_SIZE_GIB, which is {max}");
        return Err(wrong("DEFAULT_DISK_SIZE_GIB", default, right));
    }
    Ok(())
}

/// A guest reaches no other guest, and the host only at the resolvers that it has itself.
fn resolvers(settings: &Settings) -> Result<(), SettingsError> {
    let net = &settings.net;
    let a_guest = |server: &&std::net::Ipv4Addr| net.subnet().contains(*server) && **server != net.gateway();
    match settings.guest_dns.iter().find(a_guest) {
        Some(server) => Err(wrong(
            "GUEST_DNS",
            server,
            format!(
                "it lies in SUBNET ({}), and no guest reaches another: name a server outside",
                net.subnet()
            ),
        )),
        None => Ok(()),
    }
}

/// A setting, and the path it names, if any.
type Place<'a> = (&'static str, Option<&'a Path>);

/// Each place must be there without the others: the pool's folder is covered while the pool is
/// mounted and empty while it is not, and `RUN_DIR` is gone after a reboot.
fn paths(settings: &Settings) -> Result<(), SettingsError> {
    let image = match &settings.backing {
        Backing::Image(image) => Some(image.as_path()),
        Backing::Device(_) | Backing::Existing => None,
    };
    let image: Place = ("POOL_IMAGE", image);
    let data: Place = ("DATA_DIR", Some(&settings.data_dir));
    let state: Place = ("STATE_DIR", Some(&settings.state_dir));
    let run: Place = ("RUN_DIR", Some(&settings.run_dir));
    let fstab: Place = ("FSTAB", settings.fstab.as_deref());
    let hidden = "what lies there is hidden while the pool is mounted, and the pool cannot be mounted without it";
    let volatile = "RUN_DIR is for what need not outlive a reboot";
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
            let right = format!("it must not lie in {outer_key} ({}): {why}", outer.display());
            return Err(wrong(key, path.display(), right));
        }
    }
    Ok(())
}

/// The path without links, as far as it is there.
fn resolved(path: &Path) -> PathBuf {
    let there = path
        .ancestors()
        .find_map(|ancestor| Some((ancestor, ancestor.canonicalize().ok()?)));
    match there {
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

    fn refusal(pairs: &[(&'static str, &str)]) -> Option<String> {
        Settings::of(pairs).err().map(|error| error.to_string())
    }

    /// Settings, the one that is wrong, and the one that it lies in.
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
    fn places_that_hide_each_other_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/srv/pool", folder.path().join("link")).unwrap();
        let link = format!("{}/link/image", folder.path().display());
        for (pairs, key, outer) in CLASHES {
            let refused = refusal(pairs).unwrap_or_else(|| panic!("{pairs:?}"));
            assert!(
                refused.starts_with(&format!("{key}=")) && refused.contains(&format!("must not lie in {outer} (")),
                "{refused}"
            );
        }
        for fine in [
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
            assert_eq!(refusal(fine), None, "{fine:?}");
        }
        // By another name it is the same place.
        std::fs::create_dir(folder.path().join("real")).unwrap();
        std::fs::remove_file(folder.path().join("link")).unwrap();
        std::os::unix::fs::symlink("real", folder.path().join("link")).unwrap();
        let real = format!("{}/real", folder.path().display());
        assert!(refusal(&[("DATA_DIR", &real), ("POOL_IMAGE", &link)]).is_some());
    }

    #[test]
    fn a_resolver_among_the_guests_is_refused_unless_it_is_the_host() {
        let refused = refusal(&[("GUEST_DNS", "172.16.0.9")]).unwrap();
        assert!(refused.contains("no guest reaches another"), "{refused}");
        assert_eq!(refusal(&[("GUEST_DNS", "172.16.0.1")]), None);
    }

    #[test]
    fn an_api_beyond_this_host_and_a_size_without_effect_are_caveats() {
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
            found.len() == 2
                && found[0].contains("in the clear")
                && found[1].contains("STORAGE_SIZE=30G has no effect"),
            "{found:?}"
        );
    }
}
