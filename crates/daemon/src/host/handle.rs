//! The handle on a running daemon: its parts, and the state that they share.

use crate::host::agent_link::AgentLinks;
use crate::host::cleanups::Cleanups;
use crate::host::drivers::Drivers;
use crate::host::error::ServiceError;
use crate::host::events::Events;
use crate::host::guest_requests::GuestRequests;
use crate::host::jobs::Jobs;
use crate::host::kernels_in_use::KernelsInUse;
use crate::host::keys_in_use::KeysInUse;
use crate::host::paused_vms::PausedVms;
use crate::host::pool_growth::PoolGrowth;
use crate::host::reclaim::Reclaim;
use crate::host::started_execs::StartedExecs;
use crate::host::system;
use crate::host::tasks::task_failed;
use crate::host::templates_in_use::TemplatesInUse;
use crate::host::usage_tracker::UsageTracker;
use crate::host::vms::Vms;
use crate::settings::Settings;
use crate::state::State;
use scalebox_api::Limits;
use scalebox_net::Network;
use scalebox_storage::Pool;
use scalebox_units::VmId;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// Limit on concurrent exports and imports of templates.
pub(crate) const MAX_TRANSFERS: usize = 8;

/// The protected template that every host has.
pub(crate) const BASE_TEMPLATE: &str = "debian-base";

/// A running daemon: its parts, and the state that they share. A clone is another handle on the
/// same daemon.
#[derive(Clone)]
pub(crate) struct Host {
    inner: Arc<Inner>,
}

/// The parts of a [`Host`].
pub(crate) struct Inner {
    pub settings: Settings,
    pub host_ip: IpAddr,
    pub limits: Limits,
    pub pool: Arc<Pool>,
    pub state: Arc<State>,
    /// The events, in which every change of a VM, a template or the pool is published.
    pub events: Arc<Events>,
    pub network: Network,
    pub resolvers: Vec<Ipv4Addr>,
    pub vmm: Drivers,
    pub accel: String,
    pub cmdline: String,
    pub vms: Vms,
    /// The idempotency keys of creations in progress.
    pub keys: KeysInUse,
    /// The machines that are paused because storage is full.
    pub paused: PausedVms,
    pub growth: PoolGrowth,
    /// Disk usage of VMs and templates.
    pub usage: UsageTracker,
    pub reclaim: Reclaim,
    /// Failed removals from the host that are retried.
    pub cleanups: Cleanups,
    pub templates_in_use: TemplatesInUse,
    pub kernels_in_use: KernelsInUse,
    pub jobs: Jobs,
    /// The connections to the agents of guests.
    pub agents: AgentLinks,
    /// Limits the number of requests that use them.
    pub guest_requests: GuestRequests,
    /// The commands whose end is to be published.
    pub execs: StartedExecs,
    pub started: Instant,
    /// The token that is cancelled when the daemon is to stop.
    pub closing: CancellationToken,
    /// Limits the number of template exports and imports.
    pub transfers: Arc<Semaphore>,
    /// The operations in progress. They outlive the connection that started them; a shutdown waits
    /// for them.
    pub tasks: TaskTracker,
}

/// The initialised parts of a host.
pub(crate) struct Parts {
    /// The settings.
    pub settings: Settings,
    /// The open pool.
    pub pool: Pool,
    /// The open state file.
    pub state: State,
    /// The events of this start of the daemon.
    pub events: Events,
    /// The bridge, taps, forwards and firewall rules.
    pub network: Network,
    /// The DNS resolvers for guests.
    pub resolvers: Vec<Ipv4Addr>,
    /// The hypervisors.
    pub vmm: Drivers,
    /// The accelerator: `kvm` or `tcg`.
    pub accel: String,
    /// The kernel command line of guests.
    pub cmdline: String,
}

impl Deref for Host {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.inner
    }
}

impl Host {
    /// Assembles the host, with an empty table of VMs.
    ///
    /// # Errors
    /// If the host's memory cannot be read.
    pub(crate) fn new(parts: Parts) -> std::io::Result<Host> {
        let memory_mib = system::memory()?.total >> 20;
        let inner = Inner {
            host_ip: parts.settings.host_ip.unwrap_or_else(system::default_address),
            limits: parts
                .settings
                .limits(system::cpu_count().min(parts.vmm.for_new().max_vcpus()), memory_mib),
            vms: Vms::new(&parts.settings.net),
            keys: KeysInUse::default(),
            paused: PausedVms::default(),
            growth: PoolGrowth::default(),
            usage: UsageTracker::default(),
            settings: parts.settings,
            pool: Arc::new(parts.pool),
            state: Arc::new(parts.state),
            events: Arc::new(parts.events),
            network: parts.network,
            resolvers: parts.resolvers,
            vmm: parts.vmm,
            accel: parts.accel,
            cmdline: parts.cmdline,
            reclaim: Reclaim::default(),
            cleanups: Cleanups::default(),
            templates_in_use: TemplatesInUse::default(),
            kernels_in_use: KernelsInUse::default(),
            jobs: Jobs::default(),
            agents: AgentLinks::default(),
            guest_requests: GuestRequests::default(),
            execs: StartedExecs::default(),
            started: Instant::now(),
            closing: CancellationToken::new(),
            transfers: Arc::new(Semaphore::new(MAX_TRANSFERS)),
            tasks: TaskTracker::new(),
        };
        Ok(Host { inner: Arc::new(inner) })
    }

    /// Returns the limits for requests on this host.
    pub(crate) fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// Waits for all operations in progress. Does not prevent new ones.
    pub(crate) async fn finish(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// Returns the folder for the sockets, pid file and seed drive of a VM's machine.
    pub(crate) fn run_dir(&self, id: &VmId) -> PathBuf {
        self.inner.settings.run_dir.join("vms").join(id.as_str())
    }

    pub(crate) fn console_dir(&self, id: &VmId) -> PathBuf {
        self.inner.settings.state_dir.join("console").join(id.as_str())
    }

    pub(crate) fn console_log(&self, id: &VmId) -> PathBuf {
        self.console_dir(id).join("console.log")
    }

    /// Runs an operation in its own task, so that a client that disconnects does not interrupt it.
    ///
    /// # Errors
    /// Those of the operation; [`ServiceError::Internal`] if it panics.
    pub(crate) async fn detached<T, F>(&self, operation: impl FnOnce(Host) -> F) -> Result<T, ServiceError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ServiceError>> + Send + 'static,
    {
        // Failures are logged here too: no response is logged if the client has disconnected.
        let (host, operation) = (self.clone(), operation(self.clone()));
        let logged = async move {
            operation.await.inspect_err(|error| {
                tracing::debug!(%error, "operation failed");
                host.cleanups.sweep_soon();
            })
        };
        let task = self.inner.tasks.spawn(logged.in_current_span());
        task.await.unwrap_or_else(|error| Err(task_failed(&error)))
    }
}
