//! Opens the parts of a host, and recovers from a crash. `serve` and `down` begin with it.

use crate::commands::failed::{CommandFailed, io};
use crate::host::advice::advised;
use crate::host::drivers::{self, Drivers};
use crate::host::events::Events;
use crate::host::random::random_hex;
use crate::host::{Host, Parts};
use crate::settings::{Settings, SettingsError};
use crate::state::{Fact, State};
use crate::vm::recovery::{self, Recovered};
use rustix::fs::{Mode, OFlags};
use scalebox_net::Network;
use scalebox_storage::{InitEvent, Pool, StorageError};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// The maximum path length of a Unix socket, in bytes: `sun_path` without its final zero (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Builds the async runtime.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, CommandFailed> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    // Tests count the system calls of each thread.
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
pub(crate) async fn open_host(settings: Settings, state: State) -> Result<(Host, Recovered), CommandFailed> {
    if state.is_read_only() {
        tracing::error!(
            path = %settings.state_dir.display(),
            "STATE_DIR is read-only: VMs keep running, but nothing can be changed; make it writable and restart scaleboxd"
        );
    }
    scalebox_storage::require_programs()?;
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
        InitEvent::Warning(warning) => tracing::warn!("{}", advised(&warning)),
    })?;
    if let Err(error) = pool.reconcile() {
        // The reconciliation fails, for example, while btrfs still completes a resize that a
        // previous daemon began. The pool can be used nevertheless.
        tracing::warn!(error = %advised(&error), "cannot reconcile the size of the pool with its image yet; retrying");
    }
    if let Err(error) = pool.upgrade() {
        // The write fails on a full disk, for example. VMs can be deleted to make room.
        tracing::error!(error = %advised(&error), "cannot upgrade the pool to this release: its templates and its kernel cannot be used; make room and restart scaleboxd");
    }
    if let Err(error) = pool.make_kernels_readable() {
        tracing::warn!(error = %advised(&error), "cannot share the kernel between jails; each gets its own copy");
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
    let host = Host::new(parts).map_err(io("read the host's memory"))?;
    let recovered = recovery::recover(&host).await?;
    Ok((host, recovered))
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
    // The path of a socket in this folder continues with at most `vm-0123456789ab/control.sock`.
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

/// Checks that files can be created in the folder, by creating an unnamed one.
fn probe_writable(dir: &Path) -> io::Result<()> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?;
    Ok(())
}

/// Returns the resolvers for guests: from the settings, or from the host.
pub(crate) fn resolvers(settings: &Settings) -> Vec<Ipv4Addr> {
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
