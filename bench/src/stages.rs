//! Runs all measurements in order.

use crate::boot::wait_for_ssh;
use crate::daemon::Daemon;
use crate::disks::{DiskFactory, Method, TEMPLATE};
use crate::groups::Group;
use crate::guest::{self, GuestResults};
use crate::measure::{self, Samples, milliseconds};
use crate::outcome::Outcome;
use crate::pull::{self, Pulls};
use crate::random_writes::{self, Passes};
use crate::setup::Setup;
use crate::wait::wait_until;
use scalebox_api::CreateVm;
use scalebox_client::Client;
use serde::Serialize;
use std::fs::File;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Number of clients in concurrent measurements.
pub(crate) const CONCURRENT_CLIENTS: usize = 32;

/// A series of disks created with one method.
#[derive(Debug, Serialize)]
pub(crate) struct Series {
    /// Method of creation.
    #[serde(rename = "way")]
    pub method: Method,
    /// Size of each disk, in GiB.
    pub size_gib: u64,
    /// Number of other disks in the pool.
    pub disks: usize,
    /// Measured durations.
    pub samples: Samples,
}

/// The results of the measured groups.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Results {
    /// Disks, and a daemon with many VMs.
    #[serde(flatten)]
    pub disks: Option<DiskResults>,
    /// Rates of 4 KiB random writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub random_writes: Option<Vec<Passes>>,
    /// Boots, and a running guest.
    #[serde(flatten)]
    pub guest: Option<GuestResults>,
    /// Pulls from a registry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pulls: Option<Pulls>,
}

/// The figures of disks, and of a daemon with many VMs.
#[derive(Debug, Default, Serialize)]
pub(crate) struct DiskResults {
    /// One series per method, size and number of clients.
    #[serde(rename = "made")]
    pub series: Vec<Series>,
    /// Median duration of an admission decision, in microseconds.
    pub admission_us: f64,
    /// Durations of `GET /vms`.
    pub list: Option<Samples>,
    /// Number of stopped VMs in the measurements of the list and of the restart.
    pub list_stopped: usize,
    /// Number of running VMs in these measurements; their guests had booted.
    pub list_running: usize,
    /// Time from a restart of the daemon until it is ready.
    pub restart_ms: f64,
    /// Resident memory of the daemon, in bytes.
    pub resident_bytes: u64,
    /// Number of stopped VMs when the memory was measured.
    pub resident_vms: usize,
}

/// Runs all stages of the chosen groups.
pub(crate) fn run(setup: &Setup) -> Outcome<Results> {
    let mut results = Results::default();
    for group in Group::ALL.into_iter().filter(|group| setup.groups.contains(group)) {
        match group {
            Group::Disks => results.disks = Some(measure_disks(setup)?),
            Group::Writes => {
                report_stage("random writes");
                results.random_writes = Some(random_writes::run(setup)?);
            }
            Group::Guest => {
                report_stage("boots, and commands and files in a guest");
                results.guest = Some(guest::measure(setup)?);
            }
            Group::Pull => {
                report_stage("pulls from a registry");
                results.pulls = Some(pull::measure(setup)?);
            }
        }
    }
    Ok(results)
}

fn measure_disks(setup: &Setup) -> Outcome<DiskResults> {
    let mut results = DiskResults::default();
    let (listed, running) = if setup.quick { (50, 2) } else { (200, 8) };
    let (many, max) = if setup.quick { (200, 400) } else { (1000, 5000) };

    let mut daemon = Daemon::start(setup)?;
    let guests = {
        let factory = DiskFactory::open(setup, &daemon)?;
        report_stage("disks of each size, one at a time and 32 at once");
        fill(&factory, &daemon, 10)?;
        for size_gib in [2, 10, 100] {
            for method in [Method::Api, Method::Seed, Method::Bare, Method::Library] {
                results.measure(setup, &factory, method, size_gib, 10)?;
            }
        }
        let admissions = measure::run(2000, 1, |_| factory.admit())?;
        results.admission_us = admissions.p50_ms * 1000.0;

        report_stage("list of VMs, and restart");
        fill(&factory, &daemon, listed)?;
        let guests = boot(&factory, &daemon, running)?;
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

    let factory = DiskFactory::open(setup, &daemon)?;
    for disks in [many, max] {
        report_stage(&format!("with {disks} disks"));
        fill(&factory, &daemon, disks)?;
        if disks == many {
            results.resident_bytes = daemon.resident_bytes()?;
            results.resident_vms = disks;
        }
        for method in [Method::Bare, Method::Library, Method::Api] {
            results.measure(setup, &factory, method, 2, disks)?;
        }
    }
    Ok(results)
}

fn report_stage(stage: &str) {
    eprintln!("bench: {stage}");
}

/// Creates stopped VMs until there are `disks`.
fn fill(factory: &DiskFactory<'_>, daemon: &Daemon, disks: usize) -> Outcome<()> {
    let existing = daemon.client().vms()?.len();
    let create = |number| factory.create(Method::Api, number, 2).map(|(time, _)| time);
    measure::run(disks.saturating_sub(existing), CONCURRENT_CLIENTS, create).map(drop)
}

/// Creates VMs and waits until their guests have booted.
fn boot(factory: &DiskFactory<'_>, daemon: &Daemon, guests: usize) -> Outcome<Vec<String>> {
    let mut booted = Vec::new();
    for _ in 0..guests {
        let request = CreateVm::new(TEMPLATE.parse()?, Some(factory.key().clone()));
        booted.push(daemon.client().create_vm(&request)?);
    }
    for vm in &booted {
        wait_for_ssh(vm.ssh_port)?;
    }
    Ok(booted.into_iter().map(|vm| vm.id).collect())
}

impl DiskResults {
    /// Measures creations one at a time, then concurrent ones, and removes the disks.
    fn measure(
        &mut self,
        setup: &Setup,
        factory: &DiskFactory<'_>,
        method: Method,
        size_gib: u64,
        disks: usize,
    ) -> Outcome<()> {
        // The first disk creates the resized base image, so it is not measured.
        let (_, first) = factory.create(method, 99_999, size_gib)?;
        factory.remove(method, &first, size_gib)?;
        let (sequential, concurrent) = match (method, setup.quick) {
            (Method::Seed, true) => (3, 8),
            (Method::Seed, false) => (12, CONCURRENT_CLIENTS),
            (_, true) => (30, 64),
            (_, false) => (150, 10 * CONCURRENT_CLIENTS),
        };
        for (count, clients) in [(sequential, 1), (concurrent, CONCURRENT_CLIENTS)] {
            flush(setup, factory.client())?;
            let created = Mutex::new(Vec::new());
            let samples = measure::run(count, clients, |number| {
                let (time, id) = factory.create(method, number, size_gib)?;
                created.lock().unwrap_or_else(PoisonError::into_inner).push(id);
                Ok(time)
            });
            let created = created.into_inner().unwrap_or_else(PoisonError::into_inner);
            measure::run(created.len(), clients, |number| {
                factory.remove(method, &created[number], size_gib)?;
                Ok(Duration::ZERO)
            })?;
            self.series.push(Series {
                method,
                size_gib,
                disks,
                samples: samples?,
            });
        }
        Ok(())
    }
}

/// Waits until the blocks of deleted disks are free and everything is flushed. Otherwise a series
/// would slow down the next one.
fn flush(setup: &Setup, client: &Client) -> Outcome<()> {
    wait_until("the blocks of deleted disks are free", || {
        let provisioned: u64 = client.vms()?.iter().map(|vm| vm.disk_size_gib << 30).sum();
        Ok(client.pool()?.committed_bytes == provisioned)
    })?;
    Ok(rustix::fs::syncfs(File::open(&setup.pool)?)?)
}
