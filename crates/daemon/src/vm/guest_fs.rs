//! Queries a guest's agent for the size and usage of its root file system.
//!
//! The size confirms that the file system has grown with its disk; the usage triggers auto-extend.

use crate::host::Host;
use crate::host::guest_agent::{GuestAgent, GuestAgentError};
use scalebox_api::Disk;
use scalebox_guest::FsUsage;
use scalebox_units::Bytes;
use scalebox_vmm::Machine;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time limit for a guest to grow its file system. An emulated guest takes about a second.
const GROW_TIMEOUT: Duration = Duration::from_secs(20);
/// Limit on attempts before a guest counts as having no agent. Each attempt has its own deadline.
const MAX_ATTEMPTS: u32 = 3;
/// Pause between two queries while waiting for the growth.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Returns the size of the guest's root file system; `None` if no agent responds. Retries, because
/// the agent of a guest on a busy host may take a few seconds.
pub(crate) async fn guest_total(host: &Host, machine: &Arc<dyn Machine>) -> Option<Bytes> {
    for _ in 0..MAX_ATTEMPTS {
        if let Some(total) = grown_total(host, machine).await {
            return Some(total);
        }
    }
    None
}

/// Makes our own agent grow the guest's root file system. Returns its size; `None` if no agent
/// responds.
async fn grown_total(host: &Host, machine: &Arc<dyn Machine>) -> Option<Bytes> {
    let query = async { GuestAgent::reach(host, machine).await?.grown_root().await };
    logged(machine, query.await).map(|root| root.total)
}

/// Queries the guest's root file system; `None` if no agent responds.
pub(crate) async fn root_file_system(host: &Host, machine: &Arc<dyn Machine>) -> Option<FsUsage> {
    let query = async { GuestAgent::reach(host, machine).await?.root_file_system().await };
    logged(machine, query.await)
}

fn logged(machine: &Arc<dyn Machine>, queried: Result<FsUsage, GuestAgentError>) -> Option<FsUsage> {
    match queried {
        Ok(root) => Some(root),
        Err(error) => {
            tracing::debug!(vm = %machine.id(), %error, "the guest agent does not respond");
            None
        }
    }
}

/// Waits until a guest's root file system has grown by about `growth` over `before`. `obstacle` is
/// the known reason why it cannot grow while mounted; the advice then differs.
pub(crate) async fn confirm(
    host: &Host,
    machine: &Arc<dyn Machine>,
    before: Option<Bytes>,
    growth: Bytes,
    obstacle: Option<&'static str>,
) -> Disk {
    let unconfirmed = |total: Option<Bytes>, note: &str| Disk {
        confirmed: false,
        guest_total_bytes: total.map(Bytes::as_u64),
        note: Some(obstacle.map_or_else(|| note.to_owned(), offline)),
    };
    let Some(before) = before else {
        return unconfirmed(
            None,
            "the guest agent does not respond: if the guest has not grown its file system, run resize2fs in it",
        );
    };
    // The file system uses part of the growth for inode tables, journal and blocks reserved for
    // root.
    let expected = before + growth.scaled(0.9);
    let begun = Instant::now();
    loop {
        let total = grown_total(host, machine).await;
        if total.is_some_and(|total| total >= expected) {
            return Disk {
                confirmed: true,
                guest_total_bytes: total.map(Bytes::as_u64),
                note: None,
            };
        }
        if begun.elapsed() > GROW_TIMEOUT {
            return unconfirmed(
                total,
                "the disk has grown, but the guest's file system has not yet: run resize2fs in it",
            );
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Returns the advice for a file system that `resize2fs` cannot grow in the guest.
fn offline(obstacle: &'static str) -> String {
    format!(
        "the disk has grown, but the guest's file system has not: {obstacle}. Stop the VM, grow its disk by another GiB, which \
         grows the file system to the size of the disk, and start the VM"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_note_for_a_file_system_that_cannot_grow_while_mounted_advises_offline_growth() {
        let note = offline("Linux does not grow a mounted ext4 with the feature sparse_super2");
        for word in ["sparse_super2", "Stop the VM", "another GiB", "start the VM"] {
            assert!(note.contains(word), "{note}");
        }
        assert!(!note.contains("resize2fs"));
    }
}
