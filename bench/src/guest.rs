//! Measures boots, and a running guest: growth, commands and files.

use crate::boot::{self, Boot};
use crate::daemon::Daemon;
use crate::disks::{DiskFactory, TEMPLATE};
use crate::execs::{self, Concurrent};
use crate::images;
use crate::measure::{Samples, median_seconds, milliseconds, timed};
use crate::outcome::Outcome;
use crate::pull;
use crate::setup::Setup;
use crate::transfers::{self, Transfers};
use scalebox_api::{UpdateVm, Vm};
use scalebox_client::Client;
use serde::Serialize;

/// The template of an image with a single program.
const PROGRAM: &str = "program";

/// The figures of guests.
#[derive(Debug, Serialize)]
pub(crate) struct GuestResults {
    /// The boot of median duration.
    pub boot: Boot,
    /// Median time from `POST /vms` to the first command's result in a Debian guest, in seconds.
    pub first_exec_s: f64,
    /// The same in a guest of an image with a single program, whose process 1 is the agent.
    pub first_exec_agent_s: f64,
    /// Duration of `PATCH /vms/{id}` from 10 to 20 GiB with a running, idle guest, in seconds.
    pub live_grow_s: f64,
    /// `true` if the guest confirmed that growth.
    pub live_grow_confirmed: bool,
    /// Durations of `true`, with one connection to the API.
    pub execs: Samples,
    /// The time that the guest itself needs for a process, in milliseconds.
    pub process_ms: f64,
    /// Commands at the same time.
    pub concurrent_execs: Concurrent,
    /// Rates of files.
    pub transfers: Transfers,
}

/// Runs all measurements of guests.
pub(crate) fn measure(setup: &Setup) -> Outcome<GuestResults> {
    let daemon = Daemon::start(setup)?;
    let boots = measure_boots(setup, &daemon)?;
    let (client, vm) = (daemon.client(), &boots.running);
    let (live_grow_s, live_grow_confirmed) = grow(client, vm)?;
    let execs = execs::latency(setup, client, &vm.id)?;
    let process_ms = milliseconds(execs::process_time(client, &vm.id)?);
    let transfers = transfers::measure(setup, client, vm)?;
    drop(daemon);
    // Memory that the daemon has freed before would hide its growth, so another daemon takes over.
    let daemon = Daemon::start(setup)?;
    let concurrent_execs = execs::concurrent(&daemon, &vm.id)?;
    daemon.client().delete_vm(&vm.id)?;
    Ok(GuestResults {
        boot: boots.median,
        first_exec_s: boots.first_exec_s,
        first_exec_agent_s: boots.first_exec_agent_s,
        live_grow_s,
        live_grow_confirmed,
        execs,
        process_ms,
        concurrent_execs,
        transfers,
    })
}

/// The measured boots.
struct Boots {
    median: Boot,
    first_exec_s: f64,
    first_exec_agent_s: f64,
    /// The last Debian guest, which is running.
    running: Vm,
}

/// Measures boots to SSH and to the first command, in turn. One guest runs at a time.
fn measure_boots(setup: &Setup, daemon: &Daemon) -> Outcome<Boots> {
    let (factory, client) = (DiskFactory::open(setup, daemon)?, daemon.client());
    pull::pull(client, PROGRAM, &images::push_program(setup)?)?;
    let rounds = if setup.quick { 1 } else { 3 };
    let (mut boots, mut debian, mut program) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        program.push(boot::measure_first_exec(client, PROGRAM, &["/busybox", "true"])?);
        debian.push(boot::measure_first_exec(client, TEMPLATE, &["true"])?);
        let (boot, vm) = boot::measure(setup, &factory)?;
        boots.push(boot);
        if boots.len() == rounds {
            boots.sort_by(|a, b| a.to_ssh_s.total_cmp(&b.to_ssh_s));
            return Ok(Boots {
                median: boots[boots.len() / 2],
                first_exec_s: median_seconds(debian),
                first_exec_agent_s: median_seconds(program),
                running: vm,
            });
        }
        client.delete_vm(&vm.id)?;
    }
}

/// Measures a growth from 10 to 20 GiB; returns its seconds, and whether the guest confirmed it.
fn grow(client: &Client, vm: &Vm) -> Outcome<(f64, bool)> {
    wait_for_agent(client, &vm.id)?;
    let (time, grown) = timed(|| Ok(client.update_vm(&vm.id, &UpdateVm::grow(20))?))?;
    Ok((time.as_secs_f64(), grown.disk.is_some_and(|disk| disk.confirmed)))
}

/// Grows the disk until the guest's agent confirms a growth, and so is running. Ends with a disk of
/// 10 GiB.
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
