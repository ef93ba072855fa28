//! `scaleboxd doctor`: reports problems on this host, with a fix for each.
//!
//! It changes nothing and takes no lock, so that it works before anything is set up and while the
//! daemon runs.

use crate::commands::failed::CommandFailed;
use crate::commands::{log, open};
use crate::host::BASE_TEMPLATE;
use crate::host::advice::advice;
use crate::host::drivers::Drivers;
use crate::settings::{Settings, VmmChoice, contradictions};
use crate::state::{Fact, State};
use scalebox_net::Inspection;
use scalebox_storage::{Backing, PROGRAMS, Pool, StorageError, pool_size, registered_source};
use scalebox_units::Bytes;
use scalebox_vmm::{Accel, AccelSetting};
use serde::Serialize;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use tokio::net::TcpSocket;

/// 2024-01-01 in seconds since the epoch. A clock before this date has never been set.
const MIN_CLOCK: i64 = 1_704_067_200;

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// A part of the host works, but can be improved.
    Note,
    /// A part of the host does not work until it is fixed.
    Problem,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    finding: String,
    /// The remedy; `None` if there is no problem.
    fix: Option<String>,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, check: &'static str, level: Level, finding: impl ToString, fix: Option<String>) {
        let finding = finding.to_string();
        self.0.push(Finding {
            check,
            level,
            finding,
            fix,
        });
    }

    fn ok(&mut self, check: &'static str, finding: impl ToString) {
        self.add(check, Level::Ok, finding, None);
    }

    fn note(&mut self, check: &'static str, finding: impl ToString, fix: impl Into<String>) {
        self.add(check, Level::Note, finding, Some(fix.into()));
    }

    fn problem(&mut self, check: &'static str, finding: impl ToString, fix: impl Into<String>) {
        self.add(check, Level::Problem, finding, Some(fix.into()));
    }

    /// Adds an error as a problem. `fix` is for errors without advice of their own.
    fn failed(&mut self, check: &'static str, error: &(dyn Error + 'static), fix: &str) {
        self.problem(check, error, advice(error).unwrap_or_else(|| fix.to_owned()));
    }

    fn count(&self, level: Level) -> usize {
        self.0.iter().filter(|finding| finding.level == level).count()
    }
}

/// Runs all checks and prints the findings. Exits with 1 if there is a problem.
///
/// # Errors
/// Only if the checks cannot run or the findings cannot be printed. A finding is not an error.
pub(crate) fn run(config: Option<&Path>, json: bool) -> Result<ExitCode, CommandFailed> {
    let mut found = Findings::default();
    privileges(&mut found);
    programs(&mut found);
    kernel(&mut found);
    clock(&mut found);
    match Settings::load(config) {
        Ok(settings) => {
            setting_values(&mut found, &settings);
            hypervisor(&mut found, &settings);
            storage(&mut found, &settings);
            let runtime = open::runtime()?;
            runtime.block_on(network(&mut found, &settings));
            api_port(&mut found, &settings);
        }
        Err(error) => found.problem(
            "settings",
            error,
            "correct the setting; pool, network and ports are checked once all settings are valid",
        ),
    }
    let text = if json {
        serde_json::to_string_pretty(&found.0)
            .map_err(io::Error::from)
            .map(|text| text + "\n")
    } else {
        Ok(table(&found))
    };
    text.and_then(|text| io::stdout().lock().write_all(text.as_bytes()))
        .map_err(|source| CommandFailed::Io {
            doing: "write the findings",
            source,
        })?;
    Ok(ExitCode::from(u8::from(found.count(Level::Problem) > 0)))
}

fn table(found: &Findings) -> String {
    let mut text = String::new();
    for Finding {
        check,
        level,
        finding,
        fix,
    } in &found.0
    {
        let level = match level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Problem => "PROBLEM",
        };
        // Writing to a String does not fail.
        let _infallible = writeln!(text, "{level:<8} {check:<12} {finding}");
        if let Some(fix) = fix {
            let _infallible = writeln!(text, "{:<21} -> {fix}", "");
        }
    }
    let _infallible = match (found.count(Level::Problem), found.count(Level::Note)) {
        (0, 0) => writeln!(text, "\nNo problems found."),
        (problems, notes) => writeln!(text, "\nProblems: {problems}. Notes: {notes}."),
    };
    text
}

fn privileges(found: &mut Findings) {
    if rustix::process::geteuid().is_root() {
        found.ok("root", "running as root");
    } else {
        found.problem(
            "root",
            "not running as root: the other checks are unreliable, and the daemon does not work",
            "run scaleboxd with sudo",
        );
    }
}

fn programs(found: &mut Findings) {
    let missing: Vec<_> = PROGRAMS.into_iter().filter(|program| !program.is_installed()).collect();
    for program in &missing {
        let finding = format!("the program {} is missing", program.name());
        found.problem("programs", finding, format!("apt-get install {}", program.package()));
    }
    if missing.is_empty() {
        found.ok(
            "programs",
            "the programs of btrfs-progs, e2fsprogs, util-linux and mount are installed",
        );
    }
}

/// Checks which modules the kernel has built in, has loaded or can load.
fn kernel(found: &mut Findings) {
    let filesystems = read_lossy(Path::new("/proc/filesystems"));
    let btrfs = filesystems.split_whitespace().any(|name| name == "btrfs");
    let mut all = true;
    for (module, there) in [
        ("btrfs", btrfs),
        ("loop", Path::new("/dev/loop-control").exists()),
        ("tun", Path::new("/dev/net/tun").exists()),
        ("bridge", Path::new("/sys/module/bridge").exists()),
    ] {
        if !there && !is_loadable(module) {
            all = false;
            let finding = format!("this kernel has no {module}, neither built in nor as a module");
            let fix = format!("modprobe {module}; if that fails, install the distribution's standard kernel");
            found.problem("kernel", finding, fix);
        }
    }
    if all {
        found.ok("kernel", "btrfs, loop, tun and bridge are available");
    }
    let unconfined = scalebox_vmm::missing_confinement();
    if unconfined.is_empty() {
        found.ok("confinement", "control groups and Landlock are available");
    }
    for lack in unconfined {
        found.note(
            "confinement",
            lack,
            "boot the distribution's standard kernel with cgroup v2",
        );
    }
}

/// Returns whether the running kernel has a module of that name, built in or as a file.
fn is_loadable(module: &str) -> bool {
    let uname = rustix::system::uname();
    let folder = Path::new("/lib/modules").join(uname.release().to_string_lossy().as_ref());
    let file = format!("/{module}.ko");
    ["modules.dep", "modules.builtin"].into_iter().any(|list| {
        let list = read_lossy(&folder.join(list));
        list.lines()
            .filter_map(|line| line.split(':').next())
            // Modules may be compressed: `bridge.ko.xz`.
            .any(|path| {
                path.rsplit_once(&file)
                    .is_some_and(|(_, rest)| rest.is_empty() || rest.starts_with('.'))
            })
    })
}

/// Reads a system file; empty if it is missing. Bytes that are not UTF-8 are replaced.
fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn clock(found: &mut Findings) {
    let now = jiff::Timestamp::now();
    let synchronised = Path::new("/run/systemd/timesync/synchronized").exists();
    if now.as_second() < MIN_CLOCK {
        let finding = format!("the clock shows {now}: certificates and packages will be rejected");
        found.problem(
            "clock",
            finding,
            "timedatectl set-ntp true, or set the clock with date -s",
        );
    } else if synchronised {
        found.ok("clock", "the clock is set and synchronised");
    } else {
        found.ok("clock", "the clock is set; whether it is synchronised is unknown");
    }
}

fn setting_values(found: &mut Findings, settings: &Settings) {
    match log::filter(settings) {
        Ok(_) => found.ok("settings", "all settings are valid"),
        Err(error) => found.problem("settings", error, "correct LOG_LEVEL"),
    }
    for caveat in contradictions::caveats(settings) {
        found.note("settings", caveat.finding, caveat.fix);
    }
    match settings.token() {
        Ok(_) => found.ok("token", "API_TOKEN is set"),
        Err(error) => found.problem(
            "token",
            error,
            "add a line API_TOKEN=… to /etc/scaleboxd/config, readable only by root (mode 0600)",
        ),
    }
}

fn hypervisor(found: &mut Findings, settings: &Settings) {
    match Drivers::find(settings) {
        Ok((drivers, accel)) => {
            let name = drivers.for_new().name();
            found.ok("hypervisor", format!("{name} is available; guests run with {accel}"));
            other_drivers(found, settings, name);
        }
        Err(error) => found.failed(
            "hypervisor",
            &error,
            "install the program or change the setting that the error names",
        ),
    }
    match scalebox_vmm::accelerator(AccelSetting::Auto) {
        Ok(choice) if choice.accel == Accel::Kvm => found.ok("kvm", choice.reason),
        Ok(choice) => found.note(
            "kvm",
            format!(
                "KVM is not available ({}): guests are emulated, which is about ten times slower",
                choice.reason
            ),
            "enable virtualisation in the firmware, or nested virtualisation if this is a virtual machine, and modprobe kvm",
        ),
        Err(error) => found.note("kvm", error, "set ACCEL=auto"),
    }
}

/// Reports VMs that were launched by another hypervisor than the one for new VMs.
fn other_drivers(found: &mut Findings, settings: &Settings, for_new: &str) {
    // A state that cannot be read is reported by another check.
    let counts = State::peek_drivers(&settings.state_dir).unwrap_or_default();
    for (driver, vms) in counts.iter().filter(|(driver, _)| driver != for_new) {
        let finding = format!("{vms} VMs use {driver}, new VMs use {for_new}");
        let fix = match settings.vmm {
            VmmChoice::Auto => {
                format!(
                    "no action needed: these VMs keep {driver}; with VMM={for_new}, they use {for_new} from their next start"
                )
            }
            _ => format!(
                "set VMM={driver} or VMM=auto if these VMs must keep {driver}; otherwise they use {for_new} from their next start"
            ),
        };
        found.note("hypervisor", finding, fix);
    }
}

fn storage(found: &mut Findings, settings: &Settings) {
    let at = settings.data_dir.display();
    let pool = match Pool::open(&settings.data_dir, &settings.backing, settings.bounds()) {
        Ok(pool) => pool,
        Err(StorageError::NotMounted(_)) => return not_mounted(found, settings),
        Err(error) => return found.failed("pool", &error, "set DATA_DIR to the mount point of the pool"),
    };
    found.ok(
        "pool",
        format!("mounted at {at}, on {}, which supports reflinks", pool.file_system()),
    );
    if pool.direct_io() == Some(false) {
        found.note(
            "pool",
            "the pool's loop device does not use direct I/O, so guests' writes are cached twice",
            "scaleboxd pool init enables it, if the host's file system supports it",
        );
    }
    owner(found, settings, &pool);
    space(found, settings, &pool);
    template_and_kernel(found, &pool);
}

fn template_and_kernel(found: &mut Findings, pool: &Pool) {
    if !pool.is_upgraded() {
        let finding = "the pool was made by an earlier release: its templates have no records yet";
        return found.note("template", finding, "restart scaleboxd, which upgrades the pool");
    }
    let kernel_there = pool.newest_kernel().is_ok_and(|kernel| kernel.is_some());
    let template_there = BASE_TEMPLATE.parse().is_ok_and(|name| pool.template(&name).is_ok());
    if kernel_there && template_there {
        found.ok(
            "template",
            format!("{BASE_TEMPLATE} and the guest kernel are installed"),
        );
    } else {
        let finding =
            format!("the template {BASE_TEMPLATE} or the guest kernel is missing: VMs cannot boot without the kernel");
        found.note("template", finding, format!("scaleboxd template build {BASE_TEMPLATE}"));
    }
}

/// Reports a pool that is not mounted. The fix depends on whether VMs are in it: a new pool would
/// be empty.
fn not_mounted(found: &mut Findings, settings: &Settings) {
    let at = settings.data_dir.display();
    let registered = settings
        .fstab
        .as_ref()
        .and_then(|table| Some((table, registered_source(table, &settings.data_dir).ok()??)));
    let mount = registered.map(|(table, source)| format!(" ({} mounts {source} there)", table.display()));
    let mount = mount.unwrap_or_default();
    let (pool, is_there) = match &settings.backing {
        Backing::Image(image) => (format!("the pool {}", image.display()), image.exists()),
        Backing::Device(device) => (format!("the pool on {}", device.display()), device.exists()),
        Backing::Existing => ("the pool".to_owned(), false),
    };
    let vms = State::peek_vms(&settings.state_dir).unwrap_or(0);
    if vms > 0 {
        let finding =
            format!("{pool} is not mounted at {at}{mount}, but the state has {vms} VMs whose disks are in it");
        let fix = if is_there {
            format!("mount {at}, and read the error; journalctl -b shows why it was not mounted at boot")
        } else {
            format!("restore the disk under the pool, then mount {at}; do not create a new pool, which would be empty")
        };
        return found.problem("pool", finding, fix);
    }
    match &settings.backing {
        Backing::Image(_) if is_there => {
            let finding = format!("{pool} is not mounted at {at}{mount}");
            found.problem("pool", finding, "scaleboxd pool init (keeps its content)");
        }
        Backing::Image(image) => {
            found.problem("pool", format!("no pool at {at}"), "scaleboxd pool init");
            space_for_a_pool(found, settings, image);
        }
        Backing::Device(_) => {
            let finding = format!("{pool} is not mounted at {at}{mount}");
            found.problem("pool", finding, "scaleboxd pool init (keeps an existing pool)");
        }
        Backing::Existing => found.problem("pool", format!("no pool at {at}"), "scaleboxd pool init"),
    }
}

/// Checks that the pool's disks are in the state. The daemon rejects any other pool.
fn owner(found: &mut Findings, settings: &Settings, pool: &Pool) {
    let state_dir = settings.state_dir.display();
    let fix = || "set STATE_DIR and DATA_DIR to a pair that belongs together".to_owned();
    let (on_pool, in_state) = match (pool.owner(), State::peek(&settings.state_dir, Fact::PoolOwner)) {
        (Ok(on_pool), Ok(in_state)) => (on_pool, in_state),
        (Err(error), _) => return found.problem("owner", error, fix()),
        (_, Err(error)) => {
            return found.problem(
                "owner",
                error,
                "restore STATE_DIR from a backup, or set it to the right folder",
            );
        }
    };
    match pool.disks() {
        Err(error) => found.problem("owner", error, fix()),
        Ok(_) if on_pool.is_some() && on_pool == in_state => {
            found.ok("owner", format!("the pool belongs to the state in {state_dir}"));
        }
        Ok(disks) if disks.is_empty() => found.ok("owner", "the pool has no owner yet; the daemon will claim it"),
        Ok(disks) => {
            let finding = format!(
                "the pool has {} disks that are not in the state in {state_dir}",
                disks.len()
            );
            found.problem("owner", finding, fix());
        }
    }
}

fn space(found: &mut Findings, settings: &Settings, pool: &Pool) {
    let buffer = settings.storage_buffer.bytes();
    match pool.space() {
        Err(error) => found.problem("space", error, "check the kernel log: dmesg"),
        Ok(space) if space.host_free.is_some_and(|free| free < buffer) => {
            let finding = format!(
                "the host disk under the pool has {} free, less than the buffer of {buffer} (STORAGE_BUFFER_GIB)",
                space.host_free.unwrap_or_default()
            );
            found.problem(
                "space",
                finding,
                "free space on the host disk, or delete VMs and run scalebox pool trim",
            );
        }
        Ok(space) if space.free < buffer => {
            let finding = format!(
                "{} free in the pool, less than the buffer of {buffer} (STORAGE_BUFFER_GIB)",
                space.free
            );
            found.problem("space", finding, "scalebox pool grow, or delete VMs");
        }
        Ok(space) => found.ok("space", format!("{} of {} free", space.free, space.capacity)),
    }
}

/// Checks whether `pool init` would find enough space, by its own rule.
fn space_for_a_pool(found: &mut Findings, settings: &Settings, image: &Path) {
    // The folder itself may be missing; `pool init` creates it.
    let Some(folder) = image.ancestors().skip(1).find(|folder| folder.exists()) else {
        return;
    };
    match rustix::fs::statvfs(folder) {
        Err(errno) => found.problem(
            "space",
            format!("cannot read the free space of {}: {errno}", folder.display()),
            "set POOL_IMAGE",
        ),
        Ok(stat) => {
            let available = Bytes::from_blocks(stat.f_bavail, stat.f_frsize);
            match pool_size(available, settings.storage_size.as_ref()) {
                Ok(size) => found.ok(
                    "space",
                    format!("{available} free in {}, for a pool of {size}", folder.display()),
                ),
                Err(error) => found.problem(
                    "space",
                    error,
                    "free some space, or set POOL_IMAGE to a path on a larger disk",
                ),
            }
        }
    }
}

async fn network(found: &mut Findings, settings: &Settings) {
    let resolvers = resolvers(found, settings);
    match scalebox_net::inspect(&settings.net.clone().with_resolvers(&resolvers)).await {
        Err(error) => found.failed(
            "network",
            &error,
            "install nftables, or set BRIDGE and SUBNET to values that are free on this host",
        ),
        Ok(Inspection {
            firewall_drops,
            guards_taps,
        }) => {
            let (bridge, subnet) = (settings.net.bridge(), settings.net.subnet());
            found.ok(
                "network",
                format!("bridge {bridge} and subnet {subnet} are free, or used by Scalebox"),
            );
            for drop in &firewall_drops {
                found.problem("firewall", drop.finding(), drop.remedy());
            }
            if firewall_drops.is_empty() {
                found.ok("firewall", "no other firewall drops guest traffic");
            }
            if !guards_taps {
                found.note(
                    "firewall",
                    "this kernel has no nftables bridge family: guests can spoof the addresses of other VMs on this host",
                    "use a kernel with CONFIG_NF_TABLES_BRIDGE",
                );
            }
        }
    }
    let range = settings.net.ports();
    let (first, last, all) = (*range.start(), *range.end(), range.len());
    let free = range
        .filter(|port| scalebox_net::port_is_free_on_host(*port).unwrap_or(false))
        .count();
    let finding = format!("{free} of the {all} ports from {first} to {last} are not used by other programs");
    if free > 0 {
        found.ok("ports", finding);
    } else {
        found.problem("ports", finding, "set PORT_MIN and PORT_MAX to a free range");
    }
}

/// Returns the resolvers for guests.
fn resolvers(found: &mut Findings, settings: &Settings) -> Vec<Ipv4Addr> {
    const FIX: &str = "set GUEST_DNS to a resolver that guests can reach";
    if !settings.guest_dns.is_empty() {
        return settings.guest_dns.clone();
    }
    let host = scalebox_net::host_resolvers();
    let file = host.source.display();
    match &host.unreadable {
        Some(error) => found.problem("resolvers", format!("cannot read {file}: {error}"), FIX),
        None if host.servers.is_empty() => {
            let finding = format!("{file} has no resolver that guests can reach: name resolution fails in guests");
            found.note("resolvers", finding, FIX);
        }
        None => {
            let servers: Vec<_> = host.servers.iter().map(ToString::to_string).collect();
            found.ok("resolvers", format!("guests use {}, from {file}", servers.join(", ")));
        }
    }
    host.servers
}

fn api_port(found: &mut Findings, settings: &Settings) {
    let address = settings.api;
    let running = daemon_runs(&settings.state_dir);
    match try_bind(address) {
        Ok(()) if running => found.ok("api", format!("a daemon is running, but not on {address}")),
        Ok(()) => found.ok("api", format!("{address} is free; no daemon is running")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && running => {
            found.ok("api", format!("a daemon is running, and {address} is in use"));
        }
        Err(error) => found.problem(
            "api",
            format!("cannot listen on {address}: {error}"),
            format!("set API_BIND and API_PORT to an address of this host and a free port; ss -ltnp 'sport = :{}' shows the program that uses the port", address.port()),
        ),
    }
}

/// Binds the address without listening on it, so that no client can connect.
fn try_bind(address: SocketAddr) -> io::Result<()> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // The daemon sets this option too. Otherwise connections in TIME_WAIT would block the port.
    socket.set_reuseaddr(true)?;
    socket.bind(address)
}

/// Returns whether a process holds the lock on the state.
///
/// Reads the kernel's list of locks (proc(5)) instead of trying to take the lock, which a daemon
/// starting at that moment would find taken.
fn daemon_runs(state_dir: &Path) -> bool {
    let Ok(lock) = fs::metadata(state_dir.join("lock")) else {
        return false;
    };
    let inode = format!(":{}", lock.ino());
    // `1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF`
    let locks = read_lossy(Path::new("/proc/locks"));
    locks.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(1) == Some(&"FLOCK") && fields.get(5).is_some_and(|file| file.ends_with(&inode))
    })
}
