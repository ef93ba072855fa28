//! The subcommands.

pub mod doctor;
pub mod down;
pub mod log;
pub mod progress;

use crate::host::drivers::{self, Drivers};
use crate::host::error::ServiceError;
use crate::host::events::Events;
use crate::host::random::random_hex;
use crate::host::{Parts, Service};
use crate::http::routes;
use crate::http::server;
use crate::pool::growth;
use crate::pool::reclaim;
use crate::settings::contradictions;
use crate::settings::{Settings, SettingsError};
use crate::state::{Fact, State, StateError};
use crate::vm::cleanup;
use crate::vm::recovery::{self, Recovered};
use crate::vm::snapshot;
use crate::watch::extend;
use crate::watch::network;
use crate::watch::space;
use crate::watch::trim;
use crate::watch::usage;
use rustix::fs::{Mode, OFlags};
use scalebox_net::Network;
use scalebox_storage::{InitEvent, InitOutcome, Pool, PoolPlan, StorageError};
use scalebox_units::{Bytes, InvalidFormat, TemplateName};
use sd_notify::NotifyState;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

/// The maximum path length of a Unix socket, in bytes: `sun_path` without its final zero (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Why a command failed, as a sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum CommandFailed {
    /// A setting is invalid.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// An operation on the pool, a template or a disk failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The state file cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The network cannot be set up.
    #[error(transparent)]
    Net(#[from] scalebox_net::Error),
    /// The hypervisor cannot be used.
    #[error(transparent)]
    Vmm(#[from] scalebox_vmm::Error),
    /// A malformed name of a template.
    #[error("the template's name {0}")]
    TemplateName(#[from] InvalidFormat),
    /// The template cannot be built.
    #[error(transparent)]
    Guest(#[from] scalebox_guest::Error),
    /// Recovery or another operation of the service failed.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The pool's disks do not belong to this state.
    #[error(
        "the pool at {} has {disks} disks that are not in the state in {}: set STATE_DIR and DATA_DIR to a pair that belongs together. \
         To discard these VMs, remove their disks first: rm {}/vms/*.ext4",
        pool.display(), state_dir.display(), pool.display()
    )]
    ForeignPool {
        /// The pool's mount point.
        pool: PathBuf,
        /// The state folder.
        state_dir: PathBuf,
        /// The number of disks.
        disks: usize,
    },
    /// The state has VMs, but the pool is not mounted. This is not a wrong setting: the pool may be
    /// mounted a moment later.
    #[error(
        "no pool is mounted at {}, but the state has {vms} VMs: mount it again (mount {}; see scaleboxd doctor), and do not create a new \
         one. scaleboxd starts once it is mounted: systemd retries automatically",
        pool.display(), pool.display()
    )]
    PoolMissing {
        /// The pool's mount point.
        pool: PathBuf,
        /// The number of VMs.
        vms: usize,
    },
    /// The API address cannot be bound.
    #[error(
        "cannot listen on {address}: {source}; set API_BIND and API_PORT to an address of this host and a free port"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// `LOG_LEVEL` is invalid.
    #[error(
        "LOG_LEVEL={0:?} cannot be used: must be one of error, warn, info, debug, trace, or a filter such as info,scalebox_net=debug"
    )]
    LogLevel(String),
    /// A system call failed.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl CommandFailed {
    /// Returns whether a setting has to be changed, so that a retry does not help.
    pub fn is_configuration(&self) -> bool {
        matches!(
            self,
            CommandFailed::Settings(_) | CommandFailed::LogLevel(_) | CommandFailed::ForeignPool { .. }
        )
    }
}

fn io(doing: &'static str) -> impl Fn(io::Error) -> CommandFailed {
    move |source| CommandFailed::Io { doing, source }
}

/// Parses `LOG_LEVEL`.
pub fn log_filter(settings: &Settings) -> Result<EnvFilter, CommandFailed> {
    let level = &settings.log_level;
    EnvFilter::try_new(level).map_err(|_| CommandFailed::LogLevel(level.clone()))
}

/// Runs `scaleboxd pool init`.
pub fn pool_init(settings: &Settings) -> Result<(), CommandFailed> {
    scalebox_storage::require_programs().map_err(StorageError::from)?;
    let plan = PoolPlan {
        // `serve` and `doctor` report a state that cannot be read.
        expected_disks: State::peek_vms(&settings.state_dir).unwrap_or(0),
        ..settings.pool_plan()
    };
    match scalebox_storage::init(&plan, &mut print_event)? {
        InitOutcome::AlreadyThere => println!("Nothing to do."),
        InitOutcome::Ready => println!("The pool is ready at {}.", settings.data_dir.display()),
    }
    Ok(())
}

fn print_event(event: InitEvent) {
    match event {
        InitEvent::Step(step) => println!("{step}"),
        InitEvent::Warning(warning) => eprintln!("warning: {warning}"),
    }
}

/// Runs `scaleboxd template build`.
pub fn template_build(
    settings: &Settings,
    name: &str,
    replace: bool,
    cache: Option<&Path>,
) -> Result<(), CommandFailed> {
    let name: TemplateName = name.parse()?;
    let pool = Pool::open(&settings.data_dir, &settings.backing, settings.bounds())?;
    let kernel_there = pool.kernel_dir().join("vmlinuz").exists() && pool.kernel_dir().join("initrd.img").exists();
    if !replace && kernel_there && pool.template(&name).is_ok() {
        println!("The template {name} already exists; use --replace to build it again.");
        return Ok(());
    }
    let mut progress = progress::ProgressDisplay::new();
    let recipe = scalebox_guest::Recipe::default();
    let built = scalebox_guest::build(&recipe, &pool.build_dir()?, cache, &mut progress)?;
    pool.install_kernel(&built.kernel, &built.initrd)?;
    let template = pool.import_template(&name, &built.rootfs, Bytes::new(u64::MAX), true)?;
    progress.finish();
    println!(
        "The template {name} is ready: {} large, {} on disk.",
        template.size, template.used
    );
    Ok(())
}

/// Runs `scaleboxd template import`.
pub fn template_import(settings: &Settings, name: &str, file: &Path, replace: bool) -> Result<(), CommandFailed> {
    scalebox_storage::require_programs().map_err(StorageError::from)?;
    let pool = Pool::open(&settings.data_dir, &settings.backing, settings.bounds())?;
    let template = pool.import_template(&name.parse()?, file, settings.max_disk_size.bytes(), replace)?;
    println!(
        "The template {name} is ready: {} large, {} on disk.",
        template.size, template.used
    );
    Ok(())
}

/// Runs `scaleboxd serve`.
pub fn serve(settings: Settings) -> Result<(), CommandFailed> {
    let token = settings.token()?.clone();
    for caveat in contradictions::caveats(&settings) {
        tracing::warn!(fix = caveat.fix, "{}", caveat.finding);
    }
    let runtime = runtime()?;
    let served = runtime.block_on(async {
        let state = State::open(&settings.state_dir, &settings.run_dir)?;
        let address = settings.api;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| CommandFailed::Listen { address, source })?;
        let (service, recovered) = open_service(settings, state).await?;
        tracing::info!(
            vms = recovered.vms,
            adopted = recovered.adopted,
            orphans_killed = recovered.orphans_killed,
            files_removed = recovered.files_removed,
            to_start = recovered.to_start.len(),
            "recovery finished"
        );
        let local = listener.local_addr().map_err(io("read the API's address"))?;
        tracing::info!(address = %local, "ready");
        notify_systemd(&[NotifyState::Ready]);
        tokio::spawn(space::run(service.clone()));
        tokio::spawn(reclaim::run(service.clone()));
        tokio::spawn(cleanup::run(service.clone()));
        tokio::spawn(usage::run(service.clone()));
        tokio::spawn(network::run(service.clone(), recovered.unconnected));
        tokio::spawn(trim::run(service.clone()));
        tokio::spawn(extend::run(service.clone()));
        tokio::spawn(growth::reconcile(service.clone()));
        tokio::spawn(snapshot::thaw_left_frozen(service.clone()));
        recovery::complete_stops(&service, recovered.to_stop);
        tokio::spawn(recovery::start_after_reboot(service.clone(), recovered.to_start));
        server::run(listener, routes::router(service.clone(), &token), &service)
            .await
            .map_err(io("serve the API"))?;
        tracing::info!("stopped; machines keep running");
        Ok(())
    });
    // Blocking threads have had their grace period; the next start cleans up after them.
    runtime.shutdown_background();
    served
}

/// Notifies the service manager of the daemon's state, if it asked for that (`Type=notify`).
fn notify_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot notify systemd: it considers the start unfinished");
    }
}

/// Runs `scaleboxd down`.
pub fn down(settings: Settings) -> Result<(), CommandFailed> {
    let (data_dir, backing) = (settings.data_dir.clone(), settings.backing.clone());
    runtime()?.block_on(async {
        match open_service(settings.clone(), State::open(&settings.state_dir, &settings.run_dir)?).await {
            Ok((service, recovered)) => down::shut_all_down(&service, &recovered).await,
            // Machines and network may exist without the pool.
            Err(CommandFailed::Storage(StorageError::NotMounted(_)) | CommandFailed::PoolMissing { .. }) => {
                down_without_pool(&settings).await
            }
            Err(error) => Err(error),
        }
    })?;
    if scalebox_storage::unmount(&data_dir, &backing)? {
        println!("Unmounted {}.", data_dir.display());
    }
    println!(
        "Everything is stopped; VMs and their disks are kept. `scaleboxd pool init` and `scaleboxd serve` start them again."
    );
    Ok(())
}

async fn down_without_pool(settings: &Settings) -> Result<(), CommandFailed> {
    recovery::record_host_down(&State::open(&settings.state_dir, &settings.run_dir)?)?;
    let (vmm, _) = Drivers::find(settings)?;
    let machines = settings.run_dir.join("vms");
    for id in recovery::vm_folders(&machines)? {
        vmm.force_stop(&id.parse()?, &machines.join(&id)).await?;
    }
    Ok(Network::ensure(settings.net.clone()).await?.teardown().await?)
}

/// Runs `scaleboxd client-config`.
pub fn client_config(settings: &Settings) -> Result<(), CommandFailed> {
    let token = settings.token()?;
    let mut address = settings.api;
    if address.ip().is_unspecified() {
        address.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    println!("SCALEBOX_URL=http://{address}\nSCALEBOX_TOKEN={}", token.secret());
    Ok(())
}

/// Builds the async runtime.
pub fn runtime() -> Result<tokio::runtime::Runtime, CommandFailed> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    // For tests that count the system calls of each thread.
    #[cfg(feature = "fault-points")]
    if let Some(threads) = std::env::var("SCALEBOX_THREADS")
        .ok()
        .and_then(|count| count.parse().ok())
    {
        builder.worker_threads(threads).max_blocking_threads(threads);
    }
    builder.enable_all().build().map_err(io("start threads"))
}

/// Opens all parts, assembles the service and recovers from a crash.
async fn open_service(settings: Settings, state: State) -> Result<(Service, Recovered), CommandFailed> {
    if state.is_read_only() {
        tracing::error!(
            path = %settings.state_dir.display(),
            "STATE_DIR is read-only: VMs keep running, but nothing can be changed; make it writable and restart scaleboxd"
        );
    }
    scalebox_storage::require_programs().map_err(StorageError::from)?;
    let pool = match Pool::open(&settings.data_dir, &settings.backing, settings.bounds()) {
        Err(StorageError::NotMounted(pool)) if !state.vms()?.is_empty() => {
            return Err(CommandFailed::PoolMissing {
                pool,
                vms: state.vms()?.len(),
            });
        }
        other => other?,
    };
    claim_pool(&pool, &state, &settings)?;
    prepare_run_dir(&settings.run_dir)?;
    scalebox_storage::ensure_direct_io(&settings.data_dir, &settings.backing, &mut |event| match event {
        InitEvent::Step(step) => tracing::info!("{step}"),
        InitEvent::Warning(warning) => tracing::warn!("{warning}"),
    })?;
    if let Err(error) = pool.reconcile() {
        // For example, while btrfs still completes a resize that a previous daemon began. The pool
        // can be used nevertheless.
        tracing::warn!(%error, "cannot reconcile the size of the pool with its image yet; retrying");
    }
    if let Err(error) = pool.make_kernel_readable() {
        tracing::warn!(%error, "cannot share the kernel between jails; each gets its own copy");
    }
    drivers::wait_for_kvm(&settings).await;
    let (vmm, accel) = Drivers::find(&settings)?;
    let resolvers = resolvers(&settings);
    let network = Network::ensure(settings.net.clone().with_resolvers(&resolvers)).await?;
    let events = Events::begin(&state)?;
    let parts = Parts {
        settings,
        pool,
        state,
        events,
        network,
        resolvers,
        vmm,
        accel,
        cmdline: scalebox_guest::kernel_cmdline(),
    };
    let service = Service::new(parts).map_err(io("read the host's memory"))?;
    let recovered = recovery::recover(&service).await?;
    Ok((service, recovered))
}

/// Checks that the pool's disks belong to the state. With the wrong state, they would all look
/// orphaned and be removed.
fn claim_pool(pool: &Pool, state: &State, settings: &Settings) -> Result<(), CommandFailed> {
    pool.lock()?;
    let (on_pool, in_state) = (pool.owner()?, state.fact(Fact::PoolOwner)?);
    if on_pool.is_some() && on_pool == in_state {
        return Ok(());
    }
    let disks = pool.disks()?.len();
    if disks > 0 {
        let (pool, state_dir) = (settings.data_dir.clone(), settings.state_dir.clone());
        return Err(CommandFailed::ForeignPool { pool, state_dir, disks });
    }
    let owner = random_hex(16).map_err(io("get random bytes"))?;
    pool.set_owner(&owner)?;
    Ok(state.set_fact(Fact::PoolOwner, &owner)?)
}

/// Creates RUN_DIR, so that an unusable folder is reported now and not by the first machine.
fn prepare_run_dir(run_dir: &Path) -> Result<(), CommandFailed> {
    let vms = run_dir.join("vms");
    // The longest socket path in it: `vm-0123456789ab/control.sock`.
    let max_length = vms.as_os_str().len() + 1 + "vm-0123456789ab".len() + scalebox_vmm::MAX_SOCKET_NAME;
    if max_length > MAX_SOCKET_PATH {
        let expected = format!(
            "socket paths in it would have {max_length} bytes, over the limit of {MAX_SOCKET_PATH}: choose a shorter path"
        );
        return Err(SettingsError::Value {
            key: "RUN_DIR",
            value: run_dir.display().to_string(),
            expected,
        }
        .into());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&vms)
        .map_err(io("create RUN_DIR"))?;
    probe_writable(&vms).map_err(io("write to RUN_DIR"))
}

/// Checks that files can be created, with an unnamed one.
fn probe_writable(dir: &Path) -> io::Result<()> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?;
    Ok(())
}

/// Returns the resolvers for guests: from the settings, or from the host.
pub fn resolvers(settings: &Settings) -> Vec<Ipv4Addr> {
    if !settings.guest_dns.is_empty() {
        return settings.guest_dns.clone();
    }
    let found = scalebox_net::host_resolvers();
    if let Some(error) = &found.unreadable {
        tracing::warn!(file = %found.source.display(), error, "cannot read the host's resolvers");
    }
    if found.servers.is_empty() {
        tracing::warn!(
            file = %found.source.display(),
            "the host has no resolver that guests can reach: name resolution fails in guests until GUEST_DNS is set"
        );
    }
    found.servers
}
