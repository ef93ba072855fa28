//! What is measured, in order.

use crate::daemon::Daemon;
use crate::disks::{TEMPLATE, Way, Workshop};
use crate::measure::{self, Samples, milliseconds};
use crate::random_writes::{self, Passes};
use crate::{Outcome, Setup};
use scalebox_client::{Client, CreateVm, UpdateVm};
use serde::Serialize;
use std::fs::File;
use std::io::Read;
use std::net::TcpStream;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long is waited for a guest, and for anything else; an emulated Debian takes half a minute on
/// a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);
/// Clients when there are many.
pub const MANY: usize = 32;

/// Disks made in one way.
#[derive(Debug, Serialize)]
pub struct Made {
    /// How.
    pub way: Way,
    /// Of which size.
    pub size_gib: u64,
    /// How many others there were.
    pub disks: usize,
    /// How long it took.
    pub samples: Samples,
}

/// Everything that was measured.
#[derive(Debug, Default, Serialize)]
pub struct Results {
    /// Disks, way by way.
    pub made: Vec<Made>,
    /// One admission decision, in microseconds, the median.
    pub admission_us: f64,
    /// `GET /vms`.
    pub list: Option<Samples>,
    /// Stopped VMs there were then, and at the restart.
    pub list_stopped: usize,
    /// And running ones, whose guests had booted.
    pub list_running: usize,
    /// From a restart of the daemon to its readiness.
    pub restart_ms: f64,
    /// The daemon's memory, in bytes, and with how many stopped VMs.
    pub resident_bytes: u64,
    /// See [`Results::resident_bytes`].
    pub resident_vms: usize,
    /// 4 KiB random writes.
    pub random_writes: Vec<Passes>,
    /// From `POST /vms` to an SSH banner, the median, in seconds.
    pub to_ssh_s: f64,
    /// `PATCH /vms/{id}` from 10 to 20 GiB of a running, idle guest, in seconds, and whether the
    /// guest confirmed it.
    pub live_grow_s: f64,
    /// See [`Results::live_grow_s`].
    pub live_grow_confirmed: bool,
}

/// Runs all stages.
pub fn run(setup: &Setup) -> Outcome<Results> {
    let mut results = Results::default();
    let (listed, running) = if setup.quick { (50, 2) } else { (200, 8) };
    let (many, most) = if setup.quick { (200, 400) } else { (1000, 5000) };

    let mut daemon = Daemon::start(setup)?;
    let guests = {
        let shop = Workshop::open(setup, &daemon)?;
        tell("disks of each size, one at a time and 32 at once");
        fill(&shop, &daemon, 10)?;
        for size_gib in [2, 10, 100] {
            for way in [Way::Api, Way::Seed, Way::Bare, Way::Library] {
                results.make(setup, &shop, way, size_gib, 10)?;
            }
        }
        let admissions = measure::run(2000, 1, |_| shop.admit())?;
        results.admission_us = admissions.p50_ms * 1000.0;

        tell("a list of VMs, and a restart");
        fill(&shop, &daemon, listed)?;
        let guests = boot(&shop, &daemon, running)?;
        let list = || measure::timed(|| Ok(daemon.client().vms()?));
        results.list = Some(measure::run(300, 1, |_| list().map(|(time, _)| time))?);
        (results.list_stopped, results.list_running) = (listed, running);
        guests
    };
    drop(daemon);
    daemon = Daemon::start(setup)?;
    results.restart_ms = milliseconds(daemon.ready_after);
    for id in guests {
        daemon.client().delete_vm(&id)?;
    }

    let shop = Workshop::open(setup, &daemon)?;
    for disks in [many, most] {
        tell(&format!("with {disks} disks"));
        fill(&shop, &daemon, disks)?;
        if disks == many {
            results.resident_bytes = daemon.resident_bytes()?;
            results.resident_vms = disks;
        }
        for way in [Way::Bare, Way::Library, Way::Api] {
            results.make(setup, &shop, way, 2, disks)?;
        }
    }
    tell("random writes");
    results.random_writes = random_writes::run(setup)?;
    tell("a guest");
    one_guest(setup, &shop, &daemon, &mut results)?;
    Ok(results)
}

fn tell(stage: &str) {
    eprintln!("bench: {stage}");
}

/// Makes stopped VMs until there are `disks`.
fn fill(shop: &Workshop<'_>, daemon: &Daemon, disks: usize) -> Outcome<()> {
    let there = daemon.client().vms()?.len();
    let make = |number| shop.make(Way::Api, number, 2).map(|(time, _)| time);
    measure::run(disks.saturating_sub(there), MANY, make).map(drop)
}

/// Makes VMs and waits until their guests have booted.
fn boot(shop: &Workshop<'_>, daemon: &Daemon, guests: usize) -> Outcome<Vec<String>> {
    let mut booted = Vec::new();
    for _ in 0..guests {
        let request = CreateVm::new(TEMPLATE.parse()?, shop.key().clone());
        booted.push(daemon.client().create_vm(&request)?);
    }
    for vm in &booted {
        wait_for_ssh(vm.ssh_port)?;
    }
    Ok(booted.into_iter().map(|vm| vm.id).collect())
}

impl Results {
    /// One at a time, then many at once; what was made is removed.
    fn make(&mut self, setup: &Setup, shop: &Workshop<'_>, way: Way, size_gib: u64, disks: usize) -> Outcome<()> {
        // The grown clone is made by the first, which is not counted.
        let (_, warm) = shop.make(way, 99_999, size_gib)?;
        shop.remove(way, &warm, size_gib)?;
        let (alone, together) = match (way, setup.quick) {
            (Way::Seed, true) => (3, 8),
            (Way::Seed, false) => (12, MANY),
            (_, true) => (30, 64),
            (_, false) => (150, 10 * MANY),
        };
        for (count, clients) in [(alone, 1), (together, MANY)] {
            settle(setup, shop.client())?;
            let made = Mutex::new(Vec::new());
            let samples = measure::run(count, clients, |number| {
                let (time, id) = shop.make(way, number, size_gib)?;
                made.lock().unwrap_or_else(PoisonError::into_inner).push(id);
                Ok(time)
            });
            let made = made.into_inner().unwrap_or_else(PoisonError::into_inner);
            measure::run(made.len(), clients, |number| {
                shop.remove(way, &made[number], size_gib)?;
                Ok(Duration::ZERO)
            })?;
            self.made.push(Made {
                way,
                size_gib,
                disks,
                samples: samples?,
            });
        }
        Ok(())
    }
}

/// Waits until the blocks of what was deleted are back and everything is flushed, so that no row
/// pays for the one before.
fn settle(setup: &Setup, client: &Client) -> Outcome<()> {
    until("the blocks of deleted disks", || {
        let provisioned: u64 = client.vms()?.iter().map(|vm| vm.disk_size_gib << 30).sum();
        Ok(client.pool()?.committed_bytes == provisioned)
    })?;
    Ok(rustix::fs::syncfs(File::open(&setup.pool)?)?)
}

fn one_guest(setup: &Setup, shop: &Workshop<'_>, daemon: &Daemon, results: &mut Results) -> Outcome<()> {
    let client = daemon.client();
    let runs = if setup.quick { 1 } else { 3 };
    let mut times = Vec::new();
    for run in 0..runs {
        let mut request = CreateVm::new(TEMPLATE.parse()?, shop.key().clone());
        request.disk_size_gib = Some(3);
        let begun = Instant::now();
        let vm = client.create_vm(&request)?;
        wait_for_ssh(vm.ssh_port)?;
        times.push(begun.elapsed());
        if run + 1 == runs {
            wait_for_agent(client, &vm.id)?;
            let grow = |disk_size_gib| measure::timed(|| Ok(client.update_vm(&vm.id, &UpdateVm::grow(disk_size_gib))?));
            let (time, grown) = grow(20)?;
            results.live_grow_s = time.as_secs_f64();
            results.live_grow_confirmed = grown.disk.is_some_and(|disk| disk.confirmed);
        }
        client.delete_vm(&vm.id)?;
    }
    times.sort_unstable();
    results.to_ssh_s = times[times.len() / 2].as_secs_f64();
    Ok(())
}

/// An SSH server speaks first (RFC 4253, section 4.2).
fn wait_for_ssh(port: u16) -> Outcome<()> {
    until("the guest's SSH", || {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
            return Ok(false);
        };
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut banner = [0; 4];
        Ok(stream.read_exact(&mut banner).is_ok() && &banner == b"SSH-")
    })
}

/// A growth that is confirmed tells that the guest's agent is up. Ends with a disk of 10 GiB.
fn wait_for_agent(client: &Client, id: &str) -> Outcome<()> {
    for disk_size_gib in 4..=10 {
        let grown = client.update_vm(id, &UpdateVm::grow(disk_size_gib))?;
        if grown.disk.is_some_and(|disk| disk.confirmed) {
            break;
        }
    }
    client.update_vm(id, &UpdateVm::grow(10))?;
    Ok(())
}

fn until(what: &str, mut is_there: impl FnMut() -> Outcome<bool>) -> Outcome<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_there()? {
        if Instant::now() > deadline {
            return Err(format!("{what} did not come within {} s", PATIENCE.as_secs()).into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
