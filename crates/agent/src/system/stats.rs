//! Load and memory, from `/proc` (proc(5)).

use crate::server::Failure;
use crate::system::grow;
use scalebox_agent_api::{FailureCode, RootSize, Stats};
use std::fs;
use std::io;
use std::path::Path;

/// Milliseconds of a tick in `/proc/stat`: `USER_HZ` is 100 on all architectures that Linux still
/// supports for guests.
const TICK_MS: u64 = 10;

/// Reads the figures of the guest; `execs` is the number of execs that run.
///
/// # Errors
/// If a file of `/proc` cannot be read or parsed.
pub(crate) fn read(execs: u64) -> Result<Stats, Failure> {
    let [uptime, load, stat, memory, statm, network] =
        ["uptime", "loadavg", "stat", "meminfo", "self/statm", "net/dev"].map(|name| {
            let path = Path::new("/proc").join(name);
            fs::read_to_string(&path).map_err(Failure::io(format!("read {}", path.display())))
        });
    let RootSize { total, used } = grow::size(Path::new("/")).map_err(Failure::io("read the size of /"))?;
    let (network_received, network_sent) = traffic(&network?);
    let memory = memory?;
    Ok(Stats {
        uptime_seconds: number("uptime", uptime?.split(' ').next())?,
        load: averages(&load?)?,
        cpu_busy_ms: busy_ticks(&stat?)?.saturating_mul(TICK_MS),
        memory_total: kibibytes(&memory, "MemTotal:")?,
        memory_available: kibibytes(&memory, "MemAvailable:")?,
        agent_memory: resident(&statm?)?,
        root_total: total,
        root_used: used,
        processes: processes().map_err(Failure::io("read /proc"))?,
        network_received,
        network_sent,
        execs,
    })
}

fn unreadable(name: &str) -> Failure {
    Failure::new(
        FailureCode::Other,
        format!("the file /proc/{name} has an unknown format"),
    )
}

fn number<T: std::str::FromStr>(name: &str, text: Option<&str>) -> Result<T, Failure> {
    let parsed = text.and_then(|text| text.trim().parse().ok());
    parsed.ok_or_else(|| unreadable(name))
}

fn averages(text: &str) -> Result<[f64; 3], Failure> {
    let mut fields = text.split(' ');
    let mut next = || number("loadavg", fields.next());
    Ok([next()?, next()?, next()?])
}

/// Adds up user, nice, system, irq and softirq of the first line; not idle, iowait and steal.
/// Guest time is contained in user time.
fn busy_ticks(text: &str) -> Result<u64, Failure> {
    let line = text.lines().next().and_then(|line| line.strip_prefix("cpu "));
    let fields: Vec<u64> = line
        .unwrap_or_default()
        .split_ascii_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    match fields[..] {
        [user, nice, system, _idle, _iowait, irq, softirq, ..] => Ok(user + nice + system + irq + softirq),
        _ => Err(unreadable("stat")),
    }
}

fn kibibytes(text: &str, name: &str) -> Result<u64, Failure> {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    let kibibytes: u64 = number("meminfo", value.and_then(|value| value.strip_suffix("kB")))?;
    Ok(kibibytes.saturating_mul(1024))
}

fn resident(text: &str) -> Result<u64, Failure> {
    let pages: u64 = number("self/statm", text.split(' ').nth(1))?;
    Ok(pages.saturating_mul(rustix::param::page_size() as u64))
}

/// Adds up received and sent bytes of all interfaces except `lo`.
fn traffic(text: &str) -> (u64, u64) {
    let interfaces = text.lines().filter_map(|line| line.split_once(':'));
    let counted = interfaces.filter(|(name, _)| name.trim() != "lo");
    counted.fold((0, 0), |(received, sent), (_, fields)| {
        let field = |index| {
            let text = fields.split_ascii_whitespace().nth(index);
            text.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0)
        };
        (received + field(0), sent + field(8))
    })
}

fn processes() -> io::Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        count += u64::from(name.as_encoded_bytes().iter().all(u8::is_ascii_digit));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_proc_are_parsed() {
        assert_eq!(averages("0.50 1.25 2.00 1/200 4242\n"), Ok([0.5, 1.25, 2.0]));
        assert_eq!(busy_ticks("cpu  10 20 30 1000 500 1 2 99 7 8\ncpu0 …\n"), Ok(63));
        let memory = "MemTotal:        2048 kB\nMemFree:  1 kB\nMemAvailable:    1024 kB\n";
        assert_eq!(kibibytes(memory, "MemAvailable:"), Ok(1 << 20));
        let network = "Inter-| Receive\n face |bytes\n    lo: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0\n  \
                       eth0:100 1 0 0 0 0 0 0 200 1 0 0 0 0 0 0\n  eth1: 1 1 0 0 0 0 0 0 2 1 0 0 0 0 0 0\n";
        assert_eq!(traffic(network), (101, 202));
    }

    #[test]
    fn unknown_formats_are_errors() {
        assert!(averages("0.5").is_err());
        assert!(busy_ticks("cpu  1 2\n").is_err());
        assert!(busy_ticks("").is_err());
        assert!(kibibytes("MemTotal: x kB\n", "MemTotal:").is_err());
        assert!(kibibytes("MemTotal: 1 kB\n", "MemAvailable:").is_err());
    }
}
