//! The service behind the API: its parts, and each thing that can be asked of it.
//!
//! What a request does is told in [`create`](crate::create), [`lifecycle`](crate::lifecycle),
//! [`update`](crate::update), [`pool`](crate::pool) and [`snapshots`](crate::snapshots).

use crate::accounts::{self, Ledger};
use crate::cleanup::Cleanups;
use crate::drivers::Drivers;
use crate::error::{ServiceError, quoted};
use crate::events::Events;
use crate::guest_trim;
use crate::host;
use crate::idempotency::{self, Keys};
use crate::metrics::Metrics;
use crate::pool_growth::Growth;
use crate::pool_watch::Held;
use crate::reclaim::Reclaim;
use crate::settings::Settings;
use crate::snapshots::Cloning;
use crate::state::{Record, State};
use crate::template_files::MOST_TRANSFERS;
use crate::vms::Vms;
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

/// The template that every host has and nobody deletes.
pub const BASE_TEMPLATE: &str = "debian-base";

/// The service behind the API. Cloning gives another handle on the same one.
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
    /// Whatever changes a VM, a template or the pool is told here.
    pub(crate) events: Arc<Events>,
    pub(crate) network: Network,
    pub(crate) resolvers: Vec<Ipv4Addr>,
    pub(crate) vmm: Drivers,
    accel: String,
    pub(crate) cmdline: String,
    pub(crate) vms: Vms,
    /// What adds up, for Prometheus.
    pub(crate) metrics: Metrics,
    /// The idempotency keys of creations under way.
    pub(crate) keys: Keys,
    /// The machines that stand still for lack of space.
    pub(crate) held: Held,
    pub(crate) growth: Growth,
    /// Whose the pool's blocks are.
    pub(crate) ledger: Ledger,
    pub(crate) reclaim: Reclaim,
    /// What could not be removed from the host yet.
    pub(crate) cleanups: Cleanups,
    pub(crate) cloning: Cloning,
    started: Instant,
    /// Cancelled when the daemon is told to stop.
    pub(crate) closing: CancellationToken,
    /// Templates on their way to elsewhere or from elsewhere.
    pub(crate) transfers: Arc<Semaphore>,
    /// Operations outlive the connection that asked for them; a shutdown waits for them.
    pub(crate) tasks: TaskTracker,
}

/// The parts a service is made of, each ready.
pub struct Parts {
    /// The settings.
    pub settings: Settings,
    /// The open pool.
    pub pool: Pool,
    /// The open state file.
    pub state: State,
    /// Where what happens is told.
    pub events: Events,
    /// The bridge and what hangs on it.
    pub network: Network,
    /// The resolvers guests are told.
    pub resolvers: Vec<Ipv4Addr>,
    /// The hypervisors.
    pub vmm: Drivers,
    /// How guests' code runs: `kvm` or `tcg`.
    pub accel: String,
    /// What guests' kernels are told.
    pub cmdline: String,
}

impl Service {
    /// Puts the parts together, with an empty table of VMs.
    ///
    /// # Errors
    /// When the host's memory cannot be read.
    pub fn new(parts: Parts) -> std::io::Result<Service> {
        let memory_mib = host::memory()?.total >> 20;
        let inner = Inner {
            host_ip: parts.settings.host_ip.unwrap_or_else(host::default_address),
            limits: parts
                .settings
                .limits(host::cpu_count().min(parts.vmm.for_new().max_vcpus()), memory_mib),
            vms: Vms::new(&parts.settings.net),
            metrics: Metrics::new().map_err(std::io::Error::other)?,
            keys: Keys::default(),
            held: Held::default(),
            growth: Growth::default(),
            ledger: Ledger::default(),
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
            cloning: Cloning::default(),
            started: Instant::now(),
            closing: CancellationToken::new(),
            transfers: Arc::new(Semaphore::new(MOST_TRANSFERS)),
            tasks: TaskTracker::new(),
        };
        Ok(Service { inner: Arc::new(inner) })
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// What a request may ask for on this host.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// Makes a VM. Runs to its end even when the caller stops waiting.
    ///
    /// # Errors
    /// 404 no such template, 400 disk smaller than it, 409 name taken, 507 does not fit, 503 the
    /// host is not ready. Nothing is left then.
    ///
    /// With an idempotency key that has made one, that VM; the second of the pair says so.
    pub async fn create(&self, request: CreateVm) -> Result<(Vm, bool), ServiceError> {
        let service = self.clone();
        self.detached(async move { idempotency::create(&service, request).await })
            .await
    }

    /// Starts a stopped VM.
    ///
    /// # Errors
    /// 404, 409 when it runs or something is under way on it.
    pub async fn start(&self, reference: String) -> Result<Vm, ServiceError> {
        let service = self.clone();
        self.detached(async move { service.start_now(&reference).await }).await
    }

    /// Shuts a VM down: by the guest itself, or after [`STOP_GRACE`] without it.
    ///
    /// # Errors
    /// 404, 409 when it does not run or something is under way on it.
    pub async fn stop(&self, reference: String) -> Result<Vm, ServiceError> {
        let service = self.clone();
        self.detached(async move { service.stop_now(&reference).await }).await
    }

    /// Changes a VM. Its disk grows, and the file system on it: live if it runs, else offline.
    /// Waits for what is under way on the VM, so that of several requests at once the largest size
    /// is what is left.
    ///
    /// # Errors
    /// 404, 400 when the disk would become smaller, 507 when it does not fit; nothing is changed
    /// then.
    pub async fn update(&self, reference: String, request: UpdateVm) -> Result<Vm, ServiceError> {
        let service = self.clone();
        self.detached(async move { service.update_now(&reference, request).await })
            .await
    }

    /// Has a guest give back what it deleted.
    ///
    /// # Errors
    /// 404, 409 when it does not run or its agent does not answer.
    pub async fn trim_vm(&self, reference: String) -> Result<Trimmed, ServiceError> {
        let service = self.clone();
        self.detached(async move { guest_trim::on_demand(&service, &reference).await })
            .await
    }

    /// Deletes a VM, running or not, with its disk. One that is still being made is called off, by
    /// its name, and undone.
    ///
    /// # Errors
    /// 404, 409 when something is under way on it.
    pub async fn delete(&self, reference: String) -> Result<(), ServiceError> {
        let service = self.clone();
        self.detached(async move { service.delete_now(&reference).await }).await
    }

    /// All VMs, oldest first.
    pub fn list(&self) -> Vec<Vm> {
        let accounts = self.inner.ledger.latest();
        let records = self.inner.vms.all();
        records
            .iter()
            .map(|record| self.describe_by(record, accounts.as_deref()))
            .collect()
    }

    /// One VM by id or name.
    ///
    /// # Errors
    /// 404.
    pub fn get(&self, reference: &str) -> Result<Vm, ServiceError> {
        self.inner.vms.find(reference).map(|record| self.describe(&record))
    }

    /// All templates.
    ///
    /// # Errors
    /// 500 when the pool cannot be read.
    pub async fn templates(&self) -> Result<Vec<Template>, ServiceError> {
        let pool = Arc::clone(&self.inner.pool);
        let templates = blocking(move || pool.templates()).await?;
        Ok(templates
            .into_iter()
            .map(|template| self.describe_template(template))
            .collect())
    }

    /// One template.
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
        let accounts = self.inner.ledger.latest();
        Template {
            storage: accounts
                .as_deref()
                .and_then(|accounts| accounts::template_usage(accounts, &template)),
            size_bytes: template.size.as_u64(),
            used_bytes: template.used.as_u64(),
            created_at: rfc3339(template.created_at.try_into().unwrap_or(jiff::Timestamp::UNIX_EPOCH)),
            used_by: self.inner.vms.made_from(template.name.as_str()),
            protected: template.name.as_str() == BASE_TEMPLATE,
            name: template.name.to_string(),
        }
    }

    /// Deletes a template. VMs made from it are not touched.
    ///
    /// # Errors
    /// 403 for [`BASE_TEMPLATE`], 404, 409 while a VM is being made from it.
    pub async fn delete_template(&self, name: String) -> Result<(), ServiceError> {
        if name == BASE_TEMPLATE {
            return Err(ServiceError::Forbidden(format!(
                "the template {BASE_TEMPLATE} is protected: it cannot be deleted"
            )));
        }
        let parsed = template_name(&name)?;
        self.inner.cloning.require_idle(&name)?;
        let pool = Arc::clone(&self.inner.pool);
        blocking(move || pool.delete_template(&parsed)).await?;
        self.inner.cleanups.sweep_soon();
        tracing::info!(template = name, "template deleted");
        self.inner
            .events
            .publish(EventKind::TemplateDeleted, None, json!({ "template": name }));
        Ok(())
    }

    /// The host and what is on it.
    ///
    /// # Errors
    /// 500 when the kernel does not tell.
    pub async fn info(&self) -> Result<HostInfo, ServiceError> {
        let memory = host::memory()
            .map_err(|error| ServiceError::Internal(format!("cannot read the host's memory: {error}")))?;
        let (settings, limits) = (&self.inner.settings, &self.inner.limits);
        Ok(HostInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            hostname: host::hostname(),
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
                count: host::cpu_count(),
                model: host::cpu_model(),
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

    /// Waits for every operation under way; no new one is begun meanwhile.
    pub async fn finish(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    pub(crate) async fn persist(&self, id: &str, status: VmStatus, reason: Option<&str>) -> Result<(), ServiceError> {
        let (state, id, reason) = (Arc::clone(&self.inner.state), id.to_owned(), reason.map(str::to_owned));
        blocking(move || state.set_status(&id, status, reason.as_deref())).await
    }

    /// Sockets, pid file and seed drive of a machine.
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
        self.describe_by(record, self.inner.ledger.latest().as_deref())
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
            storage: accounts.and_then(|accounts| accounts::disk_usage(accounts, record)),
        }
    }

    /// Runs an operation in a task of its own: a client that hangs up does not leave it half-done.
    pub(crate) async fn detached<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
    ) -> Result<T, ServiceError> {
        // Its own failure is logged here too: a client that hung up takes no answer that would be
        // logged.
        let service = self.clone();
        let logged = async move {
            operation.await.inspect_err(|error| {
                tracing::debug!(%error, "operation failed");
                service.inner().cleanups.sweep_soon();
            })
        };
        let task = self.inner.tasks.spawn(logged.in_current_span());
        task.await.unwrap_or_else(|error| Err(did_not_end(&error)))
    }
}

/// Marks a step of an operation whose successor can fail; tests let it fail.
pub(crate) fn fault_point(step: &'static str) -> Result<(), ServiceError> {
    scalebox_fault_points::fault_point(step).map_err(|error| ServiceError::Internal(error.to_string()))
}

/// Runs what blocks on a thread that may, within the caller's log span.
pub(crate) async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ServiceError>
where
    T: Send + 'static,
    E: Into<ServiceError> + Send + 'static,
{
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => Err(did_not_end(&error)),
    }
}

/// A task that panicked: what it said is for the log alone.
fn did_not_end(error: &tokio::task::JoinError) -> ServiceError {
    tracing::error!(%error, "a task did not end");
    ServiceError::Internal("an error inside scaleboxd; its log tells more under the request's id".to_owned())
}

/// What has no name's form is no template either.
pub(crate) fn template_name(name: &str) -> Result<TemplateName, ServiceError> {
    name.parse()
        .map_err(|_| ServiceError::NotFound(format!("there is no template {}", quoted(name))))
}

pub(crate) fn vm_id(id: &str) -> Result<VmId, ServiceError> {
    id.parse()
        .map_err(|form| ServiceError::Internal(format!("a recorded VM id, {id:?}, {form}")))
}

pub(crate) fn rfc3339(time: jiff::Timestamp) -> String {
    // Whole milliseconds are enough to sort by, and short enough to read.
    format!("{time:.3}")
}
