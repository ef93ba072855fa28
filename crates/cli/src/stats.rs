//! The command `scalebox stats`.

use crate::error::Error;
use crate::guest_args::StatsArgs;
use crate::human::{bytes, duration, percent};
use crate::output::{Output, Table, number, text};
use scalebox_api::{VmStats, VmStatus};
use scalebox_client::{Client, ClientError};
use serde::Serialize;
use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

/// Time between two updates with `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);
/// Time over which the CPU use is measured without `--watch`.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);

/// The numbers of one VM; `--json` prints a list of them.
#[derive(Debug, Clone, Serialize)]
struct Sample {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    stats: Option<VmStats>,
    /// The reason why there are no numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip)]
    at: Instant,
}

pub(crate) fn stats(client: &Client, args: &StatsArgs, output: &Output) -> Result<(), Error> {
    if output.json {
        loop {
            let vms = serde_json::json!({ "vms": samples(client, &args.vms)? });
            if !args.watch {
                return output.json(&vms);
            }
            output.json_line(&vms)?;
            thread::sleep(WATCH_INTERVAL);
        }
    }
    let mut before = samples(client, &args.vms)?;
    if before.is_empty() {
        output.hint("no running VMs; create one with: scalebox vm create");
        return Ok(());
    }
    thread::sleep(SAMPLE_INTERVAL);
    loop {
        let now = samples(client, &args.vms)?;
        if args.watch {
            output.clear()?;
        }
        show(&before, &now, output)?;
        if !args.watch {
            return Ok(());
        }
        before = now;
        thread::sleep(WATCH_INTERVAL);
    }
}

/// Queries the VMs, or all that run. A VM that does not respond has an error if there are others.
fn samples(client: &Client, vms: &[String]) -> Result<Vec<Sample>, Error> {
    let names = match vms {
        [] => {
            let running = client.vms()?.into_iter().filter(|vm| vm.status == VmStatus::Running);
            running.map(|vm| vm.name).collect()
        }
        [only] => return Ok(vec![sample(only.clone(), Ok(client.stats(only)?))]),
        several => several.to_vec(),
    };
    let mut samples = Vec::new();
    for name in names {
        match client.stats(&name) {
            Err(error) if error.status().is_none_or(|status| status == 401) => return Err(error.into()),
            result => samples.push(sample(name, result)),
        }
    }
    Ok(samples)
}

fn sample(name: String, result: Result<VmStats, ClientError>) -> Sample {
    let at = Instant::now();
    let (stats, error) = match result {
        Ok(stats) => (Some(stats), None),
        Err(error) => (None, Some(error.to_string())),
    };
    Sample { name, stats, error, at }
}

fn show(before: &[Sample], now: &[Sample], output: &Output) -> Result<(), Error> {
    let before: BTreeMap<&str, &Sample> = before.iter().map(|sample| (sample.name.as_str(), sample)).collect();
    let columns = vec![
        text("NAME", 0),
        number("CPU", 1),
        number("LOAD", 5),
        number("MEMORY", 2),
        number("DISK", 3),
        number("NET IN", 6),
        number("NET OUT", 7),
        number("PROCS", 8),
        number("EXECS", 4),
        number("UP", 9),
    ];
    let rows = now
        .iter()
        .map(|sample| row(before.get(sample.name.as_str()).copied(), sample));
    output.table(Table::new(columns, rows.collect()))?;
    for sample in now {
        if let Some(error) = &sample.error {
            output.warning(error);
        }
    }
    Ok(())
}

fn row(before: Option<&Sample>, now: &Sample) -> Vec<String> {
    let Some(stats) = &now.stats else {
        let mut row = vec!["-".to_owned(); 10];
        row[0] = now.name.clone();
        return row;
    };
    let used = stats.memory_total_bytes.saturating_sub(stats.memory_available_bytes);
    vec![
        now.name.clone(),
        cpu(before, now, stats),
        format!("{:.2}", stats.load[0]),
        share(used, stats.memory_total_bytes),
        share(stats.root_used_bytes, stats.root_total_bytes),
        bytes(stats.network_received_bytes),
        bytes(stats.network_sent_bytes),
        stats.processes.to_string(),
        stats.execs.to_string(),
        duration(stats.uptime_seconds.max(0.0) as u64),
    ]
}

fn share(used: u64, total: u64) -> String {
    format!("{} of {} ({} %)", bytes(used), bytes(total), percent(used, total))
}

/// Returns the CPU use between two samples, in percent of one processor.
fn cpu(before: Option<&Sample>, now: &Sample, stats: &VmStats) -> String {
    let earlier = before.and_then(|before| Some((before.stats.as_ref()?, before.at)));
    let Some((earlier, at)) = earlier else {
        return "-".to_owned();
    };
    let elapsed = u64::try_from(now.at.duration_since(at).as_millis()).unwrap_or(u64::MAX);
    // After a reboot the counter starts again.
    match stats.cpu_busy_ms.checked_sub(earlier.cpu_busy_ms) {
        Some(busy) => format!("{} %", percent(busy, elapsed)),
        None => "-".to_owned(),
    }
}
