//! Settings: from the environment, over a file of `KEY=VALUE` lines, over defaults.
//!
//! A setting that does not parse stops the daemon, with its name, its value and the expected form.
//! So does an unknown key in the file: if a misspelt setting were ignored, its default would apply
//! unnoticed.

pub mod contradictions;

use ipnet::Ipv4Net;
use scalebox_client::Limits;
use scalebox_net::{NetConfig, PRIVATE_NETWORKS, unusable_resolver};
use scalebox_storage::{Backing, Bounds, PoolPlan, RequestedSize};
use scalebox_units::Gib;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// The default of `--config`.
pub const DEFAULT_FILE: &str = "/etc/scaleboxd/config";

/// The minimum memory, in MiB, with which the Debian guest boots to a login.
const MIN_MEM_MIB: u64 = 128;

/// All settings, in the order of the table in the README.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `STORAGE_SIZE`: the size of a new pool; 80 % of the free space if not set.
    pub storage_size: Option<RequestedSize>,
    /// `POOL_AUTO_GROW`: whether the pool grows automatically; if not set, it does unless
    /// `STORAGE_SIZE` is set.
    pub pool_auto_grow: bool,
    /// `POOL_LOW_WATER_GIB`: the free space below which the pool grows.
    pub pool_low_water: Gib,
    /// `DEFAULT_DISK_SIZE_GIB`: the disk size of a VM that requests none.
    pub default_disk_size: Gib,
    /// `MAX_DISK_SIZE_GIB`: the maximum disk size.
    pub max_disk_size: Gib,
    /// `STORAGE_BUFFER_GIB`: the space that is always kept free.
    pub storage_buffer: Gib,
    /// `OVERCOMMIT_RATIO`: how many times the pool's capacity may be committed.
    pub overcommit_ratio: f64,
    /// `ACCOUNTING_SECONDS`: the interval of disk usage measurements.
    pub accounting_interval: Duration,
    /// `DATA_DIR`: the pool's mount point.
    pub data_dir: PathBuf,
    /// `POOL_IMAGE` and `POOL_DEVICE`: the backing of the pool.
    pub backing: Backing,
    /// `STATE_DIR`: the folder of the state, outside the pool.
    pub state_dir: PathBuf,
    /// `RUN_DIR`: the folder for sockets and seed drives of running machines.
    pub run_dir: PathBuf,
    /// `FSTAB`: the table to register the pool's mount in; `None` for no registration.
    pub fstab: Option<PathBuf>,
    /// `API_BIND` and `API_PORT`.
    pub api: SocketAddr,
    /// `API_TOKEN`; only `serve` needs it.
    pub api_token: Option<Token>,
    /// `HOST_IP`: the address shown to clients; the default route's if not set.
    pub host_ip: Option<IpAddr>,
    /// `BRIDGE`, `SUBNET`, `PORT_MIN`, `PORT_MAX` and `GUEST_DENY`: the guests' network, their SSH
    /// forwards and the networks they cannot reach.
    pub net: NetConfig,
    /// `GUEST_DNS`: the resolvers for guests; the host's own if not set.
    pub guest_dns: Vec<Ipv4Addr>,
    /// `VMM`: the hypervisor driver.
    pub vmm: VmmChoice,
    /// `ACCEL`: the accelerator.
    pub accel: AccelChoice,
    /// `DEFAULT_VCPU_COUNT`.
    pub default_vcpu_count: u32,
    /// `DEFAULT_MEM_SIZE_MIB`.
    pub default_mem_size_mib: u64,
    /// `GUEST_TRIM_INTERVAL_MINUTES`: the interval of trims of each guest; zero for never.
    pub guest_trim_interval: Duration,
    /// `LOG_FORMAT`.
    pub log_format: LogFormat,
    /// `LOG_LEVEL`: a level, or a filter by module as the crate `tracing-subscriber` parses it.
    pub log_level: String,
}

/// The bearer token. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Returns the secret itself.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

/// `VMM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmmChoice {
    /// The best one available on this host.
    Auto,
    /// QEMU's `microvm` machine.
    Qemu,
    /// Firecracker, which needs KVM.
    Firecracker,
}

/// `ACCEL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccelChoice {
    /// KVM if it works on this host, otherwise emulation.
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

/// `LOG_FORMAT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Why the settings are rejected.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A value does not have the expected form.
    #[error("{key}={value:?} cannot be used: {expected}")]
    Value {
        /// The setting.
        key: &'static str,
        /// The value.
        value: String,
        /// The expected form.
        expected: String,
    },
    /// A required setting is missing.
    #[error("{key} is not set: {expected}")]
    Missing {
        /// The setting.
        key: &'static str,
        /// How to set it.
        expected: &'static str,
    },
    /// The file cannot be read.
    #[error("cannot read the settings in {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A line of the file is not `KEY=VALUE`, or its key is unknown.
    #[error("{} line {number}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The number of the line, starting at one.
        number: usize,
        /// What is wrong with the line.
        problem: String,
    },
}

const KEYS: [&str; 31] = [
    "STORAGE_SIZE",
    "POOL_AUTO_GROW",
    "POOL_LOW_WATER_GIB",
    "DEFAULT_DISK_SIZE_GIB",
    "MAX_DISK_SIZE_GIB",
    "STORAGE_BUFFER_GIB",
    "OVERCOMMIT_RATIO",
    "ACCOUNTING_SECONDS",
    "DATA_DIR",
    "POOL_IMAGE",
    "POOL_DEVICE",
    "STATE_DIR",
    "RUN_DIR",
    "FSTAB",
    "API_BIND",
    "API_PORT",
    "API_TOKEN",
    "HOST_IP",
    "BRIDGE",
    "SUBNET",
    "PORT_MIN",
    "PORT_MAX",
    "GUEST_DNS",
    "GUEST_DENY",
    "VMM",
    "ACCEL",
    "DEFAULT_VCPU_COUNT",
    "DEFAULT_MEM_SIZE_MIB",
    "GUEST_TRIM_INTERVAL_MINUTES",
    "LOG_FORMAT",
    "LOG_LEVEL",
];

impl Settings {
    /// Reads the environment and the file. The default file may be missing.
    ///
    /// # Errors
    /// The first setting that is invalid.
    pub fn load(file: Option<&Path>) -> Result<Settings, SettingsError> {
        let mut values = match (file, fs::read(file.unwrap_or(Path::new(DEFAULT_FILE)))) {
            (_, Ok(text)) => parse_file(file.unwrap_or(Path::new(DEFAULT_FILE)), &text)?,
            (None, Err(error)) if error.kind() == io::ErrorKind::NotFound => HashMap::new(),
            (_, Err(source)) => {
                return Err(SettingsError::File {
                    path: file.unwrap_or(Path::new(DEFAULT_FILE)).to_owned(),
                    source,
                });
            }
        };
        for key in KEYS {
            // Shells pass an unset setting as an empty variable.
            if let Some(value) = std::env::var_os(key).filter(|value| !value.is_empty()) {
                let value = value.into_string().map_err(|value| SettingsError::Value {
                    key,
                    value: value.to_string_lossy().into_owned(),
                    expected: "must be UTF-8".to_owned(),
                })?;
                values.insert(key, value);
            }
        }
        Settings::from_values(&Values(values))
    }

    fn from_values(values: &Values) -> Result<Settings, SettingsError> {
        let bind = values.parsed(
            "API_BIND",
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            "an address such as 127.0.0.1 or 0.0.0.0",
        )?;
        let storage_size = values.storage_size()?;
        let settings = Settings {
            // A requested size is also the limit, unless automatic growth is requested too.
            pool_auto_grow: values.word(
                "POOL_AUTO_GROW",
                storage_size.is_none(),
                &[("on", true), ("off", false)],
            )?,
            pool_low_water: Gib::new(values.number("POOL_LOW_WATER_GIB", 10, 0..=65536)?),
            storage_size,
            default_disk_size: Gib::new(values.number("DEFAULT_DISK_SIZE_GIB", 2, 1..=65536)?),
            max_disk_size: Gib::new(values.number("MAX_DISK_SIZE_GIB", 100, 1..=65536)?),
            storage_buffer: Gib::new(values.number("STORAGE_BUFFER_GIB", 2, 0..=65536)?),
            overcommit_ratio: values.overcommit_ratio()?,
            accounting_interval: Duration::from_secs(values.number("ACCOUNTING_SECONDS", 60, 1..=86400)?),
            data_dir: values.path("DATA_DIR", "/var/lib/scalebox")?,
            backing: values.backing()?,
            state_dir: values.path("STATE_DIR", "/var/lib/scaleboxd")?,
            run_dir: values.path("RUN_DIR", "/run/scaleboxd")?,
            fstab: values.fstab()?,
            api: SocketAddr::new(bind, values.number("API_PORT", 8080, 0..=65535)?),
            api_token: values.token()?,
            host_ip: values.host_ip()?,
            net: values.net()?,
            guest_dns: values.resolvers()?,
            vmm: values.vmm()?,
            accel: values.accel()?,
            default_vcpu_count: values.number("DEFAULT_VCPU_COUNT", 1, 1..=1024)?,
            default_mem_size_mib: values.number("DEFAULT_MEM_SIZE_MIB", 512, MIN_MEM_MIB..=1 << 24)?,
            guest_trim_interval: Duration::from_secs(
                60 * values.number("GUEST_TRIM_INTERVAL_MINUTES", 24 * 60, 0..=525_600)?,
            ),
            log_format: values.word(
                "LOG_FORMAT",
                LogFormat::Text,
                &[("text", LogFormat::Text), ("json", LogFormat::Json)],
            )?,
            log_level: values.get("LOG_LEVEL").unwrap_or("info").to_owned(),
        };
        contradictions::check(&settings)?;
        Ok(settings)
    }

    /// Returns the token, which `serve` requires.
    ///
    /// # Errors
    /// [`SettingsError::Missing`].
    pub fn token(&self) -> Result<&Token, SettingsError> {
        self.api_token.as_ref().ok_or(SettingsError::Missing {
            key: "API_TOKEN",
            expected: "it has no default; set it to a long random text, such as the output of `openssl rand -hex 32`",
        })
    }

    /// Returns the plan for `pool init`.
    pub fn pool_plan(&self) -> PoolPlan {
        PoolPlan {
            data_dir: self.data_dir.clone(),
            backing: self.backing.clone(),
            fstab: self.fstab.clone(),
            size: self.storage_size.clone(),
            expected_disks: 0,
            buffer: self.storage_buffer,
        }
    }

    /// Returns the bounds of admission.
    pub fn bounds(&self) -> Bounds {
        Bounds {
            buffer: self.storage_buffer,
            overcommit_ratio: self.overcommit_ratio,
        }
    }

    /// Returns the limits for requests, on a host with `cpus` processors and `memory_mib` of
    /// memory.
    pub fn limits(&self, cpus: u32, memory_mib: u64) -> Limits {
        Limits {
            max_disk_size_gib: self.max_disk_size.as_u64(),
            max_vcpus: cpus.max(1),
            min_mem_mib: MIN_MEM_MIB,
            max_mem_mib: memory_mib.max(MIN_MEM_MIB),
        }
    }
}

fn parse_file(path: &Path, text: &[u8]) -> Result<HashMap<&'static str, String>, SettingsError> {
    let mut values = HashMap::new();
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
        let Some(key) = KEYS.into_iter().find(|known| *known == key.trim()) else {
            return Err(problem(format!(
                "unknown setting {:?}; the settings are {}",
                key.trim(),
                KEYS.join(", ")
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
            values.insert(key, value.to_owned());
        }
    }
    Ok(values)
}

struct Values(HashMap<&'static str, String>);

impl Values {
    fn get(&self, key: &'static str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    fn wrong(&self, key: &'static str, expected: impl Into<String>) -> SettingsError {
        SettingsError::Value {
            key,
            value: self.get(key).unwrap_or_default().to_owned(),
            expected: expected.into(),
        }
    }

    fn number<T>(&self, key: &'static str, default: T, range: RangeInclusive<T>) -> Result<T, SettingsError>
    where
        T: FromStr + PartialOrd + std::fmt::Display,
    {
        let Some(text) = self.get(key) else { return Ok(default) };
        match text.parse() {
            Ok(number) if range.contains(&number) => Ok(number),
            _ => Err(self.wrong(
                key,
                format!("must be a whole number from {} to {}", range.start(), range.end()),
            )),
        }
    }

    fn optional<T: FromStr>(&self, key: &'static str, form: &str) -> Result<Option<T>, SettingsError> {
        self.get(key)
            .map(|text| text.parse().map_err(|_| self.wrong(key, format!("must be {form}"))))
            .transpose()
    }

    fn parsed<T: FromStr>(&self, key: &'static str, default: T, form: &str) -> Result<T, SettingsError> {
        Ok(self.optional(key, form)?.unwrap_or(default))
    }

    fn word<T: Copy>(&self, key: &'static str, default: T, words: &[(&str, T)]) -> Result<T, SettingsError> {
        let Some(text) = self.get(key) else { return Ok(default) };
        words
            .iter()
            .find(|(word, _)| *word == text)
            .map(|(_, value)| *value)
            .ok_or_else(|| {
                let known: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                self.wrong(key, format!("must be one of {}", known.join(", ")))
            })
    }

    fn path(&self, key: &'static str, default: &str) -> Result<PathBuf, SettingsError> {
        let path = PathBuf::from(self.get(key).unwrap_or(default));
        if path.is_absolute() {
            Ok(path)
        } else {
            Err(self.wrong(key, "must be an absolute path, starting with /"))
        }
    }

    /// Returns the backing: a device or a given file system if set, otherwise an image.
    fn backing(&self) -> Result<Backing, SettingsError> {
        if self.get("POOL_DEVICE").is_some() {
            if self.get("POOL_IMAGE").is_some() {
                return Err(self.wrong(
                    "POOL_DEVICE",
                    "must not be set together with POOL_IMAGE: a pool has one backing",
                ));
            }
            return self.path("POOL_DEVICE", "").map(Backing::Device);
        }
        match self.get("POOL_IMAGE") {
            Some("none") => Ok(Backing::Existing),
            _ => self.path("POOL_IMAGE", "/var/lib/scalebox.img").map(Backing::Image),
        }
    }

    fn fstab(&self) -> Result<Option<PathBuf>, SettingsError> {
        match self.get("FSTAB") {
            Some("none") => Ok(None),
            _ => self.path("FSTAB", "/etc/fstab").map(Some),
        }
    }

    fn vmm(&self) -> Result<VmmChoice, SettingsError> {
        self.word(
            "VMM",
            VmmChoice::Auto,
            &[
                ("auto", VmmChoice::Auto),
                ("qemu", VmmChoice::Qemu),
                ("firecracker", VmmChoice::Firecracker),
            ],
        )
    }

    fn accel(&self) -> Result<AccelChoice, SettingsError> {
        self.word(
            "ACCEL",
            AccelChoice::Auto,
            &[
                ("auto", AccelChoice::Auto),
                ("kvm", AccelChoice::Kvm),
                ("tcg", AccelChoice::Tcg),
            ],
        )
    }

    fn storage_size(&self) -> Result<Option<RequestedSize>, SettingsError> {
        let parse = |text: &str| {
            text.parse()
                .map_err(|error| self.wrong("STORAGE_SIZE", format!("{error}")))
        };
        self.get("STORAGE_SIZE").map(parse).transpose()
    }

    fn overcommit_ratio(&self) -> Result<f64, SettingsError> {
        let ratio: f64 = self.parsed("OVERCOMMIT_RATIO", 4.0, "a number such as 1 or 4")?;
        if (0.1..=1000.0).contains(&ratio) {
            Ok(ratio)
        } else {
            Err(self.wrong(
                "OVERCOMMIT_RATIO",
                "must be a number from 0.1 to 1000; with 1, every committed byte is backed",
            ))
        }
    }

    fn host_ip(&self) -> Result<Option<IpAddr>, SettingsError> {
        const FORM: &str = "an IPv4 address at which clients reach this host, such as 192.0.2.10";
        match self.optional("HOST_IP", FORM)? {
            Some(IpAddr::V6(_)) => Err(self.wrong(
                "HOST_IP",
                format!("must be {FORM}; forwards to guests are IPv4 only, so no client could reach a VM over IPv6"),
            )),
            Some(IpAddr::V4(ip)) if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() => {
                Err(self.wrong("HOST_IP", format!("must be {FORM}")))
            }
            other => Ok(other),
        }
    }

    fn token(&self) -> Result<Option<Token>, SettingsError> {
        let Some(text) = self.get("API_TOKEN") else {
            return Ok(None);
        };
        if text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Some(Token(text.to_owned())))
        } else {
            // The value is not shown: it is a secret.
            Err(SettingsError::Value {
                key: "API_TOKEN",
                value: "…".to_owned(),
                expected: "must be printable ASCII without spaces, because it is sent in an HTTP header".to_owned(),
            })
        }
    }

    fn net(&self) -> Result<NetConfig, SettingsError> {
        let subnet = self.parsed(
            "SUBNET",
            Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 16),
            "a network such as 172.16.0.0/16",
        )?;
        let ports = self.number("PORT_MIN", 22001, 1024..=65535)?..=self.number("PORT_MAX", 32000, 1024..=65535)?;
        let denied = self.denied()?;
        let net = NetConfig::new(self.get("BRIDGE").unwrap_or("scalebox0"), subnet, ports).map_err(|error| {
            let key = match &error {
                scalebox_net::Error::BridgeName(_) => "BRIDGE",
                scalebox_net::Error::Subnet { .. } => "SUBNET",
                _ => "PORT_MIN",
            };
            self.wrong(key, error.to_string())
        })?;
        Ok(net.with_denied(&denied))
    }

    fn denied(&self) -> Result<Vec<Ipv4Net>, SettingsError> {
        const KEY: &str = "GUEST_DENY";
        match self.get(KEY).unwrap_or("private").trim() {
            "private" => Ok(PRIVATE_NETWORKS.to_vec()),
            "none" => Ok(Vec::new()),
            text => text
                .split(',')
                .map(|part| {
                    let expected = "must be private, none, or networks such as 10.0.0.0/8, separated by commas";
                    part.trim().parse().map_err(|_| self.wrong(KEY, expected))
                })
                .collect(),
        }
    }

    fn resolvers(&self) -> Result<Vec<Ipv4Addr>, SettingsError> {
        const KEY: &str = "GUEST_DNS";
        let text = self.get(KEY).unwrap_or_default();
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let resolver = |part: &str| {
            let address = part
                .parse()
                .map_err(|_| "must be IPv4 addresses, separated by commas".to_owned())?;
            match unusable_resolver(address) {
                Some(why) => Err(format!("guests cannot use {address} as a resolver: {why}")),
                None => Ok(address),
            }
        };
        parts
            .map(|part| resolver(part).map_err(|expected| self.wrong(KEY, expected)))
            .collect()
    }
}

#[cfg(test)]
impl Settings {
    /// Parses these settings, over defaults.
    pub fn of(pairs: &[(&'static str, &str)]) -> Result<Settings, SettingsError> {
        let values = pairs.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        Settings::from_values(&Values(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            ("GUEST_DNS", "192.0.2.53, 0.0.0.0", "not the address of a machine"),
            ("GUEST_DNS", "224.0.0.251", "a multicast address"),
            ("GUEST_DNS", "255.255.255.255", "reserved"),
            ("GUEST_DENY", "10.0.0.0/8,lan", "private, none, or networks"),
            ("VMM", "xen", "one of auto, qemu"),
            ("ACCEL", "hvf", "one of auto, kvm, tcg"),
            ("GUEST_TRIM_INTERVAL_MINUTES", "daily", "from 0 to"),
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
        let values = parse_file(path, b"# f\xfcr\n\nAPI_TOKEN=\"abc\"\nAPI_PORT = 9090\r\nHOST_IP=\n").unwrap();
        assert_eq!(
            (values["API_TOKEN"].as_str(), values["API_PORT"].as_str(), values.len()),
            ("abc", "9090", 2)
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
