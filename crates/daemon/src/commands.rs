//! What each subcommand does.

use crate::accounts;
use crate::api;
use crate::auto_extend;
use crate::cleanup;
use crate::contradictions;
use crate::down;
use crate::drivers::{self, Drivers};
use crate::error::ServiceError;
use crate::events::Events;
use crate::guest_trim;
use crate::network_watch;
use crate::pool_growth;
use crate::pool_watch;
use crate::progress;
use crate::random::random_hex;
use crate::reclaim;
use crate::recovery::{self, Recovered};
use crate::server;
use crate::service::{Parts, Service};
use crate::settings::{Settings, SettingsError};
use crate::snapshots;
use crate::state::{Fact, State, StateError};
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

/// The longest path of a Unix socket, in bytes: `sun_path` less its final zero (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// Why a command failed: a sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum CommandFailed {
    /// A setting.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The pool, a template or a disk.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The state file.
    #[error(transparent)]
    State(#[from] StateError),
    /// The network.
    #[error(transparent)]
    Net(#[from] scalebox_net::Error),
    /// The hypervisor.
    #[error(transparent)]
    Vmm(#[from] scalebox_vmm::Error),
    /// A malformed name of a template.
    #[error("the template's name {0}")]
    TemplateName(#[from] InvalidFormat),
    /// Building a template.
    #[error(transparent)]
    Guest(#[from] scalebox_guest::Error),
    /// Putting things right at start.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The pool's disks are not those of this state.
    #[error(
        "the pool at {} holds {disks} disks that the state in {} knows nothing of: set STATE_DIR and DATA_DIR to a pair that belongs together. \
         To give these VMs up for good, remove their disks first: rm {}/vms/*.ext4",
        pool.display(), state_dir.display(), pool.display()
    )]
    ForeignPool {
        /// The pool's mount point.
        pool: PathBuf,
        /// The state's folder.
        state_dir: PathBuf,
        /// How many disks there are.
        disks: usize,
    },
    /// The pool of a state that has VMs is not there. Not a wrong setting: the mount may be back in
    /// a moment.
    #[error(
        "no pool is mounted at {}, and the state knows {vms} VMs: mount it again (mount {}; scaleboxd doctor tells more), and do not make a new \
         one. scaleboxd starts as soon as it is mounted: systemd tries again by itself",
        pool.display(), pool.display()
    )]
    PoolMissing {
        /// The pool's mount point.
        pool: PathBuf,
        /// How many VMs there are.
        vms: usize,
    },
    /// The address cannot be listened on.
    #[error(
        "cannot listen on {address}: {source}; set API_BIND and API_PORT to an address of this host and a free port"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The log's filter.
    #[error(
        "LOG_LEVEL={0:?} cannot be used: it must be one of error, warn, info, debug, trace, or a filter such as info,scalebox_net=debug"
    )]
    LogLevel(String),
    /// Something the kernel would not do.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl CommandFailed {
    /// Whether somebody has to change a setting: trying again does not help.
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

/// `LOG_LEVEL`, understood.
pub fn log_filter(settings: &Settings) -> Result<EnvFilter, CommandFailed> {
    let level = &settings.log_level;
    EnvFilter::try_new(level).map_err(|_| CommandFailed::LogLevel(level.clone()))
}

/// `scaleboxd pool init`.
pub fn pool_init(settings: &Settings) -> Result<(), CommandFailed> {
    scalebox_storage::require_programs().map_err(StorageError::from)?;
    let plan = PoolPlan {
        // A state that cannot be read is for `serve` and `doctor` to report.
        expected_disks: State::peek_vms(&settings.state_dir).unwrap_or(0),
        ..settings.pool_plan()
    };
    match scalebox_storage::init(&plan, &mut tell)? {
        InitOutcome::AlreadyThere => println!("Nothing to do."),
        InitOutcome::Ready => println!("The pool is ready at {}.", settings.data_dir.display()),
    }
    Ok(())
}

fn tell(event: InitEvent) {
    match event {
        InitEvent::Step(step) => println!("{step}"),
        InitEvent::Warning(warning) => eprintln!("warning: {warning}"),
    }
}

/// `scaleboxd template build`.
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
        println!("The template {name} is there already; --replace builds it anew.");
        return Ok(());
    }
    let mut shown = progress::Shown::new();
    let recipe = scalebox_guest::Recipe::default();
    let made = scalebox_guest::build(&recipe, &pool.build_dir()?, cache, &mut shown)?;
    pool.install_kernel(&made.kernel, &made.initrd)?;
    let template = pool.import_template(&name, &made.rootfs, Bytes::new(u64::MAX), true)?;
    shown.finish();
    println!(
        "The template {name} is ready: {} large, {} on disk.",
        template.size, template.used
    );
    Ok(())
}

/// `scaleboxd template import`.
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

/// `scaleboxd serve`.
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
            strays_ended = recovered.strays_ended,
            files_removed = recovered.files_removed,
            to_start = recovered.to_start.len(),
            "recovered"
        );
        let local = listener
            .local_addr()
            .map_err(io("read the address that is listened on"))?;
        tracing::info!(address = %local, "ready");
        tell_systemd(&[NotifyState::Ready]);
        tokio::spawn(pool_watch::run(service.clone()));
        tokio::spawn(reclaim::run(service.clone()));
        tokio::spawn(cleanup::run(service.clone()));
        tokio::spawn(accounts::run(service.clone()));
        tokio::spawn(network_watch::run(service.clone(), recovered.unconnected));
        tokio::spawn(guest_trim::run(service.clone()));
        tokio::spawn(auto_extend::run(service.clone()));
        tokio::spawn(pool_growth::reconcile(service.clone()));
        tokio::spawn(snapshots::thaw_left_frozen(service.clone()));
        recovery::stop_again(&service, recovered.to_stop);
        tokio::spawn(recovery::start_again(service.clone(), recovered.to_start));
        server::run(listener, api::router(service.clone(), &token), &service)
            .await
            .map_err(io("serve the API"))?;
        tracing::info!("stopped; machines run on");
        Ok(())
    });
    // Threads that still wait for something had the time they get: what they are about, the next
    // start puts right.
    runtime.shutdown_background();
    served
}

/// Tells the service manager how far the daemon is, where one asked for that (`Type=notify`).
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd cannot be told: it takes the start for unfinished");
    }
}

/// `scaleboxd down`.
pub fn down(settings: Settings) -> Result<(), CommandFailed> {
    let (data_dir, backing) = (settings.data_dir.clone(), settings.backing.clone());
    runtime()?.block_on(async {
        match open_service(settings.clone(), State::open(&settings.state_dir, &settings.run_dir)?).await {
            Ok((service, recovered)) => down::shut_all_down(&service, &recovered).await,
            // The pool is not there; machines and network may be all the same.
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
        "Everything is down; VMs and their disks are kept. `scaleboxd pool init` and `scaleboxd serve` bring them back."
    );
    Ok(())
}

async fn down_without_pool(settings: &Settings) -> Result<(), CommandFailed> {
    recovery::note_host_down(&State::open(&settings.state_dir, &settings.run_dir)?)?;
    let (vmm, _) = Drivers::find(settings)?;
    let machines = settings.run_dir.join("vms");
    for id in recovery::vm_folders(&machines)? {
        vmm.force_stop(&id.parse()?, &machines.join(&id)).await?;
    }
    Ok(Network::ensure(settings.net.clone()).await?.teardown().await?)
}

/// `scaleboxd client-config`.
pub fn client_config(settings: &Settings) -> Result<(), CommandFailed> {
    let token = settings.token()?;
    let mut address = settings.api;
    if address.ip().is_unspecified() {
        address.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    println!("SCALEBOX_URL=http://{address}\nSCALEBOX_TOKEN={}", token.secret());
    Ok(())
}

/// Threads for whatever waits on sockets.
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

/// Opens every part, puts them together and puts right what a crash left.
async fn open_service(settings: Settings, state: State) -> Result<(Service, Recovered), CommandFailed> {
    if state.is_read_only() {
        tracing::error!(
            path = %settings.state_dir.display(),
            "STATE_DIR is read-only: VMs run on, and nothing can be changed; make it writable and restart scaleboxd"
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
    take_pool(&pool, &state, &settings)?;
    prepare_run_dir(&settings.run_dir)?;
    scalebox_storage::ensure_direct_io(&settings.data_dir, &settings.backing, &mut |event| match event {
        InitEvent::Step(step) => tracing::info!("{step}"),
        InitEvent::Warning(warning) => tracing::warn!("{warning}"),
    })?;
    if let Err(error) = pool.reconcile() {
        // As while btrfs is still busy with a change that an earlier daemon began. The pool is in
        // use all the same.
        tracing::warn!(%error, "the pool and its image are not of one size yet; trying again");
    }
    if let Err(error) = pool.make_kernel_readable() {
        tracing::warn!(%error, "each jail gets a kernel of its own");
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

/// Makes sure that the pool's disks are the state's: with the wrong state they would all look like
/// nobody's, and be removed.
fn take_pool(pool: &Pool, state: &State, settings: &Settings) -> Result<(), CommandFailed> {
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

/// A folder that cannot be used is told now, not at the first machine.
fn prepare_run_dir(run_dir: &Path) -> Result<(), CommandFailed> {
    let vms = run_dir.join("vms");
    // The longest socket in it: `vm-0123456789ab/control.sock`.
    let longest = vms.as_os_str().len() + 1 + "vm-0123456789ab".len() + scalebox_vmm::machine::MAX_SOCKET_NAME;
    if longest > SOCKET_PATH_MAX {
        let right = format!(
            "sockets in it would have paths of {longest} bytes, and {SOCKET_PATH_MAX} is the most: choose a shorter one"
        );
        return Err(SettingsError::Value {
            key: "RUN_DIR",
            value: run_dir.display().to_string(),
            right,
        }
        .into());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&vms)
        .map_err(io("create RUN_DIR"))?;
    tempfile_probe(&vms).map_err(io("write to RUN_DIR"))
}

/// Writes an unnamed file and forgets it.
fn tempfile_probe(dir: &Path) -> io::Result<()> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?;
    Ok(())
}

/// The resolvers that guests are told: those of the settings, or the host's.
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
            "the host names no resolver that guests can reach: they resolve no names until GUEST_DNS is set"
        );
    }
    found.servers
}
