//! The settings, parsed from their values as text.

use crate::settings::error::SettingsError;
use crate::settings::given::Given;
use crate::settings::table::{self, MIN_MEM_MIB, SECRET};
use ipnet::Ipv4Net;
use scalebox_api::Limits;
use scalebox_images::oci::{InvalidMirror, Mirror};
use scalebox_net::{NetConfig, PRIVATE_NETWORKS, unusable_resolver};
use scalebox_storage::{Backing, Bounds, PoolPlan, RequestedSize};
use scalebox_units::Gib;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// All settings, in the order of the table.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// `STORAGE_SIZE`: the size of a new pool; 80 % of the free space if not set.
    pub storage_size: Option<RequestedSize>,
    /// `POOL_AUTO_GROW`: `true` if the pool grows automatically; if not set, `true` unless
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
    /// `REGISTRY_MIRRORS`: the mirrors of registries, in the order in which they are tried.
    pub registry_mirrors: Vec<Mirror>,
    /// `LOG_FORMAT`.
    pub log_format: LogFormat,
    /// `LOG_LEVEL`: a level, or a filter by module as the crate `tracing-subscriber` parses it.
    pub log_level: String,
}

/// The bearer token. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(String);

impl Token {
    /// Returns the secret itself.
    pub(crate) fn secret(&self) -> &str {
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
pub(crate) enum VmmChoice {
    /// The best one available on this host.
    Auto,
    /// QEMU's `microvm` machine.
    Qemu,
    /// Firecracker, which needs KVM.
    Firecracker,
}

/// `ACCEL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AccelChoice {
    /// KVM if it works on this host, otherwise emulation.
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

/// `LOG_FORMAT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// Text for people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Settings {
    /// Parses all settings. [`Settings::load`] checks in addition that they fit together.
    ///
    /// # Errors
    /// The first setting that is invalid.
    pub(crate) fn parse(given: &Given) -> Result<Settings, SettingsError> {
        let api = SocketAddr::new(required(given, "API_BIND")?, given.number("API_PORT")?);
        let storage_size = storage_size(given)?;
        let trim_minutes: u64 = given.number("GUEST_TRIM_INTERVAL_MINUTES")?;
        Ok(Settings {
            // A requested size is also the limit, unless automatic growth is requested too.
            pool_auto_grow: match given.get("POOL_AUTO_GROW") {
                None => storage_size.is_none(),
                Some(_) => given.word("POOL_AUTO_GROW")? == "on",
            },
            pool_low_water: Gib::new(given.number("POOL_LOW_WATER_GIB")?),
            storage_size,
            default_disk_size: Gib::new(given.number("DEFAULT_DISK_SIZE_GIB")?),
            max_disk_size: Gib::new(given.number("MAX_DISK_SIZE_GIB")?),
            storage_buffer: Gib::new(given.number("STORAGE_BUFFER_GIB")?),
            overcommit_ratio: overcommit_ratio(given)?,
            accounting_interval: Duration::from_secs(given.number("ACCOUNTING_SECONDS")?),
            data_dir: given.path("DATA_DIR")?,
            backing: backing(given)?,
            state_dir: given.path("STATE_DIR")?,
            run_dir: given.path("RUN_DIR")?,
            fstab: path_or_none(given, "FSTAB")?,
            api,
            api_token: token(given)?,
            host_ip: host_ip(given)?,
            net: net(given)?,
            guest_dns: resolvers(given)?,
            vmm: match given.word("VMM")? {
                "qemu" => VmmChoice::Qemu,
                "firecracker" => VmmChoice::Firecracker,
                _ => VmmChoice::Auto,
            },
            accel: match given.word("ACCEL")? {
                "kvm" => AccelChoice::Kvm,
                "tcg" => AccelChoice::Tcg,
                _ => AccelChoice::Auto,
            },
            default_vcpu_count: given.number("DEFAULT_VCPU_COUNT")?,
            default_mem_size_mib: given.number("DEFAULT_MEM_SIZE_MIB")?,
            guest_trim_interval: Duration::from_secs(60 * trim_minutes),
            registry_mirrors: mirrors(given)?,
            log_format: match given.word("LOG_FORMAT")? {
                "json" => LogFormat::Json,
                _ => LogFormat::Text,
            },
            log_level: required(given, "LOG_LEVEL")?,
        })
    }

    /// Returns the token, which `serve` requires.
    ///
    /// # Errors
    /// [`SettingsError::Missing`].
    pub(crate) fn token(&self) -> Result<&Token, SettingsError> {
        self.api_token.as_ref().ok_or(SettingsError::Missing {
            key: "API_TOKEN",
            expected: "it has no default; set it to a long random text, such as the output of `openssl rand -hex 32`",
        })
    }

    /// Returns the plan for `pool init`.
    pub(crate) fn pool_plan(&self) -> PoolPlan {
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
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            buffer: self.storage_buffer,
            overcommit_ratio: self.overcommit_ratio,
        }
    }

    /// Returns the limits for requests, on a host with `cpus` processors and `memory_mib` of
    /// memory.
    pub(crate) fn limits(&self, cpus: u32, memory_mib: u64) -> Limits {
        Limits {
            max_disk_size_gib: self.max_disk_size.as_u64(),
            max_vcpus: cpus.max(1),
            min_mem_mib: MIN_MEM_MIB,
            max_mem_mib: memory_mib.max(MIN_MEM_MIB),
        }
    }
}

/// Parses a value that is set or has a default.
fn required<T: FromStr>(given: &Given, key: &'static str) -> Result<T, SettingsError> {
    given.parsed(key)?.ok_or_else(|| given.malformed(key))
}

/// Parses a path; the word `none` stands for no path.
fn path_or_none(given: &Given, key: &'static str) -> Result<Option<PathBuf>, SettingsError> {
    match given.get(key) {
        Some("none") => Ok(None),
        _ => given.path(key).map(Some),
    }
}

/// Returns the backing: a device or a given file system if set, otherwise an image.
fn backing(given: &Given) -> Result<Backing, SettingsError> {
    if given.get("POOL_DEVICE").is_none() {
        let image = path_or_none(given, "POOL_IMAGE")?;
        return Ok(image.map_or(Backing::Existing, Backing::Image));
    }
    if given.get("POOL_IMAGE").is_some() {
        return Err(given.wrong(
            "POOL_DEVICE",
            "must not be set together with POOL_IMAGE: a pool has one backing",
        ));
    }
    given.path("POOL_DEVICE").map(Backing::Device)
}

fn storage_size(given: &Given) -> Result<Option<RequestedSize>, SettingsError> {
    let parse = |text: &str| {
        text.parse()
            .map_err(|error| given.wrong("STORAGE_SIZE", format!("{error}")))
    };
    given.get("STORAGE_SIZE").map(parse).transpose()
}

fn overcommit_ratio(given: &Given) -> Result<f64, SettingsError> {
    let ratio: f64 = required(given, "OVERCOMMIT_RATIO")?;
    if (0.1..=1000.0).contains(&ratio) {
        Ok(ratio)
    } else {
        Err(given.wrong(
            "OVERCOMMIT_RATIO",
            "must be a number from 0.1 to 1000; with 1, every committed byte is backed",
        ))
    }
}

fn host_ip(given: &Given) -> Result<Option<IpAddr>, SettingsError> {
    match given.parsed("HOST_IP")? {
        Some(IpAddr::V6(_)) => {
            let form = table::requirement("HOST_IP");
            let expected = format!("{form}; forwards to guests are IPv4 only, so no client could reach a VM over IPv6");
            Err(given.wrong("HOST_IP", expected))
        }
        Some(IpAddr::V4(ip)) if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() => {
            Err(given.malformed("HOST_IP"))
        }
        other => Ok(other),
    }
}

fn token(given: &Given) -> Result<Option<Token>, SettingsError> {
    let Some(text) = given.get(SECRET) else {
        return Ok(None);
    };
    if text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(Some(Token(text.to_owned())))
    } else {
        Err(given.malformed(SECRET))
    }
}

fn net(given: &Given) -> Result<NetConfig, SettingsError> {
    let subnet: Ipv4Net = required(given, "SUBNET")?;
    let ports = given.number("PORT_MIN")?..=given.number("PORT_MAX")?;
    let denied = denied(given)?;
    let bridge: String = required(given, "BRIDGE")?;
    let net = NetConfig::new(&bridge, subnet, ports).map_err(|error| {
        let key = match &error {
            scalebox_net::Error::BridgeName(_) => "BRIDGE",
            scalebox_net::Error::Subnet { .. } => "SUBNET",
            _ => "PORT_MIN",
        };
        given.wrong(key, error.to_string())
    })?;
    Ok(net.with_denied(&denied))
}

fn denied(given: &Given) -> Result<Vec<Ipv4Net>, SettingsError> {
    const KEY: &str = "GUEST_DENY";
    match given.get_or_default(KEY).unwrap_or_default().trim() {
        "private" => Ok(PRIVATE_NETWORKS.to_vec()),
        "none" => Ok(Vec::new()),
        text => text
            .split(',')
            .map(|part| part.trim().parse().map_err(|_| given.malformed(KEY)))
            .collect(),
    }
}

fn resolvers(given: &Given) -> Result<Vec<Ipv4Addr>, SettingsError> {
    const KEY: &str = "GUEST_DNS";
    let text = given.get(KEY).unwrap_or_default();
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let resolver = |part: &str| {
        let address = part.parse().map_err(|_| given.malformed(KEY))?;
        match unusable_resolver(address) {
            Some(why) => Err(given.wrong(KEY, format!("guests cannot use {address} as a resolver: {why}"))),
            None => Ok(address),
        }
    };
    parts.map(resolver).collect()
}

fn mirrors(given: &Given) -> Result<Vec<Mirror>, SettingsError> {
    const KEY: &str = "REGISTRY_MIRRORS";
    let mirror = |part: &str| {
        part.parse().map_err(|error: InvalidMirror| {
            given.wrong(
                KEY,
                format!("{}: {part} cannot be used: {error}", table::requirement(KEY)),
            )
        })
    };
    let text = given.get(KEY).unwrap_or_default();
    text.split_whitespace().map(mirror).collect()
}
