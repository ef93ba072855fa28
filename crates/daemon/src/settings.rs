//! Settings: from the environment, over a file of `KEY=VALUE` lines, over defaults.
//!
//! A setting that does not parse stops the daemon with its name, its value and what would be right;
//! so does a key in the file that no setting has, because a misspelt setting that is quietly
//! ignored is a default in disguise.

use crate::contradictions;
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

/// Where the file is looked for when `--config` does not name one.
pub const DEFAULT_FILE: &str = "/etc/scaleboxd/config";

/// The least memory, in MiB, with which the Debian guest boots to a login.
const MIN_MEM_MIB: u64 = 128;

/// Every setting, as the table in the README lists them.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `STORAGE_SIZE`: the size of a new pool; 80 % of what is free when not set.
    pub storage_size: Option<RequestedSize>,
    /// `POOL_AUTO_GROW`: whether the pool grows by itself; when not set, a pool does whose size was
    /// not asked for.
    pub pool_auto_grow: bool,
    /// `POOL_LOW_WATER_GIB`: with less than this free, it does.
    pub pool_low_water: Gib,
    /// `DEFAULT_DISK_SIZE_GIB`: the disk of a VM that names none.
    pub default_disk_size: Gib,
    /// `MAX_DISK_SIZE_GIB`: the largest disk.
    pub max_disk_size: Gib,
    /// `STORAGE_BUFFER_GIB`: always left free.
    pub storage_buffer: Gib,
    /// `OVERCOMMIT_RATIO`: how many times the pool may be promised.
    pub overcommit_ratio: f64,
    /// `ACCOUNTING_SECONDS`: how often it is measured whose the pool's blocks are, in seconds.
    pub accounting_interval: Duration,
    /// `DATA_DIR`: the pool's mount point.
    pub data_dir: PathBuf,
    /// `POOL_IMAGE` and `POOL_DEVICE`: what the pool lies on.
    pub backing: Backing,
    /// `STATE_DIR`: the state, outside the pool.
    pub state_dir: PathBuf,
    /// `RUN_DIR`: sockets and seed drives of running machines.
    pub run_dir: PathBuf,
    /// `FSTAB`: the table the pool's mount is registered in; `None` to register it nowhere.
    pub fstab: Option<PathBuf>,
    /// `API_BIND` and `API_PORT`.
    pub api: SocketAddr,
    /// `API_TOKEN`; only `serve` needs it.
    pub api_token: Option<Token>,
    /// `HOST_IP`: shown to clients; the default route's address when not set.
    pub host_ip: Option<IpAddr>,
    /// `BRIDGE`, `SUBNET`, `PORT_MIN`, `PORT_MAX` and `GUEST_DENY`: the guests' network, their SSH
    /// forwards and what they do not reach.
    pub net: NetConfig,
    /// `GUEST_DNS`: the resolvers guests use; the host's own when not set.
    pub guest_dns: Vec<Ipv4Addr>,
    /// `VMM`: the hypervisor driver.
    pub vmm: VmmChoice,
    /// `ACCEL`: how guests' code runs.
    pub accel: AccelChoice,
    /// `DEFAULT_VCPU_COUNT`.
    pub default_vcpu_count: u32,
    /// `DEFAULT_MEM_SIZE_MIB`.
    pub default_mem_size_mib: u64,
    /// `GUEST_TRIM_INTERVAL_MINUTES`: how often each guest gives back what it deleted; zero for
    /// never.
    pub guest_trim_interval: Duration,
    /// `LOG_FORMAT`.
    pub log_format: LogFormat,
    /// `LOG_LEVEL`: a level, or a filter by module as crate `tracing-subscriber` reads it.
    pub log_level: String,
}

/// The bearer token. Its `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The secret itself.
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
    /// The best there is on this host.
    Auto,
    /// QEMU's `microvm` machine.
    Qemu,
    /// Firecracker, which needs KVM.
    Firecracker,
}

/// `ACCEL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccelChoice {
    /// KVM where it can run guests, else emulation.
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

/// `LOG_FORMAT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for eyes.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A value is not of its setting's form.
    #[error("{key}={value:?} cannot be used: {right}")]
    Value {
        /// The setting.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// What would be right.
        right: String,
    },
    /// A setting without which nothing goes.
    #[error("{key} is not set: {right}")]
    Missing {
        /// The setting.
        key: &'static str,
        /// What would be right.
        right: &'static str,
    },
    /// The file could not be read.
    #[error("cannot read the settings in {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of the file is not `KEY=VALUE`, or names no setting.
    #[error("{} line {number}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        number: usize,
        /// What is wrong with it.
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
    /// Reads the file (the default one may be absent) and the environment.
    ///
    /// # Errors
    /// The first setting that cannot be used.
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
            // An empty variable is how a shell passes "not set".
            if let Some(value) = std::env::var_os(key).filter(|value| !value.is_empty()) {
                let value = value.into_string().map_err(|value| SettingsError::Value {
                    key,
                    value: value.to_string_lossy().into_owned(),
                    right: "write it in UTF-8".to_owned(),
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
            // A size that was asked for is a wish not to take more.
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

    /// The token; `serve` does not run without one.
    ///
    /// # Errors
    /// [`SettingsError::Missing`].
    pub fn token(&self) -> Result<&Token, SettingsError> {
        self.api_token.as_ref().ok_or(SettingsError::Missing {
            key: "API_TOKEN",
            right: "there is no default; set it to a long random text, such as what `openssl rand -hex 32` prints",
        })
    }

    /// What `pool init` is to make.
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

    /// What admission is held to.
    pub fn bounds(&self) -> Bounds {
        Bounds {
            buffer: self.storage_buffer,
            overcommit_ratio: self.overcommit_ratio,
        }
    }

    /// What a request may ask for, on a host with `cpus` processors and `memory_mib` of memory.
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
        // A comment may be in any encoding.
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let problem = |problem| SettingsError::Line {
            path: path.to_owned(),
            number,
            problem,
        };
        let line = str::from_utf8(line).map_err(|_| problem("it is not UTF-8".to_owned()))?;
        let Some((key, value)) = line.split_once('=') else {
            // The line stays out of the message: it may hold the token.
            return Err(problem("it is not of the form KEY=VALUE".to_owned()));
        };
        let Some(key) = KEYS.into_iter().find(|known| *known == key.trim()) else {
            return Err(problem(format!(
                "there is no setting {:?}; the settings are {}",
                key.trim(),
                KEYS.join(", ")
            )));
        };
        if let Some(first) = set_in_line.insert(key, number) {
            return Err(problem(format!(
                "{key} is set in line {first} already: remove one of the two lines"
            )));
        }
        let value = value.trim();
        // systemd's EnvironmentFile= takes quotes off; the same file serves both.
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

    fn wrong(&self, key: &'static str, right: impl Into<String>) -> SettingsError {
        SettingsError::Value {
            key,
            value: self.get(key).unwrap_or_default().to_owned(),
            right: right.into(),
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
                format!("it must be a whole number from {} to {}", range.start(), range.end()),
            )),
        }
    }

    fn optional<T: FromStr>(&self, key: &'static str, form: &str) -> Result<Option<T>, SettingsError> {
        self.get(key)
            .map(|text| text.parse().map_err(|_| self.wrong(key, format!("it must be {form}"))))
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
                self.wrong(key, format!("it must be one of {}", known.join(", ")))
            })
    }

    fn path(&self, key: &'static str, default: &str) -> Result<PathBuf, SettingsError> {
        let path = PathBuf::from(self.get(key).unwrap_or(default));
        if path.is_absolute() {
            Ok(path)
        } else {
            Err(self.wrong(key, "it must be an absolute path, beginning with /"))
        }
    }

    /// An image unless a device is named, or neither is wanted.
    fn backing(&self) -> Result<Backing, SettingsError> {
        if self.get("POOL_DEVICE").is_some() {
            if self.get("POOL_IMAGE").is_some() {
                return Err(self.wrong(
                    "POOL_DEVICE",
                    "it cannot be set together with POOL_IMAGE: a pool lies on one of them",
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
                "it must be a number from 0.1 to 1000; 1 backs every promised byte",
            ))
        }
    }

    fn host_ip(&self) -> Result<Option<IpAddr>, SettingsError> {
        const FORM: &str = "an IPv4 address that clients reach this host at, such as 192.0.2.10";
        match self.optional("HOST_IP", FORM)? {
            Some(IpAddr::V6(_)) => Err(self.wrong(
                "HOST_IP",
                format!("the forwards to guests are IPv4 only, so no client would reach a VM there; it must be {FORM}"),
            )),
            Some(IpAddr::V4(ip)) if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() => {
                Err(self.wrong("HOST_IP", format!("it must be {FORM}")))
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
            // The value stays out of the message: it is a secret.
            Err(SettingsError::Value {
                key: "API_TOKEN",
                value: "…".to_owned(),
                right: "it must be printable ASCII without spaces, as it travels in an HTTP header".to_owned(),
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
                    let right = "it must be private, none, or networks such as 10.0.0.0/8, separated by commas";
                    part.trim().parse().map_err(|_| self.wrong(KEY, right))
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
                .map_err(|_| "it must be IPv4 addresses, separated by commas".to_owned())?;
            match unusable_resolver(address) {
                Some(why) => Err(format!("{address} cannot be the resolver of a guest: {why}")),
                None => Ok(address),
            }
        };
        parts
            .map(|part| resolver(part).map_err(|right| self.wrong(KEY, right)))
            .collect()
    }
}

#[cfg(test)]
impl Settings {
    /// What these settings make, beside defaults.
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
    fn the_defaults_are_those_of_the_table() {
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
        assert!(settings.token().is_err(), "there is no default token");
    }

    #[test]
    fn a_pool_lies_on_an_image_a_device_or_what_is_there() {
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
    fn a_pool_whose_size_was_asked_for_grows_by_itself_only_when_told_to() {
        let grows = |pairs: &[(&'static str, &str)]| settings(pairs).unwrap().pool_auto_grow;
        assert!(grows(&[]));
        assert!(!grows(&[("STORAGE_SIZE", "100G")]));
        assert!(grows(&[("STORAGE_SIZE", "100G"), ("POOL_AUTO_GROW", "on")]));
        assert!(!grows(&[("POOL_AUTO_GROW", "off")]));
    }

    #[test]
    fn a_setting_that_does_not_parse_is_named_with_its_value_and_what_would_be_right() {
        for (key, value, right) in [
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
            ("HOST_IP", "2001:db8::1", "IPv4 only, so no client would reach a VM"),
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
            assert!(error.starts_with(key) && error.contains(right), "{error}");
            assert_eq!(error.contains(value), key != "API_TOKEN", "{error}");
        }
    }

    #[test]
    fn a_file_is_read_line_by_line_and_a_misspelt_key_is_an_error() {
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
    fn a_key_that_is_set_twice_and_a_line_that_is_not_utf_8_are_named() {
        let path = Path::new("/etc/scaleboxd/config");
        let error = parse_file(path, b"API_PORT=1\n# comment\nAPI_PORT=2\n")
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "/etc/scaleboxd/config line 3: API_PORT is set in line 1 already: remove one of the two lines"
        );
        let error = parse_file(path, b"API_PORT=1\nDATA_DIR=/f\xfcr\n")
            .unwrap_err()
            .to_string();
        assert_eq!(error, "/etc/scaleboxd/config line 2: it is not UTF-8");
    }

    #[test]
    fn the_table_of_mounts_can_be_declined() {
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
