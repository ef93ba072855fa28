//! What each subcommand does.

use crate::api;
use crate::error::ServiceError;
use crate::progress;
use crate::recovery::{self, Recovered};
use crate::service::{Parts, Service};
use crate::settings::{AccelChoice, LogFormat, Settings, SettingsError, VmmChoice};
use crate::state::{State, StateError};
use scalebox_net::Network;
use scalebox_storage::{InitEvent, InitOutcome, Name, Pool, StorageError};
use scalebox_vmm::{AccelSetting, QemuDriver, Vmm};
use std::future::IntoFuture;
use std::io::{self, IsTerminal};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// How long a shutdown waits for requests under way; longer than the longest of them, a stop.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(90);

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
    /// Building a template.
    #[error(transparent)]
    Guest(#[from] scalebox_guest::Error),
    /// Putting things right at start.
    #[error(transparent)]
    Service(#[from] ServiceError),
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

fn io(doing: &'static str) -> impl Fn(io::Error) -> CommandFailed {
    move |source| CommandFailed::Io { doing, source }
}

/// Logs go to standard error.
pub fn start_logging(settings: &Settings) -> Result<(), CommandFailed> {
    let level = &settings.log_level;
    let filter = EnvFilter::try_new(level).map_err(|_| CommandFailed::LogLevel(level.clone()))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    match settings.log_format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

/// `scaleboxd pool init`.
pub fn pool_init(settings: &Settings) -> Result<(), CommandFailed> {
    scalebox_storage::require_programs().map_err(StorageError::from)?;
    match scalebox_storage::init(&settings.pool_plan(), &mut tell)? {
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
    let name: Name = name.parse()?;
    let pool = Pool::open(&settings.data_dir, settings.bounds())?;
    let kernel_there = pool.kernel_dir().join("vmlinuz").exists() && pool.kernel_dir().join("initrd.img").exists();
    if !replace && kernel_there && pool.template(&name).is_ok() {
        println!("The template {name} is there already; --replace builds it anew.");
        return Ok(());
    }
    let mut shown = progress::Shown::new();
    let recipe = scalebox_guest::Recipe::default();
    let made = scalebox_guest::build(&recipe, &pool.build_dir()?, cache, &mut shown)?;
    pool.install_kernel(&made.kernel, &made.initrd)?;
    let template = pool.import_template(&name, &made.rootfs, true)?;
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
    let pool = Pool::open(&settings.data_dir, settings.bounds())?;
    let template = pool.import_template(&name.parse()?, file, replace)?;
    println!(
        "The template {name} is ready: {} large, {} on disk.",
        template.size, template.used
    );
    Ok(())
}

/// `scaleboxd serve`.
pub fn serve(settings: Settings) -> Result<(), CommandFailed> {
    let token = settings.token()?.clone();
    runtime()?.block_on(async {
        let state = State::open(&settings.state_dir)?;
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
            "recovered"
        );
        let local = listener
            .local_addr()
            .map_err(io("read the address that is listened on"))?;
        tracing::info!(address = %local, "ready");
        answer_until_told_to_stop(listener, api::router(service.clone(), &token)).await?;
        service.finish().await;
        tracing::info!("stopped; machines run on");
        Ok(())
    })
}

/// `scaleboxd down`.
pub fn down(settings: Settings) -> Result<(), CommandFailed> {
    let data_dir = settings.data_dir.clone();
    runtime()?.block_on(async {
        let state = State::open(&settings.state_dir)?;
        match open_service(settings, state).await {
            Ok((service, _)) => service.take_all_down().await.map_err(CommandFailed::from),
            // Without a pool there are no machines either; what is left of the network goes with the next start.
            Err(CommandFailed::Storage(StorageError::NotMounted(_))) => Ok(()),
            Err(error) => Err(error),
        }
    })?;
    if scalebox_storage::unmount(&data_dir)? {
        println!("Unmounted {}.", data_dir.display());
    }
    println!(
        "Everything is down; VMs and their disks are kept. `scaleboxd pool init` and `scaleboxd serve` bring them back."
    );
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime, CommandFailed> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(io("start threads"))
}

/// Opens every part, puts them together and puts right what a crash left.
async fn open_service(settings: Settings, state: State) -> Result<(Service, Recovered), CommandFailed> {
    scalebox_storage::require_programs().map_err(StorageError::from)?;
    let pool = Pool::open(&settings.data_dir, settings.bounds())?;
    scalebox_storage::ensure_direct_io(&settings.data_dir, &mut |event| match event {
        InitEvent::Step(step) => tracing::info!("{step}"),
        InitEvent::Warning(warning) => tracing::warn!("{warning}"),
    })?;
    let (vmm, accel) = find_vmm(&settings)?;
    let network = Network::ensure(settings.net.clone()).await?;
    let resolvers = resolvers(&settings)?;
    let parts = Parts {
        settings,
        pool,
        state,
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

fn find_vmm(settings: &Settings) -> Result<(Arc<dyn Vmm>, String), CommandFailed> {
    let setting = match settings.accel {
        AccelChoice::Auto => AccelSetting::Auto,
        AccelChoice::Kvm => AccelSetting::Kvm,
        AccelChoice::Tcg => AccelSetting::Tcg,
    };
    match settings.vmm {
        VmmChoice::Auto | VmmChoice::Qemu => {
            let accel = scalebox_vmm::accelerator(setting)?;
            tracing::info!(accel = %accel.accel, reason = accel.reason, "hypervisor: qemu");
            Ok((Arc::new(QemuDriver::find(accel.accel)?), accel.accel.to_string()))
        }
    }
}

fn resolvers(settings: &Settings) -> Result<Vec<Ipv4Addr>, CommandFailed> {
    if !settings.guest_dns.is_empty() {
        return Ok(settings.guest_dns.clone());
    }
    let found = scalebox_net::host_resolvers()?;
    if found.servers.is_empty() {
        tracing::warn!(
            file = %found.source.display(),
            "the host names no resolver that guests can reach: they resolve no names until GUEST_DNS is set"
        );
    }
    Ok(found.servers)
}

/// Serves until SIGTERM or SIGINT, then answers the requests under way and takes no more.
async fn answer_until_told_to_stop(listener: TcpListener, router: axum::Router) -> Result<(), CommandFailed> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io("watch for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io("watch for SIGINT"))?;
    let (told, stop) = tokio::sync::oneshot::channel::<()>();
    let mut server = std::pin::pin!(
        axum::serve(listener, router)
            .with_graceful_shutdown(async move { drop(stop.await) })
            .into_future()
    );
    tokio::select! {
        ended = &mut server => return ended.map_err(io("serve the API")),
        _ = terminate.recv() => tracing::info!("SIGTERM: finishing what is under way"),
        _ = interrupt.recv() => tracing::info!("SIGINT: finishing what is under way"),
    }
    drop(told);
    match tokio::time::timeout(SHUTDOWN_GRACE, server).await {
        Ok(ended) => ended.map_err(io("serve the API")),
        Err(_) => {
            tracing::warn!(
                seconds = SHUTDOWN_GRACE.as_secs(),
                "some clients did not finish their requests: leaving them"
            );
            Ok(())
        }
    }
}
