//! The command `scalebox status`.

use crate::error::Error;
use crate::human::{self, bytes};
use crate::output::Output;
use crate::pool;
use scalebox_api::{HostInfo, VmCounts};
use scalebox_client::Client;

pub(crate) fn status(client: &Client, output: &Output) -> Result<(), Error> {
    let info = client.info()?;
    if output.json {
        return output.json(&info);
    }
    output.properties(&[
        (
            "server",
            format!("scaleboxd {} on {} ({})", info.version, info.hostname, info.host_ip),
        ),
        ("up", human::duration(info.uptime_seconds)),
        ("hypervisor", hypervisor(&info)),
        ("VMs", counts(&info.vms)),
        ("templates", info.templates.to_string()),
        ("pool", pool::summary(&info.storage)),
        ("committed", pool::committed(&info.storage)),
        (
            "memory",
            format!(
                "{} of {} available",
                bytes(info.memory.available_bytes),
                bytes(info.memory.total_bytes)
            ),
        ),
        ("CPU", format!("{} × {}", info.cpu.count, info.cpu.model)),
    ])?;
    pool::warn_when_full(&info.storage, output);
    Ok(())
}

fn hypervisor(info: &HostInfo) -> String {
    match info.accel.as_str() {
        "tcg" => format!("{}, emulated (without KVM guests are several times slower)", info.vmm),
        accel => format!("{}, {accel}", info.vmm),
    }
}

/// Formats VM counts: `3 (2 running, 1 failed)`.
fn counts(vms: &VmCounts) -> String {
    let parts = [
        (vms.running, "running"),
        (vms.stopped, "stopped"),
        (vms.paused, "paused"),
        (vms.failed, "failed"),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, status)| format!("{n} {status}"))
        .collect();
    if parts.is_empty() {
        vms.total.to_string()
    } else {
        format!("{} ({})", vms.total, parts.join(", "))
    }
}
