//! The settings, parsed from their values as text.

use ipnet::Ipv4Net;
use scalebox_api::Limits;
use scalebox_net::{NetConfig, PRIVATE_NETWORKS, unusable_resolver};
use scalebox_storage::{Backing, Bounds, Gib, PoolPlan, RequestedSize};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

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

pub const KEYS: [&str; 31] = [
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
    /// Parses all settings. [`Settings::load`] checks in addition that they fit together.
    ///
    /// # Errors
    /// The first setting that is invalid.
    pub fn from_values(values: &Values) -> Result<Settings, SettingsError> {
        let bind = values.parsed(
            "API_BIND",
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            "an address such as 127.0.0.1 or 0.0.0.0",
        )?;
        let storage_size = values.storage_size()?;
        Ok(Settings {
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
        })
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

pub struct Values(pub HashMap<&'static str, String>);

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
