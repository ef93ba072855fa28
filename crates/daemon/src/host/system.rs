//! Information about the host from the kernel: address, memory, processors and name.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

/// The host's memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryBytes {
    /// `MemTotal`.
    pub total: u64,
    /// `MemAvailable`: can be allocated without swapping.
    pub available: u64,
}

/// Returns the address of the default route's interface, or loopback if there is no route.
///
/// Connecting a UDP socket makes the kernel choose the source address; no packet is sent.
pub(crate) fn default_address() -> IpAddr {
    // An unassigned address of TEST-NET-3 (RFC 5737), which only the default route matches.
    const REMOTE: (Ipv4Addr, u16) = (Ipv4Addr::new(203, 0, 113, 1), 9);
    let address = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
        .and_then(|socket| socket.connect(REMOTE).and_then(|()| socket.local_addr()));
    match address {
        Ok(address) => address.ip(),
        Err(error) => {
            tracing::warn!(%error, "no default route: clients are shown 127.0.0.1; set HOST_IP to an address that they can reach");
            Ipv4Addr::LOCALHOST.into()
        }
    }
}

/// Reads the host's memory from `/proc/meminfo`.
///
/// # Errors
/// If the file cannot be read or lacks a line.
pub(crate) fn memory() -> io::Result<MemoryBytes> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo")?)
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal or MemAvailable"))
}

fn parse_meminfo(text: &str) -> Option<MemoryBytes> {
    // `MemTotal:       24684084 kB`, where kB is 1024 bytes.
    let field = |key: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    };
    Some(MemoryBytes {
        total: field("MemTotal:")?,
        available: field("MemAvailable:")?,
    })
}

/// Returns how long the host has been up; [`Duration::MAX`] if that cannot be read.
pub(crate) fn uptime() -> Duration {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime
        .split_whitespace()
        .next()
        .and_then(|seconds| seconds.parse().ok());
    seconds.map_or(Duration::MAX, Duration::from_secs_f64)
}

/// Returns the number of processors available to this process.
pub(crate) fn cpu_count() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
}

/// Returns the processor model, or `unknown`.
pub(crate) fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

/// Returns the id of the host's current boot.
///
/// # Errors
/// If the id cannot be read.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Returns the host name.
pub(crate) fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_kib() {
        let text = "MemTotal:       24684084 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n";
        let memory = parse_meminfo(text).unwrap();
        assert_eq!((memory.total, memory.available), (24684084 * 1024, 20000000 * 1024));
        assert_eq!(parse_meminfo("MemTotal: many kB"), None);
        assert!(super::memory().unwrap().total > 0);
    }
}
