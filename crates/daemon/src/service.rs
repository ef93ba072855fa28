//! The VM lifecycle: what each request does, in order, and how it is taken back.
//!
//! `create` is: claim a name, an address and a port → admit → clone the disk → (seed drive → tap and forward → launch) → record. Nothing is
//! visible before the record, and a client is told only after it. A crash at any point leaves either a recorded VM or leftovers that
//! [`recovery`](crate::recovery) removes at the next start. Creations run side by side; the only lock they share is held for microseconds.

use crate::accounts::{self, Ledger};
use crate::auto_extend;
use crate::error::ServiceError;
use crate::events::Events;
use crate::guest_trim;
use crate::host;
use crate::idempotency::{self, Keys, Once};
use crate::metrics::Metrics;
use crate::pool_growth::Growth;
use crate::pool_watch::{self, Held};
use crate::random::random_hex;
use crate::reboot_loop;
use crate::reclaim::{self, Reclaim};
use crate::resize;
use crate::settings::Settings;
use crate::snapshots::Cloning;
use crate::state::{Record, State, VmLimits};
use crate::undo::Steps;
use crate::vms::{Claim, Operation, Vms};
use scalebox_client::{
    Cpu, CreateVm, Disk, EventKind, HostInfo, HostLimits, Limits, Memory, PoolInfo, Template, Trimmed, UpdateVm, Vm,
    VmCounts, VmStatus,
};
use scalebox_crash_points::crash_point;
use scalebox_guest::SeedDrive;
use scalebox_net::{Endpoint, Lease, Mbps, Network};
use scalebox_storage::{Accounts, Bytes, Gib, Name, Pool, Reservation, StorageError};
use scalebox_vmm::{DiskLimits, ExitReason, Machine, MachineId, MachineSpec, Nic, RunAs, Vmm, console_tail};
use serde_json::{Value, json};
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// How long a guest may take to shut itself down before it is killed. An emulated Debian takes about eight seconds.
const STOP_GRACE: Duration = Duration::from_secs(60);

/// How much of the console goes into the reason of a failure: a few lines.
const LAST_WORDS: Bytes = Bytes::new(512);

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
    pub(crate) vmm: Arc<dyn Vmm>,
    accel: String,
    cmdline: String,
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
    pub(crate) cloning: Cloning,
    started: Instant,
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
    /// The hypervisor driver.
    pub vmm: Arc<dyn Vmm>,
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
            limits: parts.settings.limits(host::cpu_count(), memory_mib),
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
            cloning: Cloning::default(),
            started: Instant::now(),
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
    /// 404 no such template, 400 disk smaller than it, 409 name taken, 507 does not fit, 503 the host is not ready. Nothing is left then.
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

    /// Changes a VM. Its disk grows, and the file system on it: live if it runs, else offline. Waits for what is under way on the VM, so that
    /// of several requests at once the largest size is what is left.
    ///
    /// # Errors
    /// 404, 400 when the disk would become smaller, 507 when it does not fit; nothing is changed then.
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

    /// Deletes a VM, running or not, with its disk. One that is still being made is called off, by its name, and undone.
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
        let missing = || ServiceError::NotFound(format!("there is no template {name:?}"));
        let parsed: Name = name.parse().map_err(|_| missing())?;
        self.inner.cloning.require_idle(&name)?;
        let pool = Arc::clone(&self.inner.pool);
        blocking(move || pool.delete_template(&parsed)).await?;
        tracing::info!(template = name, "template deleted");
        self.inner
            .events
            .publish(EventKind::TemplateDeleted, None, json!({ "template": name }));
        Ok(())
    }

    /// The pool's numbers.
    ///
    /// # Errors
    /// 500 when the kernel does not tell.
    pub fn pool(&self) -> Result<PoolInfo, ServiceError> {
        let pool = &self.inner.pool;
        let space = pool.space()?;
        let promises = pool.promises();
        let accounts = self.inner.ledger.latest();
        let measured = |sum: fn(&Accounts) -> Bytes| accounts.as_deref().map(|accounts| sum(accounts).as_u64());
        Ok(PoolInfo {
            path: pool.path().display().to_string(),
            file_system: pool.file_system().to_owned(),
            image: pool.image().map(|image| image.display().to_string()),
            device: pool.device().display().to_string(),
            capacity_bytes: space.capacity.as_u64(),
            free_bytes: space.free.as_u64(),
            used_bytes: space.used.as_u64(),
            committed_bytes: promises.committed.as_u64(),
            commitment_limit_bytes: pool.commitment_limit(space.capacity).as_u64(),
            overcommit_ratio: pool.bounds().overcommit_ratio,
            reserved_bytes: promises.reserved.as_u64(),
            buffer_bytes: Bytes::from(pool.bounds().buffer).as_u64(),
            pool_free_bytes: space.pool_free.as_u64(),
            host_free_bytes: space.host_free.map(Bytes::as_u64),
            unallocated_bytes: space.unallocated.as_u64(),
            metadata_bytes: space.metadata_total.as_u64(),
            metadata_used_bytes: space.metadata_used.as_u64(),
            vms_exclusive_bytes: measured(|accounts| accounts.disks_exclusive),
            templates_exclusive_bytes: measured(|accounts| accounts.templates_exclusive),
            shared_bytes: measured(|accounts| accounts.shared),
            other_bytes: measured(|accounts| accounts.other),
            measured_at: accounts
                .as_deref()
                .map(|accounts| accounts::rfc3339(accounts.measured_at)),
            days_left: self.inner.ledger.days_left(space.free),
        })
    }

    /// Grows the pool while it is in use, to `size` or by the 80 % rule.
    ///
    /// # Errors
    /// 400 when that is no growth or too much, 409 while its size is being changed already.
    pub async fn grow_pool(&self, size: Option<Gib>) -> Result<PoolInfo, ServiceError> {
        self.change_pool(EventKind::PoolGrown, move |pool| pool.grow(size))
            .await
    }

    /// Shrinks the pool while it is in use.
    ///
    /// # Errors
    /// 400 when it is no shrinking, or what is used, promised or kept free would not fit; 409 while its size is being changed already.
    pub async fn shrink_pool(&self, size: Gib) -> Result<PoolInfo, ServiceError> {
        self.inner.reclaim.settled().await;
        self.change_pool(EventKind::PoolShrunk, move |pool| pool.shrink(size))
            .await
    }

    async fn change_pool(
        &self,
        kind: EventKind,
        change: impl FnOnce(&Pool) -> Result<(), StorageError> + Send + 'static,
    ) -> Result<PoolInfo, ServiceError> {
        let service = self.clone();
        self.detached(async move {
            let pool = Arc::clone(&service.inner.pool);
            blocking(move || change(&pool)).await?;
            let pool = service.pool()?;
            tracing::info!(
                capacity_bytes = pool.capacity_bytes,
                free_bytes = pool.free_bytes,
                "the pool has another size"
            );
            service.inner.events.publish(
                kind,
                None,
                json!({ "capacity_bytes": pool.capacity_bytes, "free_bytes": pool.free_bytes }),
            );
            Ok(pool)
        })
        .await
    }

    /// Gives the pool's free blocks back to the host disk.
    ///
    /// # Errors
    /// 500 when the host disk takes none.
    pub async fn trim_pool(&self) -> Result<Trimmed, ServiceError> {
        let pool = Arc::clone(&self.inner.pool);
        self.detached(async move {
            let trimmed = blocking(move || pool.trim()).await?;
            Ok(Trimmed {
                trimmed_bytes: trimmed.as_u64(),
            })
        })
        .await
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
            vmm: self.inner.vmm.name().to_owned(),
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

    /// Shuts every machine down and removes the network; VMs and their disks stay.
    ///
    /// # Errors
    /// The first machine that could not be ended, after all were tried.
    pub async fn take_all_down(&self) -> Result<(), ServiceError> {
        let running = self
            .inner
            .vms
            .all()
            .into_iter()
            .filter(|vm| matches!(vm.status, VmStatus::Running | VmStatus::Paused));
        let stops: Vec<_> = running
            .map(|vm| {
                let service = self.clone();
                self.inner.tasks.spawn(async move { service.stop_now(&vm.id).await })
            })
            .collect();
        let mut first_error = None;
        for stop in stops {
            let stopped = stop
                .await
                .unwrap_or_else(|error| Err(ServiceError::Internal(error.to_string())));
            first_error = first_error.or(stopped.err());
        }
        match first_error {
            Some(error) => Err(error),
            None => Ok(self.inner.network.teardown().await?),
        }
    }

    /// Waits for every operation under way; no new one is begun meanwhile.
    pub async fn finish(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    pub(crate) async fn create_now(&self, request: CreateVm) -> Result<Vm, ServiceError> {
        let inner = self.inner();
        let claim = inner.vms.claim(request.name.as_ref().map(|name| name.as_str()))?;
        let in_use = inner.cloning.hold(request.template.as_str());
        let request = Arc::new(request);
        let allot = || {
            let (service, request, name, lease) = (self.clone(), Arc::clone(&request), claim.name.clone(), claim.lease);
            // In one go: a change of threads costs as much as the clone.
            blocking(move || service.allot(&request, name, lease))
        };
        let (record, reservation) = self.until_admitted(allot).await?;

        drop(in_use);
        crash_point("create: disk durable");
        let disk = disk_name(&record)?;
        let mut steps = Steps::new();
        let pool = Arc::clone(&inner.pool);
        steps.taken("clone the disk", async move {
            blocking(move || pool.delete_disk(&disk)).await
        });
        let console = self.console_dir(&record.id);
        steps.taken("make the console's folder", async move {
            blocking(move || remove_dir(&console)).await
        });

        let once = Once::of(&request);
        match self.complete(&record, &claim, once, &mut steps).await {
            Ok(machine) => {
                reservation.commit();
                claim.publish(record.clone(), machine.clone());
                self.tell_created(&record);
                if let Some(machine) = machine {
                    self.watch(record.id.clone(), machine);
                }
                tracing::info!(
                    vm = record.id,
                    name = record.name,
                    status = record.status.as_str(),
                    "created"
                );
                Ok(self.describe(&record))
            }
            Err(error) => {
                steps.undo_all().await;
                Err(error)
            }
        }
    }

    fn tell_created(&self, record: &Record) {
        let events = &self.inner.events;
        let details = json!({
            "template": record.template, "status": record.status,
            "disk_size_gib": record.disk_size_gib, "ssh_port": record.ssh_port,
        });
        events.publish(EventKind::Created, Some(record), details);
        if record.status == VmStatus::Running {
            events.publish(EventKind::Started, Some(record), Value::Null);
        }
    }

    /// Admits what was asked for and makes its disk. Blocks; on a failure nothing is left.
    fn allot(&self, request: &CreateVm, name: String, lease: Lease) -> Result<(Record, Reservation), ServiceError> {
        let inner = self.inner();
        let template = inner.pool.template(&template_name(request.template.as_str())?)?;
        let asked = request.disk_size_gib.map(Gib::new);
        let disk_size = Pool::disk_size(&template, asked, inner.settings.default_disk_size)?;
        if disk_size > inner.settings.max_disk_size {
            let (size, max) = (disk_size, inner.settings.max_disk_size);
            return Err(ServiceError::Invalid(format!(
                "the template {} needs a disk of {size} GiB, and MAX_DISK_SIZE_GIB is {max}",
                template.name
            )));
        }
        if let Some(extend) = request.disk_auto_extend {
            auto_extend::check(extend, disk_size)?;
        }
        let reservation = inner.pool.admit(disk_size.bytes())?;

        let record = Record {
            id: new_id()?,
            name,
            template: template.name.to_string(),
            ssh_public_key: request.ssh_public_key.as_str().to_owned(),
            created_at: rfc3339(jiff::Timestamp::now()),
            vcpu_count: request
                .vcpu_count
                .unwrap_or(inner.settings.default_vcpu_count.min(inner.limits.max_vcpus)),
            mem_size_mib: request.mem_size_mib.unwrap_or(inner.settings.default_mem_size_mib),
            disk_size_gib: disk_size.as_u64(),
            auto_extend: request.disk_auto_extend,
            limits: VmLimits {
                disk_iops: request.disk_iops,
                disk_mbps: request.disk_mbps,
                net_mbps: request.net_mbps,
            },
            autostart: request.autostart,
            guest_ip: lease.guest_ip,
            ssh_port: lease.ssh_port,
            status: if request.start {
                VmStatus::Running
            } else {
                VmStatus::Stopped
            },
            status_reason: None,
        };
        tracing::info!(
            vm = record.id,
            name = record.name,
            template = record.template,
            disk_size_gib = record.disk_size_gib,
            "admitted"
        );

        crash_point("create: admitted");
        inner
            .pool
            .create_disk(&disk_name(&record)?, &template.name, &reservation)?;
        Ok((record, reservation))
    }

    /// What comes after the disk: the machine, if it is to run, and the record.
    async fn complete(
        &self,
        record: &Record,
        claim: &Claim,
        once: Option<Once>,
        steps: &mut Steps,
    ) -> Result<Option<Arc<dyn Machine>>, ServiceError> {
        claim.still_wanted()?;
        if let Some(once) = once {
            let (state, id, undo) = (Arc::clone(&self.inner.state), record.id.clone(), once.clone());
            blocking(move || state.remember(&once, &id)).await?;
            let state = Arc::clone(&self.inner.state);
            steps.taken("write the request's key down", async move {
                blocking(move || state.forget(&undo)).await
            });
        }
        let machine = match record.status {
            VmStatus::Running => Some(self.bring_up(record, steps).await?),
            _ => None,
        };
        claim.still_wanted()?;
        let (state, row) = (Arc::clone(&self.inner.state), record.clone());
        blocking(move || state.insert(&row)).await?;
        crash_point("create: recorded");
        Ok(machine)
    }

    pub(crate) async fn admit(&self, size: Bytes) -> Result<Reservation, ServiceError> {
        let once = || {
            let pool = Arc::clone(&self.inner.pool);
            blocking(move || pool.admit(size))
        };
        self.until_admitted(once).await
    }

    /// Asks again while deleted disks are on their way back, and once more when the pool may grow by itself.
    async fn until_admitted<T, F>(&self, ask: impl Fn() -> F) -> Result<T, ServiceError>
    where
        F: Future<Output = Result<T, ServiceError>>,
    {
        let answer = self.inner.reclaim.ask_again(is_refusal, &ask).await;
        if answer.as_ref().is_err_and(is_refusal) && self.low_water().is_some() {
            // Asked again also when another request has made it grow meanwhile.
            self.extend_pool().await;
            return ask().await;
        }
        answer
    }

    /// Seed drive, tap and forward, machine. The undos of the steps taken stand in `steps`.
    async fn bring_up(&self, record: &Record, steps: &mut Steps) -> Result<Arc<dyn Machine>, ServiceError> {
        let inner = self.inner();
        let endpoint = endpoint(record)?;
        let run_dir = self.run_dir(&record.id);
        let seed = run_dir.join("seed.img");

        let drive = SeedDrive {
            instance_id: record.id.clone(),
            hostname: record.name.clone(),
            ssh_public_key: record.ssh_public_key.clone(),
            mac: endpoint.mac().to_string(),
            address: ipnet::Ipv4Net::new(record.guest_ip, inner.settings.net.subnet().prefix_len())
                .map_err(|error| ServiceError::Internal(error.to_string()))?,
            gateway: inner.settings.net.gateway(),
            dns: inner.resolvers.clone(),
        };
        {
            let (run_dir, console, seed) = (run_dir.clone(), self.console_dir(&record.id), seed.clone());
            blocking(move || {
                // The console's log stays when the machine ends: it tells why.
                make_private_dir(&console)?;
                make_private_dir(&run_dir)?;
                drive
                    .write(&seed)
                    .map_err(|error| ServiceError::Internal(error.to_string()))
            })
            .await?;
        }
        let undo_dir = run_dir.clone();
        crash_point("start: seed drive written");
        steps.taken("write the seed drive", async move {
            blocking(move || remove_dir(&undo_dir)).await
        });

        inner.network.attach(&endpoint).await?;
        crash_point("start: tap and forward there");
        let (network, undo_endpoint) = (inner.network.clone(), endpoint.clone());
        steps.taken(
            "attach to the network",
            async move { network.detach(&undo_endpoint).await },
        );

        let machine = inner.vmm.launch(&self.spec(record, &endpoint, run_dir, seed)?).await?;
        crash_point("start: machine launched");
        let undo_machine = Arc::clone(&machine);
        steps.taken("launch the machine", async move { undo_machine.kill().await.map(drop) });
        tracing::info!(
            vm = record.id,
            pid = machine.pid(),
            tap = endpoint.tap(),
            ssh_port = record.ssh_port,
            "launched"
        );
        Ok(machine)
    }

    fn spec(
        &self,
        record: &Record,
        endpoint: &Endpoint,
        run_dir: PathBuf,
        seed: PathBuf,
    ) -> Result<MachineSpec, ServiceError> {
        let kernel_dir = self.inner.pool.kernel_dir();
        let (kernel, initrd) = (kernel_dir.join("vmlinuz"), kernel_dir.join("initrd.img"));
        if !kernel.is_file() || !initrd.is_file() {
            return Err(ServiceError::Unavailable(format!(
                "this host has no kernel for its guests yet: run `scaleboxd template build {BASE_TEMPLATE}` on it"
            )));
        }
        Ok(MachineSpec {
            id: machine_id(&record.id)?,
            vcpus: record.vcpu_count,
            memory_mib: record.mem_size_mib,
            kernel,
            initrd: Some(initrd),
            cmdline: self.inner.cmdline.clone(),
            root: self.inner.pool.disk_location(&disk_name(record)?),
            root_limits: disk_limits(record.limits),
            seed,
            nic: Nic {
                tap: endpoint.tap().to_owned(),
                mac: endpoint.mac().to_string(),
            },
            console_log: self.console_log(&record.id),
            run_dir,
            run_as: Some(vmm_user(record)),
        })
    }

    async fn start_now(&self, reference: &str) -> Result<Vm, ServiceError> {
        let operation = self.inner.vms.begin(reference, "being started")?;
        let record = &operation.record;
        if matches!(record.status, VmStatus::Running | VmStatus::Paused) {
            return Err(ServiceError::Conflict(format!(
                "VM {} is {} already",
                record.name, record.status
            )));
        }
        self.boot(record).await
    }

    /// Starts the machine of a VM that has none.
    pub(crate) async fn boot(&self, record: &Record) -> Result<Vm, ServiceError> {
        let (pool, disk) = (Arc::clone(&self.inner.pool), disk_name(record)?);
        if blocking(move || pool.provisioned(&disk)).await.is_err() {
            return Err(ServiceError::Conflict(format!(
                "VM {} cannot be started: its disk is gone from the pool; delete it",
                record.name
            )));
        }
        self.put_down(&record.id).await?;
        let mut steps = Steps::new();
        let started = async {
            let machine = self.bring_up(record, &mut steps).await?;
            self.persist(&record.id, VmStatus::Running, None).await?;
            crash_point("start: recorded");
            Ok(machine)
        };
        match started.await {
            Ok(machine) => {
                self.inner
                    .vms
                    .set(&record.id, VmStatus::Running, None, Some(Arc::clone(&machine)));
                self.watch(record.id.clone(), machine);
                tracing::info!(vm = record.id, name = record.name, "started");
                self.inner.events.publish(EventKind::Started, Some(record), Value::Null);
                self.get(&record.id)
            }
            Err(error) => {
                steps.undo_all().await;
                Err(error)
            }
        }
    }

    async fn stop_now(&self, reference: &str) -> Result<Vm, ServiceError> {
        let operation = self.inner.vms.begin(reference, "being stopped")?;
        let record = &operation.record;
        let Some(machine) = &operation.machine else {
            return Err(ServiceError::Conflict(format!(
                "VM {} is {} already",
                record.name, record.status
            )));
        };
        self.shut_down(record, machine).await
    }

    /// Ends a VM's machine as the guest would have it, and notes that.
    pub(crate) async fn shut_down(&self, record: &Record, machine: &Arc<dyn Machine>) -> Result<Vm, ServiceError> {
        let outcome = machine.stop(STOP_GRACE).await?;
        crash_point("stop: machine ended");
        self.inner.vms.set(&record.id, VmStatus::Stopped, None, None);
        self.take_down(record).await?;
        crash_point("stop: tap and forward gone");
        self.persist(&record.id, VmStatus::Stopped, None).await?;
        crash_point("stop: recorded");
        tracing::info!(vm = record.id, name = record.name, ?outcome, "stopped");
        self.inner
            .events
            .publish(EventKind::Stopped, Some(record), json!({ "by": "request" }));
        self.get(&record.id)
    }

    async fn update_now(&self, reference: &str, request: UpdateVm) -> Result<Vm, ServiceError> {
        let operation = self.inner.vms.begin_when_idle(reference, "being changed").await?;
        let record = &operation.record;
        let current = Gib::new(record.disk_size_gib);
        let size = request.disk_size_gib.map_or(current, Gib::new);
        if size < current {
            return Err(ServiceError::Invalid(format!(
                "disk_size_gib must be at least {current}: the disk of {} is {current} GiB large, and disks do not shrink",
                record.name
            )));
        }
        if let Some(Some(extend)) = request.disk_auto_extend {
            auto_extend::check(extend, size)?;
        }
        // First what can be refused.
        let disk = if size > current {
            let reservation = self.admit(size.bytes() - current.bytes()).await?;
            let before = match &operation.machine {
                Some(machine) => resize::guest_total(machine).await,
                None => None,
            };
            self.enlarge(&operation, reservation, json!({ "by": "request" }))
                .await?;
            Some(match &operation.machine {
                Some(machine) => resize::confirm(machine, before, size.bytes() - current.bytes()).await,
                None => Disk {
                    confirmed: true,
                    guest_total_bytes: None,
                    note: None,
                },
            })
        } else {
            None
        };
        self.keep(&operation, &request).await?;
        Ok(Vm {
            disk,
            ..self.get(&record.id)?
        })
    }

    /// Carries out what of a change is not the disk's size: on the machine if there is one, in the state, in memory.
    async fn keep(&self, operation: &Operation, request: &UpdateVm) -> Result<(), ServiceError> {
        let Operation { record, machine, .. } = operation;
        let limits = VmLimits {
            disk_iops: request.disk_iops.unwrap_or(record.limits.disk_iops),
            disk_mbps: request.disk_mbps.unwrap_or(record.limits.disk_mbps),
            net_mbps: request.net_mbps.unwrap_or(record.limits.net_mbps),
        };
        let extend = request.disk_auto_extend.unwrap_or(record.auto_extend);
        let autostart = request.autostart.unwrap_or(record.autostart);
        if (limits, extend, autostart) == (record.limits, record.auto_extend, record.autostart) {
            return Ok(());
        }
        let (state, id) = (Arc::clone(&self.inner.state), record.id.clone());
        // What runs is changed last: should that fail or a crash come before it, the next start does it from the state.
        blocking(move || state.set_keeping(&id, extend, limits, autostart)).await?;
        self.inner.vms.change(&record.id, |record| {
            (record.limits, record.auto_extend, record.autostart) = (limits, extend, autostart);
        });
        tracing::info!(
            vm = record.id,
            name = record.name,
            auto_extend = ?extend,
            ?limits,
            autostart,
            "changed"
        );
        if let Some(machine) = machine
            && limits != record.limits
        {
            machine.limit_disk(disk_limits(limits)).await?;
            let limited = Record {
                limits,
                ..record.clone()
            };
            self.inner.network.attach(&endpoint(&limited)?).await?;
        }
        Ok(())
    }

    /// Grows a VM's disk by what was admitted, and tells of it: `cause` says by whom it was asked for.
    pub(crate) async fn enlarge(
        &self,
        operation: &Operation,
        admitted: Reservation,
        cause: Value,
    ) -> Result<(), ServiceError> {
        let Operation { record, machine, .. } = operation;
        let current = Gib::new(record.disk_size_gib);
        let size = (current.bytes() + admitted.size()).floor_gib();
        if machine.is_none() {
            // Grown offline, the disk gives way to a grown clone: nothing may have it open, not even a machine that hangs.
            self.put_down(&record.id).await?;
        }
        // The intent first: a crash from here on is carried through by the next start.
        self.persist_disk_size(&record.id, size).await?;
        crash_point("grow: size recorded");
        if let Err(error) = self.grow(record, machine.as_ref(), size).await {
            self.persist_disk_size(&record.id, current).await?;
            return Err(error);
        }
        crash_point("grow: disk grown");
        admitted.commit();
        let (from, to) = (current.as_u64(), size.as_u64());
        self.inner.vms.change(&record.id, |record| record.disk_size_gib = to);
        tracing::info!(vm = record.id, name = record.name, from, to, %cause, "disk grown");
        let mut details = cause;
        details["from_gib"] = from.into();
        details["to_gib"] = to.into();
        self.inner.events.publish(EventKind::Grown, Some(record), details);
        Ok(())
    }

    /// Makes the disk as large as the state says: through the machine if there is one, else offline with its file system.
    pub(crate) async fn grow(
        &self,
        record: &Record,
        machine: Option<&Arc<dyn Machine>>,
        size: Gib,
    ) -> Result<(), ServiceError> {
        match machine {
            Some(machine) => Ok(machine.resize_root(size.bytes()).await?),
            None => {
                let (pool, disk) = (Arc::clone(&self.inner.pool), disk_name(record)?);
                blocking(move || pool.grow_disk(&disk, size.bytes())).await
            }
        }
    }

    pub(crate) async fn persist_disk_size(&self, id: &str, size: Gib) -> Result<(), ServiceError> {
        let (state, id) = (Arc::clone(&self.inner.state), id.to_owned());
        blocking(move || state.set_disk_size(&id, size.as_u64())).await
    }

    async fn delete_now(&self, reference: &str) -> Result<(), ServiceError> {
        let called_off = self.inner.vms.call_off(reference).await;
        let operation = match self.inner.vms.begin(reference, "being deleted") {
            Err(ServiceError::NotFound(_)) if called_off => return Ok(()),
            other => other?,
        };
        let Operation { record, machine, .. } = &operation;
        match machine {
            Some(machine) => drop(machine.kill().await?),
            // One that does not answer is no machine of ours, and still has to end.
            None => drop(self.put_down(&record.id).await?),
        }
        crash_point("delete: machine ended");
        self.take_down(record).await?;
        crash_point("delete: tap and forward gone");
        // The record goes before the disk: a disk without a record is removed at the next start, a record without a disk is a loss.
        let (state, id) = (Arc::clone(&self.inner.state), record.id.clone());
        blocking(move || state.delete(&id)).await?;
        crash_point("delete: record gone");
        // From here on it is gone; what cannot be removed now is removed at the next start.
        self.inner.vms.remove(&record.id);
        let (pool, disk) = (Arc::clone(&self.inner.pool), disk_name(record)?);
        let console = self.console_dir(&record.id);
        let unlinked = blocking(move || pool.unlink_disk(&disk)).await;
        let removed = blocking(move || remove_dir(&console)).await;
        if let Err(error) = removed {
            tracing::warn!(vm = record.id, %error, "deleted, but its console's log is left; the next start removes it");
        }
        match unlinked {
            Ok(disk) => reclaim::give_back(self, record.id.clone(), disk, Gib::new(record.disk_size_gib)),
            // Its blocks are not free, so they stay promised.
            Err(error) => {
                tracing::warn!(vm = record.id, %error, "deleted, but its disk is left; the next start removes it");
            }
        }
        tracing::info!(vm = record.id, name = record.name, "deleted");
        self.inner.events.publish(EventKind::Deleted, Some(record), Value::Null);
        Ok(())
    }

    /// Ends whatever there is of a VM's machine without asking it, and removes its folder. Returns whether a process was ended.
    pub(crate) async fn put_down(&self, id: &str) -> Result<bool, ServiceError> {
        let run_dir = self.run_dir(id);
        let ended = self.inner.vmm.put_down(&machine_id(id)?, &run_dir).await?;
        blocking(move || remove_dir(&run_dir)).await?;
        Ok(ended)
    }

    /// Tap, forward, seed drive and sockets of a machine that is gone.
    pub(crate) async fn take_down(&self, record: &Record) -> Result<(), ServiceError> {
        self.inner.network.detach(&endpoint(record)?).await?;
        let run_dir = self.run_dir(&record.id);
        blocking(move || remove_dir(&run_dir)).await
    }

    /// Follows a machine to its end, and notes what came of the VM.
    pub(crate) fn watch(&self, id: String, machine: Arc<dyn Machine>) {
        let service = self.clone();
        // Not in `tasks`: a shutdown does not wait for machines.
        tokio::spawn(async move {
            let (reason, failure) = tokio::select! {
                reason = machine.exited() => (reason, None),
                failure = reboot_loop::seen(&machine) => {
                    if let Err(error) = machine.kill().await {
                        tracing::warn!(vm = id, %error, "a guest that cannot boot was not ended");
                    }
                    (machine.exited().await, Some(failure))
                }
                never = pool_watch::follow(&service, &id, &machine) => match never {},
            };
            service.note_exit(&id, &machine, reason, failure).await;
        });
    }

    /// Notes that a machine has ended, which is a failure of the VM if there is one to tell.
    async fn note_exit(&self, id: &str, machine: &Arc<dyn Machine>, reason: ExitReason, failure: Option<String>) {
        let Ok(operation) = self.inner.vms.begin_when_idle(id, "ending").await else {
            return;
        };
        // An operation that ended the machine itself has noted what came of it.
        if !operation
            .machine
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, machine))
        {
            return;
        }
        let failure = match reason {
            ExitReason::GuestShutdown => failure,
            other => Some(failure.unwrap_or_else(|| other.to_string())),
        };
        let (status, reason) = match failure {
            None => (VmStatus::Stopped, None),
            Some(failure) => (VmStatus::Failed, Some(failure + &self.last_words(id).await)),
        };
        tracing::info!(vm = id, status = status.as_str(), reason, "machine ended");
        let noted = async {
            self.take_down(&operation.record).await?;
            self.persist(id, status, reason.as_deref()).await
        };
        let noted = noted.await;
        // Seen when it can be started again.
        self.inner.vms.set(id, status, reason.clone(), None);
        let (kind, details) = match &reason {
            None => (EventKind::Stopped, json!({ "by": "guest" })),
            Some(reason) => (EventKind::Failed, json!({ "reason": reason })),
        };
        self.inner.events.publish(kind, Some(&operation.record), details);
        if let Err(error) = noted {
            tracing::error!(vm = id, %error, "the end of a machine could not be noted; the next start puts it right");
        }
    }

    /// What the console said last, to go behind the reason of a failure; nothing when it said nothing.
    async fn last_words(&self, id: &str) -> String {
        let log = self.console_log(id);
        let read =
            blocking(move || console_tail(&log, LAST_WORDS).map_err(|error| ServiceError::Internal(error.to_string())));
        match read.await {
            Ok(said) if !said.trim().is_empty() => format!("; its console's last words: {}", said.trim()),
            Ok(_) => String::new(),
            Err(error) => {
                tracing::warn!(vm = id, %error, "the console's log cannot be read");
                String::new()
            }
        }
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

    fn describe(&self, record: &Record) -> Vm {
        self.describe_by(record, self.inner.ledger.latest().as_deref())
    }

    fn describe_by(&self, record: &Record, accounts: Option<&Accounts>) -> Vm {
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
        // Its own failure is logged here too: a client that hung up takes no answer that would be logged.
        let logged = async move {
            operation
                .await
                .inspect_err(|error| tracing::debug!(%error, "operation failed"))
        };
        let task = self.inner.tasks.spawn(logged.in_current_span());
        task.await.unwrap_or_else(|error| Err(did_not_end(&error)))
    }
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

pub(crate) fn is_refusal(error: &ServiceError) -> bool {
    matches!(error, ServiceError::Insufficient(_))
}

fn template_name(name: &str) -> Result<Name, ServiceError> {
    name.parse()
        .map_err(|_| ServiceError::NotFound(format!("there is no template {name:?}")))
}

pub(crate) fn disk_name(record: &Record) -> Result<Name, ServiceError> {
    Ok(record.id.parse()?)
}

pub(crate) fn endpoint(record: &Record) -> Result<Endpoint, ServiceError> {
    let endpoint = Endpoint::new(&record.id, record.guest_ip, record.ssh_port)?;
    let rate = record.limits.net_mbps;
    Ok(endpoint
        .with_owner(vmm_user(record).uid)
        .with_rate(rate.map(|rate| Mbps::new(rate.try_into().unwrap_or(u32::MAX)))))
}

pub(crate) fn disk_limits(limits: VmLimits) -> DiskLimits {
    DiskLimits {
        iops: limits.disk_iops.map(|iops| iops.try_into().unwrap_or(u32::MAX)),
        bytes_per_second: limits.disk_mbps.map(|megabytes| megabytes.saturating_mul(1_000_000)),
    }
}

/// `vm-` and 48 random bits in hex.
fn new_id() -> Result<String, ServiceError> {
    let bits = random_hex(6).map_err(|error| ServiceError::Internal(format!("no id could be drawn: {error}")))?;
    Ok(format!("vm-{bits}"))
}

/// Each VM's machine runs as a user of its own, so that one that breaks out of its hypervisor finds nothing of another's. The
/// numbers lie in the range that <https://systemd.io/UIDS-GIDS/> lists as unused (1879048192 to 2147352575).
fn vmm_user(record: &Record) -> RunAs {
    let uid = 1_900_000_000 + u32::from(record.ssh_port);
    RunAs { uid, gid: uid }
}

pub(crate) fn machine_id(id: &str) -> Result<MachineId, ServiceError> {
    Ok(id.parse()?)
}

pub(crate) fn rfc3339(time: jiff::Timestamp) -> String {
    // Whole milliseconds are enough to sort by, and short enough to read.
    format!("{time:.3}")
}

fn make_private_dir(dir: &Path) -> Result<(), ServiceError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| ServiceError::Internal(format!("cannot create {}: {error}", dir.display())))
}

/// Removes a folder and all in it; one that is not there is no error.
pub(crate) fn remove_dir(dir: &Path) -> Result<(), ServiceError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(ServiceError::Internal(format!(
            "cannot remove {}: {error}",
            dir.display()
        ))),
        _ => Ok(()),
    }
}
