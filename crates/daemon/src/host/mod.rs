//! The service behind the API: shared state, and one method per operation.
//!
//! The operations are implemented in [`create`](crate::vm::create), [`lifecycle`](crate::vm::lifecycle),
//! [`update`](crate::vm::change), [`pool`](crate::pool) and [`snapshots`](crate::vm::snapshot).

pub mod agent;
pub mod drivers;
pub mod error;
pub mod events;
pub mod random;
pub mod system;
pub mod undo;
pub mod vms;

use crate::host::drivers::Drivers;
use crate::host::error::{ServiceError, quoted};
use crate::host::events::Events;
use crate::host::vms::Vms;
use crate::http::metrics::Metrics;
use crate::http::transfers::MAX_TRANSFERS;
use crate::pool::growth::PoolGrowth;
use crate::pool::reclaim::Reclaim;
use crate::settings::Settings;
use crate::state::{Record, State};
use crate::vm::cleanup::Cleanups;
use crate::vm::idempotency::{self, KeysInUse};
use crate::vm::snapshot::TemplatesInUse;
use crate::watch::space::PausedVms;
use crate::watch::trim;
use crate::watch::usage::{self, UsageTracker};
use scalebox_client::{
    Cpu, CreateVm, EventKind, HostInfo, HostLimits, Limits, Memory, Template, Trimmed, UpdateVm, Vm, VmCounts, VmStatus,
};
use scalebox_net::Network;
use scalebox_storage::{Pool, PoolUsage};
use scalebox_units::{TemplateName, VmId};
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// The protected template that every host has.
pub const BASE_TEMPLATE: &str = "debian-base";

/// The service behind the API. A clone is another handle on the same service.
#[derive(Clone)]
pub struct Service {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) settings: Settings,
    pub(crate) host_ip: IpAddr,
    pub(crate) limits: Limits,
    pub(crate) pool: Arc<Pool>,
    pub(crate) state: Arc<State>,
    /// Every change of a VM, a template or the pool is published here.
    pub(crate) events: Arc<Events>,
    pub(crate) network: Network,
    pub(crate) resolvers: Vec<Ipv4Addr>,
    pub(crate) vmm: Drivers,
    accel: String,
    pub(crate) cmdline: String,
    pub(crate) vms: Vms,
    /// Counters and histograms for Prometheus.
    pub(crate) metrics: Metrics,
    /// The idempotency keys of creations in progress.
    pub(crate) keys: KeysInUse,
    /// The machines that are paused because storage is full.
    pub(crate) paused: PausedVms,
    pub(crate) growth: PoolGrowth,
    /// Disk usage of VMs and templates.
    pub(crate) usage: UsageTracker,
    pub(crate) reclaim: Reclaim,
    /// Failed removals from the host that are retried.
    pub(crate) cleanups: Cleanups,
    pub(crate) templates_in_use: TemplatesInUse,
    started: Instant,
    /// Cancelled when the daemon is asked to stop.
    pub(crate) closing: CancellationToken,
    /// Limits the number of template exports and imports.
    pub(crate) transfers: Arc<Semaphore>,
    /// Operations outlive the connection that started them; a shutdown waits for them.
    pub(crate) tasks: TaskTracker,
}

/// The initialised parts of a service.
pub struct Parts {
    /// The settings.
    pub settings: Settings,
    /// The open pool.
    pub pool: Pool,
    /// The open state file.
    pub state: State,
    /// Where events are published.
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

impl Service {
    /// Assembles the service, with an empty table of VMs.
    ///
    /// # Errors
    /// If the host's memory cannot be read.
    pub fn new(parts: Parts) -> std::io::Result<Service> {
        let memory_mib = system::memory()?.total >> 20;
        let inner = Inner {
            host_ip: parts.settings.host_ip.unwrap_or_else(system::default_address),
            limits: parts
                .settings
                .limits(system::cpu_count().min(parts.vmm.for_new().max_vcpus()), memory_mib),
            vms: Vms::new(&parts.settings.net),
            metrics: Metrics::new().map_err(std::io::Error::other)?,
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
            started: Instant::now(),
            closing: CancellationToken::new(),
            transfers: Arc::new(Semaphore::new(MAX_TRANSFERS)),
            tasks: TaskTracker::new(),
        };
        Ok(Service { inner: Arc::new(inner) })
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// Returns the limits for requests on this host.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// Creates a VM. Completes even if the caller stops waiting.
    ///
    /// If an earlier request with the same idempotency key created a VM, returns that VM; the
    /// second value reports which case it is.
    ///
    /// # Errors
    /// 404 if there is no such template, 400 if the disk is smaller than the template, 409 if the
    /// name is in use, 507 if the disk does not fit, 503 if the host is not ready. Nothing is left
    /// behind.
    pub async fn create(&self, request: CreateVm) -> Result<(Vm, bool), ServiceError> {
        let service = self.clone();
        self.detached(async move { idempotency::create(&service, request).await })
            .await
    }

    /// Starts a stopped VM.
    ///
    /// # Errors
    /// 404; 409 if the VM is running or another operation is running on it.
    pub async fn start(&self, reference: String) -> Result<Vm, ServiceError> {
        let service = self.clone();
        self.detached(async move { service.start_now(&reference).await }).await
    }

    /// Shuts a VM down; kills the guest if it has not shut down after [`STOP_TIMEOUT`].
    ///
    /// # Errors
    /// 404; 409 if the VM is not running or another operation is running on it.
    pub async fn stop(&self, reference: String) -> Result<Vm, ServiceError> {
        let service = self.clone();
        self.detached(async move { service.stop_now(&reference).await }).await
    }

    /// Changes a VM. Grows its disk and the file system on it: live if the VM runs, otherwise
    /// offline.
    ///
    /// Waits for the operation in progress on the VM, so that the largest size wins when several
    /// requests arrive at once.
    ///
    /// # Errors
    /// 404; 400 if the disk would become smaller; 507 if it does not fit. Nothing is changed then.
    pub async fn update(&self, reference: String, request: UpdateVm) -> Result<Vm, ServiceError> {
        let service = self.clone();
        self.detached(async move { service.update_now(&reference, request).await })
            .await
    }

    /// Discards the free blocks of a guest's file systems.
    ///
    /// # Errors
    /// 404; 409 if the VM is not running or its agent does not respond.
    pub async fn trim_vm(&self, reference: String) -> Result<Trimmed, ServiceError> {
        let service = self.clone();
        self.detached(async move { trim::on_demand(&service, &reference).await })
            .await
    }

    /// Deletes a VM, running or not, with its disk. Cancels and undoes the creation of a VM of this
    /// name.
    ///
    /// # Errors
    /// 404; 409 if another operation is running on the VM.
    pub async fn delete(&self, reference: String) -> Result<(), ServiceError> {
        let service = self.clone();
        self.detached(async move { service.delete_now(&reference).await }).await
    }

    /// Lists all VMs, oldest first.
    pub fn list(&self) -> Vec<Vm> {
        let accounts = self.inner.usage.latest();
        let records = self.inner.vms.all();
        records
            .iter()
            .map(|record| self.describe_by(record, accounts.as_deref()))
            .collect()
    }

    /// Finds a VM by id or name.
    ///
    /// # Errors
    /// 404.
    pub fn get(&self, reference: &str) -> Result<Vm, ServiceError> {
        self.inner.vms.find(reference).map(|record| self.describe(&record))
    }

    /// Lists all templates.
    ///
    /// # Errors
    /// 500 if the pool cannot be read.
    pub async fn templates(&self) -> Result<Vec<Template>, ServiceError> {
        let pool = Arc::clone(&self.inner.pool);
        let templates = blocking(move || pool.templates()).await?;
        Ok(templates
            .into_iter()
            .map(|template| self.describe_template(template))
            .collect())
    }

    /// Finds a template.
    ///
    /// # Errors
    /// 404.
    pub async fn template(&self, name: String) -> Result<Template, ServiceError> {
        let parsed = template_name(&name)?;
        let pool = Arc::clone(&self.inner.pool);
        let template = blocking(move || pool.template(&parsed)).await?;
        Ok(self.describe_template(template))
    }

    pub(crate) fn describe_template(&self, template: scalebox_storage::Template) -> Template {
        let accounts = self.inner.usage.latest();
        Template {
            storage: accounts
                .as_deref()
                .and_then(|accounts| usage::template_usage(accounts, &template)),
            size_bytes: template.size.as_u64(),
            used_bytes: template.used.as_u64(),
            created_at: rfc3339(template.created_at.try_into().unwrap_or(jiff::Timestamp::UNIX_EPOCH)),
            used_by: self.inner.vms.count_from_template(template.name.as_str()),
            protected: template.name.as_str() == BASE_TEMPLATE,
            name: template.name.to_string(),
        }
    }

    /// Deletes a template. VMs created from it are kept.
    ///
    /// # Errors
    /// 403 for [`BASE_TEMPLATE`]; 404; 409 while a VM is being created from it.
    pub async fn delete_template(&self, name: String) -> Result<(), ServiceError> {
        if name == BASE_TEMPLATE {
            return Err(ServiceError::Forbidden(format!(
                "the template {BASE_TEMPLATE} is protected and cannot be deleted"
            )));
        }
        let parsed = template_name(&name)?;
        self.inner.templates_in_use.require_idle(&name)?;
        let pool = Arc::clone(&self.inner.pool);
        blocking(move || pool.delete_template(&parsed)).await?;
        self.inner.cleanups.sweep_soon();
        tracing::info!(template = name, "template deleted");
        self.inner
            .events
            .publish(EventKind::TemplateDeleted, None, json!({ "template": name }));
        Ok(())
    }

    /// Describes the host, its VMs and its limits.
    ///
    /// # Errors
    /// 500 if the kernel's figures cannot be read.
    pub async fn info(&self) -> Result<HostInfo, ServiceError> {
        let memory = system::memory()
            .map_err(|error| ServiceError::Internal(format!("cannot read the host's memory: {error}")))?;
        let (settings, limits) = (&self.inner.settings, &self.inner.limits);
        Ok(HostInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            hostname: system::hostname(),
            host_ip: self.inner.host_ip.to_string(),
            uptime_seconds: self.inner.started.elapsed().as_secs(),
            vmm: self.inner.vmm.for_new().name().to_owned(),
            accel: self.inner.accel.clone(),
            storage: self.pool()?,
            memory: Memory {
                total_bytes: memory.total,
                available_bytes: memory.available,
            },
            cpu: Cpu {
                count: system::cpu_count(),
                model: system::cpu_model(),
            },
            vms: VmCounts::from_iter(self.inner.vms.statuses()),
            templates: self.templates().await?.len() as u64,
            limits: HostLimits {
                default_disk_size_gib: settings.default_disk_size.as_u64(),
                max_disk_size_gib: limits.max_disk_size_gib,
                default_vcpu_count: settings.default_vcpu_count.min(limits.max_vcpus),
                max_vcpu_count: limits.max_vcpus,
                default_mem_size_mib: settings.default_mem_size_mib,
                min_mem_size_mib: limits.min_mem_mib,
                max_mem_size_mib: limits.max_mem_mib,
            },
        })
    }

    /// Waits for all operations in progress. Does not prevent new ones.
    pub async fn finish(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    pub(crate) async fn persist(&self, id: &str, status: VmStatus, reason: Option<&str>) -> Result<(), ServiceError> {
        let (state, id, reason) = (Arc::clone(&self.inner.state), id.to_owned(), reason.map(str::to_owned));
        blocking(move || state.set_status(&id, status, reason.as_deref())).await
    }

    /// Returns the folder for the sockets, pid file and seed drive of a VM's machine.
    pub(crate) fn run_dir(&self, id: &str) -> PathBuf {
        self.inner.settings.run_dir.join("vms").join(id)
    }

    pub(crate) fn console_dir(&self, id: &str) -> PathBuf {
        self.inner.settings.state_dir.join("console").join(id)
    }

    pub(crate) fn console_log(&self, id: &str) -> PathBuf {
        self.console_dir(id).join("console.log")
    }

    pub(crate) fn describe(&self, record: &Record) -> Vm {
        self.describe_by(record, self.inner.usage.latest().as_deref())
    }

    fn describe_by(&self, record: &Record, accounts: Option<&PoolUsage>) -> Vm {
        let ip = self.inner.host_ip;
        Vm {
            id: record.id.clone(),
            name: record.name.clone(),
            template: record.template.clone(),
            ip: ip.to_string(),
            ssh_port: record.ssh_port,
            ssh: format!("ssh -p {} user@{ip}", record.ssh_port),
            url: None,
            status: record.status,
            status_reason: record.status_reason.clone(),
            created_at: record.created_at.clone(),
            vcpu_count: record.vcpu_count,
            mem_size_mib: record.mem_size_mib,
            disk_size_gib: record.disk_size_gib,
            disk_auto_extend: record.auto_extend,
            disk_iops: record.limits.disk_iops,
            disk_mbps: record.limits.disk_mbps,
            net_mbps: record.limits.net_mbps,
            autostart: record.autostart,
            disk: None,
            storage: accounts.and_then(|accounts| usage::disk_usage(accounts, record)),
        }
    }

    /// Runs an operation in its own task, so that a client that disconnects does not interrupt it.
    pub(crate) async fn detached<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
    ) -> Result<T, ServiceError> {
        // Failures are logged here too: no response is logged if the client has disconnected.
        let service = self.clone();
        let logged = async move {
            operation.await.inspect_err(|error| {
                tracing::debug!(%error, "operation failed");
                service.inner().cleanups.sweep_soon();
            })
        };
        let task = self.inner.tasks.spawn(logged.in_current_span());
        task.await.unwrap_or_else(|error| Err(task_failed(&error)))
    }
}

/// Marks a step at which tests inject an error.
pub(crate) fn fault_point(step: &'static str) -> Result<(), ServiceError> {
    scalebox_fault_points::fault_point(step).map_err(|error| ServiceError::Internal(error.to_string()))
}

/// Runs blocking work on a thread for such work, within the caller's log span.
pub(crate) async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ServiceError>
where
    T: Send + 'static,
    E: Into<ServiceError> + Send + 'static,
{
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => Err(task_failed(&error)),
    }
}

/// Logs a panicked task. The panic message goes only to the log, not to the client.
fn task_failed(error: &tokio::task::JoinError) -> ServiceError {
    tracing::error!(%error, "a task panicked");
    ServiceError::Internal("internal error; see the scaleboxd log for this request id".to_owned())
}

/// Parses a template name. A malformed name cannot belong to a template: 404.
pub(crate) fn template_name(name: &str) -> Result<TemplateName, ServiceError> {
    name.parse()
        .map_err(|_| ServiceError::NotFound(format!("there is no template {}", quoted(name))))
}

/// Parses the id of a record, which is also the id of the VM's disk and machine.
pub(crate) fn vm_id(id: &str) -> Result<VmId, ServiceError> {
    id.parse()
        .map_err(|form| ServiceError::Internal(format!("a recorded VM id, {id:?}, {form}")))
}

pub(crate) fn rfc3339(time: jiff::Timestamp) -> String {
    // Milliseconds are precise enough to sort by and short enough to read.
    format!("{time:.3}")
}
