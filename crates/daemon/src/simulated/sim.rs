//! The simulated host, and the operations of tests on it.

use crate::host::drivers::Drivers;
use crate::host::error::ServiceError;
use crate::host::events::Events;
use crate::host::{Host, Parts};
use crate::settings::Settings;
use crate::state::{Fact, State};
use crate::vm;
use crate::vm::recovery::{Recovered, complete_stops, recover, start_after_reboot};
use crate::watch;
use futures::FutureExt;
use scalebox_api::{CreateVm, EventKind, UpdateVm, Vm, VmStatus};
use scalebox_net::{Network, Simulation};
use scalebox_storage::{Bounds, KernelFiles, Pool, SimulatedSpace};
use scalebox_testkit::{SimMachine, SimVmm};
use scalebox_units::{DiskLocation, Gib, KernelId, VmId};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, timeout};

/// A template of one GiB in every simulated pool.
pub(super) const TEMPLATE: &str = "tiny";
/// The capacity of a new pool.
pub(super) const CAPACITY: Gib = Gib::new(100);
/// Limit on waiting for something to happen, by the simulated clock.
const WAIT_TIMEOUT: Duration = Duration::from_secs(600);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Limit on the pull of an image that a creation waits for.
pub(super) const PULL_WAIT: Duration = Duration::from_secs(100);

/// A host whose machines, network and space are simulated.
pub(super) struct Sim {
    pub vmm: SimVmm,
    pub space: SimulatedSpace,
    /// The running daemon; `None` while it restarts.
    life: Option<Life>,
    settings: Vec<(&'static str, String)>,
    /// The result of recovery at the last start.
    pub recovered: Recovered,
    folder: TempDir,
    /// `true` if the clock of the daemon is paused.
    is_paused: bool,
}

/// One run of the daemon, with the threads and timers that end with it.
struct Life {
    host: Host,
    runtime: Runtime,
}

impl Sim {
    pub(super) fn new() -> Sim {
        Sim::with(&[])
    }

    /// Creates a host with these settings, besides its folders.
    pub(super) fn with(settings: &[(&'static str, &str)]) -> Sim {
        Sim::build(settings, true)
    }

    /// Creates a host on the real clock, for tests that run commands of this host.
    pub(super) fn in_real_time() -> Sim {
        Sim::build(&[], false)
    }

    fn build(settings: &[(&'static str, &str)], is_paused: bool) -> Sim {
        // The folder is in memory, because flushing a disk would take most of the time, and these
        // tests do not simulate a power cut.
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut all: Vec<(&'static str, String)> = vec![("POOL_AUTO_GROW", "off".to_owned())];
        for (key, name) in [("DATA_DIR", "pool"), ("STATE_DIR", "state"), ("RUN_DIR", "run")] {
            let path = folder.path().join(name);
            fs::create_dir(&path).unwrap();
            all.push((key, path.to_str().unwrap().to_owned()));
        }
        all.extend(settings.iter().map(|(key, value)| (*key, (*value).to_owned())));
        let mut sim = Sim {
            vmm: SimVmm::new(),
            space: SimulatedSpace::new(CAPACITY.bytes()),
            life: None,
            settings: all,
            recovered: Recovered::default(),
            folder,
            is_paused,
        };
        sim.add_template();
        sim.start_daemon();
        sim
    }

    fn add_template(&self) {
        let pool = Pool::simulated(&self.path("pool"), bounds(), self.space.clone()).unwrap();
        install_kernel(&pool, "first");
        let image = self.path("image");
        fs::File::create(&image).unwrap().set_len(1 << 30).unwrap();
        pool.import_template(&TEMPLATE.parse().unwrap(), &image, CAPACITY.bytes(), false)
            .unwrap();
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start_daemon(&mut self) {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .start_paused(self.is_paused)
            .build()
            .unwrap();
        let (host, recovered) = runtime.block_on(async {
            let host = self.open();
            let recovered = recover(&host).await.unwrap();
            watch::start(&host, recovered.unconnected.clone());
            tokio::spawn(vm::snapshot::thaw_left_frozen(host.clone()));
            complete_stops(&host, recovered.to_stop.clone());
            tokio::spawn(start_after_reboot(host.clone(), recovered.to_start.clone()));
            (host, recovered)
        });
        self.recovered = recovered;
        self.life = Some(Life { host, runtime });
    }

    fn open(&self) -> Host {
        let pairs: Vec<_> = self
            .settings
            .iter()
            .map(|(key, value)| (*key, value.as_str()))
            .collect();
        let settings = Settings::of(&pairs).unwrap();
        let state = State::open(&settings.state_dir, &settings.run_dir).unwrap();
        let pool = Pool::simulated(&settings.data_dir, settings.bounds(), self.space.clone()).unwrap();
        pool.upgrade().unwrap();
        let parts = Parts {
            pool,
            events: Events::begin(&state).unwrap(),
            state,
            network: Network::simulated(settings.net.clone()),
            resolvers: vec![],
            vmm: Drivers::new(vec![Arc::new(self.vmm.clone())], true),
            accel: "tcg".to_owned(),
            cmdline: String::new(),
            settings,
        };
        Host::new(parts).unwrap()
    }

    /// Kills the daemon and starts the next one.
    pub(super) fn restart(&mut self) {
        self.restart_after(|_| {});
    }

    /// Restarts the daemon like [`Sim::restart`]. `meanwhile` runs while no daemon does.
    pub(super) fn restart_after<T>(&mut self, meanwhile: impl FnOnce(&Sim) -> T) -> T {
        self.life = None;
        self.vmm = self.vmm.restart();
        let result = meanwhile(self);
        self.start_daemon();
        result
    }

    /// Reboots the host: all machines end, and the next boot has another id.
    pub(super) fn reboot(&mut self) {
        self.reboot_with(|_| {});
    }

    /// Reboots the host like [`Sim::reboot`]. `meanwhile` runs before the daemon starts.
    pub(super) fn reboot_with<T>(&mut self, meanwhile: impl FnOnce(&Sim) -> T) -> T {
        self.restart_after(|sim| {
            for id in sim.vmm.machines() {
                sim.vmm.machine(&id).crash();
            }
            let state = State::open(&sim.path("state"), &sim.path("run")).unwrap();
            state.set_fact(Fact::BootId, "an earlier boot").unwrap();
            meanwhile(sim)
        })
    }

    fn life(&self) -> &Life {
        self.life.as_ref().unwrap()
    }

    pub(super) fn host(&self) -> &Host {
        &self.life().host
    }

    pub(super) fn network(&self) -> &Simulation {
        self.host().network.simulation().unwrap()
    }

    /// Runs one request of a client.
    pub(super) fn run<T>(&self, request: impl AsyncFnOnce(Host) -> T) -> T {
        self.life().runtime.block_on(request(self.host().clone()))
    }

    /// Lets the daemon run for this long.
    pub(super) fn wait(&self, time: Duration) {
        self.life().runtime.block_on(async { sleep(time).await });
    }

    /// Lets time pass at once, on a host on the real clock. Work on other threads meanwhile takes
    /// no time.
    pub(super) fn skip(&self, time: Duration) {
        self.life().runtime.block_on(async {
            tokio::time::pause();
            sleep(time).await;
            tokio::time::resume();
        });
    }

    /// Lets the daemon run until the condition holds.
    #[track_caller]
    pub(super) fn wait_until(&self, what: &str, mut condition: impl FnMut(&Sim) -> bool) {
        let waited = self.life().runtime.block_on(async {
            let met = async {
                while !condition(self) {
                    sleep(POLL_INTERVAL).await;
                }
            };
            timeout(WAIT_TIMEOUT, met).await
        });
        assert!(waited.is_ok(), "{what}: {:?}", vm::view::list(self.host()));
    }

    pub(super) fn try_create(&self, fields: Value) -> Result<Vm, ServiceError> {
        self.run(async move |host| {
            let request = create_request(&host, fields);
            vm::create(&host, request, PULL_WAIT).await.map(|(vm, _)| vm)
        })
    }

    /// Creates a VM that runs.
    #[track_caller]
    pub(super) fn create(&self, name: &str) -> Vm {
        self.try_create(json!({ "name": name })).unwrap()
    }

    #[track_caller]
    pub(super) fn create_stopped(&self, name: &str) -> Vm {
        self.try_create(json!({ "name": name, "start": false })).unwrap()
    }

    pub(super) fn start(&self, vm: &Vm) -> Result<Vm, ServiceError> {
        self.run(async |host| vm::start(&host, vm.id.clone()).await)
    }

    pub(super) fn stop(&self, vm: &Vm) -> Result<Vm, ServiceError> {
        self.run(async |host| vm::stop(&host, vm.id.clone()).await)
    }

    pub(super) fn delete(&self, vm: &Vm) -> Result<(), ServiceError> {
        self.run(async |host| vm::delete(&host, vm.id.clone()).await)
    }

    pub(super) fn update(&self, vm: &Vm, change: Value) -> Result<Vm, ServiceError> {
        self.run(async |host| {
            let change = UpdateVm::parse(change.to_string().as_bytes(), host.limits())?;
            vm::update(&host, vm.id.clone(), change).await
        })
    }

    /// Returns the file of a VM's disk.
    pub(super) fn disk(&self, vm: &Vm) -> PathBuf {
        match self.host().pool.disk_location(&id(vm)) {
            DiskLocation::File(path) => path,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn machine(&self, vm: &Vm) -> SimMachine {
        self.vmm.machine(&id(vm))
    }

    #[track_caller]
    pub(super) fn status(&self, vm: &Vm) -> VmStatus {
        self.host().vms.find(&vm.id).unwrap().status
    }

    #[track_caller]
    pub(super) fn reason(&self, vm: &Vm) -> Option<String> {
        self.host().vms.find(&vm.id).unwrap().status_reason
    }

    /// Returns the status and its reason in the state file.
    #[track_caller]
    pub(super) fn disk_gib(&self, vm: &Vm) -> u64 {
        self.host().vms.find(&vm.id).unwrap().disk_size.as_u64()
    }

    #[track_caller]
    pub(super) fn recorded(&self, vm: &Vm) -> (VmStatus, Option<String>) {
        let records = self.host().state.vms().unwrap();
        let record = records.into_iter().find(|record| record.id == id(vm)).unwrap();
        (record.status, record.status_reason)
    }

    /// Returns the kinds of all events of this run of the daemon.
    pub(super) fn events(&self) -> Vec<EventKind> {
        let mut all = self.host().events.subscribe(Some(0), false);
        let mut kinds = Vec::new();
        // Without following, the next event is there at once.
        while let Some(event) = all.next().now_or_never().flatten() {
            kinds.push(event.kind.clone());
        }
        kinds
    }

    pub(super) fn count(&self, kind: &EventKind) -> usize {
        self.events().iter().filter(|event| *event == kind).count()
    }

    /// Checks that a VM has left nothing on the host: no record, machine, disk, folder or tap.
    #[track_caller]
    pub(super) fn assert_gone(&self, vm: &str) {
        let records = self.host().state.vms().unwrap();
        assert!(records.iter().all(|record| record.id.as_str() != vm), "record");
        assert!(
            self.vmm.machines().iter().all(|machine| machine.as_str() != vm),
            "machine"
        );
        self.assert_nothing_but(
            &records
                .into_iter()
                .map(|record| record.id.to_string())
                .collect::<Vec<_>>(),
        );
    }

    /// Checks that disks, folders and taps are those of these VMs.
    #[track_caller]
    pub(super) fn assert_nothing_but(&self, vms: &[String]) {
        let pool = self.host().pool.disks().unwrap();
        assert!(
            pool.iter().all(|disk| vms.iter().any(|vm| vm == disk.as_str())),
            "{pool:?}"
        );
        for folder in ["run/vms", "state/console"] {
            for name in names(&self.path(folder)) {
                assert!(vms.contains(&name), "{folder}/{name}");
            }
        }
        let running = self.vmm.machines().len();
        assert!(self.network().taps().len() <= running, "{:?}", self.network().taps());
    }

    /// Makes every change of a VM's record fail, or work again.
    pub(super) fn set_state_fails(&self, fails: bool) {
        let database = rusqlite::Connection::open(self.path("state").join("state.db")).unwrap();
        for change in ["INSERT", "UPDATE", "DELETE"] {
            let trigger = if fails {
                format!(
                    "CREATE TRIGGER fail_{change} BEFORE {change} ON vms BEGIN SELECT RAISE(ABORT, 'simulated failure'); END"
                )
            } else {
                format!("DROP TRIGGER fail_{change}")
            };
            database.execute_batch(&trigger).unwrap();
        }
    }
}

/// Installs a kernel with this content, which becomes the newest.
pub(super) fn install_kernel(pool: &Pool, content: &str) -> KernelId {
    let folder = tempfile::tempdir().unwrap();
    let files = KernelFiles {
        vmlinuz: folder.path().join("vmlinuz"),
        initrd: folder.path().join("initrd.img"),
        modules: Some(folder.path().join("modules.img")),
    };
    for file in [&files.vmlinuz, &files.initrd, files.modules.as_ref().unwrap()] {
        fs::write(file, content).unwrap();
    }
    pool.install_kernel(&files).unwrap()
}

fn bounds() -> Bounds {
    Bounds {
        buffer: Gib::new(2),
        overcommit_ratio: 4.0,
    }
}

fn names(folder: &std::path::Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return vec![];
    };
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

pub(super) fn id(vm: &Vm) -> VmId {
    vm.id.parse().unwrap()
}

/// Returns a request for a VM, with these fields besides key, and template if there is no image.
pub(super) fn create_request(host: &Host, fields: Value) -> CreateVm {
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBvQAo3wEbrBSpyYtmK9GRzs7IJ9GbPmnvOJvzTNDUHt test";
    let mut request = match fields.get("image") {
        None => json!({ "template": TEMPLATE, "ssh_public_key": key }),
        Some(_) => json!({ "ssh_public_key": key }),
    };
    request
        .as_object_mut()
        .unwrap()
        .extend(fields.as_object().unwrap().clone());
    CreateVm::parse(request.to_string().as_bytes(), host.limits()).unwrap()
}
