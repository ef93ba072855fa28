//! Reading the settings from the environment and the configuration file.

use crate::settings::contradictions;
use crate::settings::error::SettingsError;
use crate::settings::given::{Given, Source};
use crate::settings::table;
use crate::settings::values::Settings;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

/// The default of `--config`.
pub(crate) const DEFAULT_FILE: &str = "/etc/scaleboxd/config";

impl Settings {
    /// Reads the environment and the file, and parses all settings. The default file may be
    /// missing.
    ///
    /// # Errors
    /// The first setting that is invalid.
    pub(crate) fn load(file: Option<&Path>) -> Result<Settings, SettingsError> {
        Settings::check(&read(file)?)
    }

    /// Parses all settings and checks that they fit together.
    ///
    /// # Errors
    /// The first setting that is invalid.
    pub(crate) fn check(given: &Given) -> Result<Settings, SettingsError> {
        let settings = Settings::parse(given)?;
        contradictions::check(&settings)?;
        Ok(settings)
    }
}

/// Reads the environment and the file. The default file may be missing.
///
/// # Errors
/// The file or a variable cannot be read.
pub(super) fn read(file: Option<&Path>) -> Result<Given, SettingsError> {
    let path = file.unwrap_or(Path::new(DEFAULT_FILE));
    let mut given = match (file, fs::read(path)) {
        (_, Ok(text)) => parse_file(path, &text)?,
        (None, Err(error)) if error.kind() == io::ErrorKind::NotFound => Given::default(),
        (_, Err(source)) => {
            return Err(SettingsError::File {
                path: path.to_owned(),
                source,
            });
        }
    };
    for key in table::keys() {
        // Shells pass an unset setting as an empty variable.
        if let Some(value) = std::env::var_os(key).filter(|value| !value.is_empty()) {
            let value = value.into_string().map_err(|value| SettingsError::Value {
                key,
                value: value.to_string_lossy().into_owned(),
                expected: "must be UTF-8".to_owned(),
            })?;
            given.set(key, value, Source::Environment);
        }
    }
    Ok(given)
}

fn parse_file(path: &Path, text: &[u8]) -> Result<Given, SettingsError> {
    let mut given = Given::default();
    let mut set_in_line: HashMap<&'static str, usize> = HashMap::new();
    for (number, line) in (1..).zip(text.split(|&byte| byte == b'\n')) {
        let line = line.trim_ascii();
        // A comment may have any encoding.
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let problem = |problem| SettingsError::Line {
            path: path.to_owned(),
            number,
            problem,
        };
        let line = str::from_utf8(line).map_err(|_| problem("the line is not UTF-8".to_owned()))?;
        let Some((key, value)) = line.split_once('=') else {
            // The line is not shown: it may contain the token.
            return Err(problem("the line is not of the form KEY=VALUE".to_owned()));
        };
        let Some(key) = table::keys().find(|known| *known == key.trim()) else {
            return Err(problem(format!(
                "unknown setting {:?}; the settings are {}",
                key.trim(),
                table::keys().collect::<Vec<_>>().join(", ")
            )));
        };
        if let Some(first) = set_in_line.insert(key, number) {
            return Err(problem(format!(
                "{key} is already set in line {first}: remove one of the two lines"
            )));
        }
        let value = value.trim();
        // The same file may serve as systemd's EnvironmentFile=, which removes quotes.
        let unquoted = ['"', '\'']
            .into_iter()
            .find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote));
        let value = unquoted.unwrap_or(value);
        if !value.is_empty() {
            given.set(key, value.to_owned(), Source::File);
        }
    }
    Ok(given)
}

#[cfg(test)]
impl Settings {
    /// Parses these settings, over defaults.
    pub(crate) fn of(pairs: &[(&'static str, &str)]) -> Result<Settings, SettingsError> {
        let mut given = Given::default();
        for (key, value) in pairs {
            given.set(key, (*value).to_owned(), Source::File);
        }
        Settings::check(&given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_storage::Backing;
    use scalebox_units::Gib;

    fn settings(pairs: &[(&'static str, &str)]) -> Result<Settings, String> {
        Settings::of(pairs).map_err(|error| error.to_string())
    }

    #[test]
    fn the_defaults_match_the_documentation() {
        let settings = settings(&[]).unwrap();
        assert_eq!(settings.default_disk_size, Gib::new(2));
        assert_eq!(settings.max_disk_size, Gib::new(100));
        assert_eq!(settings.storage_buffer, Gib::new(2));
        assert_eq!(settings.overcommit_ratio, 4.0);
        assert_eq!(settings.data_dir, Path::new("/var/lib/scalebox"));
        assert_eq!(settings.backing, Backing::Image("/var/lib/scalebox.img".into()));
        assert_eq!(settings.state_dir, Path::new("/var/lib/scaleboxd"));
        assert_eq!(settings.run_dir, Path::new("/run/scaleboxd"));
        assert_eq!(settings.api.to_string(), "127.0.0.1:8080");
        assert_eq!(
            (settings.net.bridge(), settings.net.subnet().to_string().as_str()),
            ("scalebox0", "172.16.0.0/16")
        );
        assert_eq!(settings.net.ports(), 22001..=32000);
        let denies = |settings: &Settings, network: &str| settings.net.denied().contains(&network.parse().unwrap());
        assert!(denies(&settings, "192.168.0.0/16") && denies(&settings, "169.254.0.0/16"));
        assert_eq!((settings.default_vcpu_count, settings.default_mem_size_mib), (1, 512));
        assert!(settings.token().is_err(), "the token has no default");
    }

    #[test]
    fn a_pool_is_backed_by_an_image_a_device_or_a_given_file_system() {
        let backing = |pairs: &[(&'static str, &str)]| settings(pairs).map(|settings| settings.backing);
        assert_eq!(
            backing(&[("POOL_IMAGE", "/srv/p.img")]),
            Ok(Backing::Image("/srv/p.img".into()))
        );
        assert_eq!(
            backing(&[("POOL_DEVICE", "/dev/sdb")]),
            Ok(Backing::Device("/dev/sdb".into()))
        );
        assert_eq!(backing(&[("POOL_IMAGE", "none")]), Ok(Backing::Existing));
        let both = backing(&[("POOL_DEVICE", "/dev/sdb"), ("POOL_IMAGE", "/srv/p.img")]).unwrap_err();
        assert!(
            both.contains("POOL_DEVICE=\"/dev/sdb\"") && both.contains("together with POOL_IMAGE"),
            "{both}"
        );
    }

    #[test]
    fn a_pool_with_a_requested_size_grows_automatically_only_if_set_to() {
        let grows = |pairs: &[(&'static str, &str)]| settings(pairs).unwrap().pool_auto_grow;
        assert!(grows(&[]));
        assert!(!grows(&[("STORAGE_SIZE", "100G")]));
        assert!(grows(&[("STORAGE_SIZE", "100G"), ("POOL_AUTO_GROW", "on")]));
        assert!(!grows(&[("POOL_AUTO_GROW", "off")]));
    }

    #[test]
    fn an_invalid_setting_is_reported_with_its_value_and_the_expected_form() {
        for (key, value, expected) in [
            ("STORAGE_SIZE", "100", "100G"),
            ("STORAGE_SIZE", "0G", "100G"),
            ("POOL_AUTO_GROW", "yes", "one of on, off"),
            ("POOL_LOW_WATER_GIB", "10%", "a whole number from 0"),
            ("DEFAULT_DISK_SIZE_GIB", "two", "a whole number from 1"),
            ("DEFAULT_DISK_SIZE_GIB", "200", "MAX_DISK_SIZE_GIB, which is 100"),
            ("MAX_DISK_SIZE_GIB", "0", "a whole number from 1"),
            ("STORAGE_BUFFER_GIB", "-1", "a whole number from 0"),
            ("OVERCOMMIT_RATIO", "0", "from 0.1 to 1000"),
            ("ACCOUNTING_SECONDS", "0", "a whole number from 1"),
            ("OVERCOMMIT_RATIO", "NaN", "from 0.1 to 1000"),
            ("DATA_DIR", "pool", "an absolute path"),
            ("POOL_DEVICE", "sdb", "an absolute path"),
            ("API_BIND", "localhost", "an address such as 127.0.0.1"),
            ("API_PORT", "80800", "from 0 to 65535"),
            ("API_TOKEN", "with space", "printable ASCII"),
            ("HOST_IP", "host", "an IPv4 address"),
            ("HOST_IP", "0.0.0.0", "clients reach"),
            ("HOST_IP", "2001:db8::1", "IPv4 only, so no client could reach a VM"),
            ("BRIDGE", "a bridge with a long name", "such as scalebox0"),
            ("SUBNET", "172.16.0.0/32", "172.16.0.0/16"),
            ("SUBNET", "here", "172.16.0.0/16"),
            ("PORT_MIN", "22", "from 1024"),
            ("PORT_MIN", "40000", "32000"),
            ("GUEST_DNS", "one", "IPv4 addresses"),
            ("GUEST_DNS", "127.0.0.1", "loopback addresses refer to the guest itself"),
            ("GUEST_DNS", "192.0.2.53, 0.0.0.0", "not a host address"),
            ("GUEST_DNS", "224.0.0.251", "a multicast address"),
            ("GUEST_DNS", "255.255.255.255", "reserved"),
            ("GUEST_DENY", "10.0.0.0/8,lan", "private, none, or networks"),
            ("VMM", "xen", "one of auto, qemu"),
            ("ACCEL", "hvf", "one of auto, kvm, tcg"),
            ("GUEST_TRIM_INTERVAL_MINUTES", "daily", "from 0 to"),
            ("REGISTRY_MIRRORS", "mirror.example", "REGISTRY=URL pairs such as"),
            (
                "REGISTRY_MIRRORS",
                "docker.io=https://a docker.io=https://b/c",
                "docker.io=https://b/c cannot be used: the URL must end after the host",
            ),
            ("LOG_FORMAT", "xml", "one of text, json"),
        ] {
            let error = settings(&[(key, value)]).expect_err(key);
            assert!(error.starts_with(key) && error.contains(expected), "{error}");
            assert_eq!(error.contains(value), key != "API_TOKEN", "{error}");
        }
    }

    #[test]
    fn a_misspelt_key_in_the_file_is_an_error() {
        let path = Path::new("/etc/scaleboxd/config");
        let given = parse_file(path, b"# f\xfcr\n\nAPI_TOKEN=\"abc\"\nAPI_PORT = 9090\r\nHOST_IP=\n").unwrap();
        assert_eq!(
            ["API_TOKEN", "API_PORT", "HOST_IP"].map(|key| given.get(key)),
            [Some("abc"), Some("9090"), None]
        );
        let error = parse_file(path, b"API_TOKEN=abc\nAPI_PROT=1").unwrap_err().to_string();
        assert!(
            error.contains("line 2") && error.contains("API_PROT") && error.contains("API_PORT"),
            "{error}"
        );
        assert!(parse_file(path, b"just words").is_err());
    }

    #[test]
    fn a_key_that_is_set_twice_and_a_line_that_is_not_utf_8_are_errors() {
        let path = Path::new("/etc/scaleboxd/config");
        let error = parse_file(path, b"API_PORT=1\n# comment\nAPI_PORT=2\n")
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "/etc/scaleboxd/config line 3: API_PORT is already set in line 1: remove one of the two lines"
        );
        let error = parse_file(path, b"API_PORT=1\nDATA_DIR=/f\xfcr\n")
            .unwrap_err()
            .to_string();
        assert_eq!(error, "/etc/scaleboxd/config line 2: the line is not UTF-8");
    }

    #[test]
    fn mirrors_keep_their_order() {
        let text = "docker.io=https://one  docker.io=http://two:5000 ghcr.io=https://one";
        let mirrors = settings(&[("REGISTRY_MIRRORS", text)]).unwrap().registry_mirrors;
        let expected = text.split_whitespace().map(|mirror| mirror.parse().unwrap());
        assert_eq!(mirrors, expected.collect::<Vec<_>>());
        assert_eq!(settings(&[]).unwrap().registry_mirrors, []);
    }

    #[test]
    fn registration_in_fstab_can_be_disabled() {
        assert_eq!(settings(&[]).unwrap().fstab.as_deref(), Some(Path::new("/etc/fstab")));
        assert_eq!(settings(&[("FSTAB", "none")]).unwrap().fstab, None);
        assert!(settings(&[("FSTAB", "fstab")]).is_err());
    }

    #[test]
    fn a_token_is_not_shown_in_debug_output() {
        let settings = settings(&[("API_TOKEN", "hunter2hunter2")]).unwrap();
        assert!(!format!("{settings:?}").contains("hunter2"));
    }
}
