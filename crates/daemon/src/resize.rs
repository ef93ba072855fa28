//! Asking a guest how large and how full its root file system is, through its agent: what the host
//! grew, the guest must have grown too.

use crate::agent::{self, NoAgent};
use scalebox_client::Disk;
use scalebox_guest::FsUsage;
use scalebox_units::Bytes;
use scalebox_vmm::Machine;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a guest may take to grow its file system. An emulated one takes about a second.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often a guest is asked before it counts as one without an agent; each attempt has a deadline
/// of its own.
const ATTEMPTS: u32 = 3;
/// How long to wait between two questions meanwhile.
const INTERVAL: Duration = Duration::from_millis(100);

/// The size of the guest's root file system; `None` when it has no agent, or one that does not
/// answer though it was given time: a busy host's guest may take a few seconds.
pub async fn guest_total(machine: &Arc<dyn Machine>) -> Option<Bytes> {
    for _ in 0..ATTEMPTS {
        if let Some(root) = root_of(machine).await {
            return Some(root.total);
        }
    }
    None
}

/// What the guest's agent says of its root file system, if it answers.
pub async fn root_of(machine: &Arc<dyn Machine>) -> Option<FsUsage> {
    let asked = async { Ok::<_, NoAgent>(agent::reach(machine).await?.root_file_system().await?) };
    match asked.await {
        Ok(root) => Some(root),
        Err(error) => {
            tracing::debug!(vm = %machine.id(), %error, "the guest agent did not answer");
            None
        }
    }
}

/// Waits until a guest's root file system has grown by about `growth` over `before`. `obstacle` is
/// what keeps it from growing while it is mounted, if that is known: then other advice is given.
pub async fn confirm(
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
            "the guest has no agent that answers: if it does not grow its file system by itself, run resize2fs in it",
        );
    };
    // Of what is added, the file system keeps a part for itself: inode tables, journal, the blocks
    // reserved for root.
    let expected = before + growth.scaled(0.9);
    let begun = Instant::now();
    loop {
        let total = root_of(machine).await.map(|root| root.total);
        if total.is_some_and(|total| total >= expected) {
            return Disk {
                confirmed: true,
                guest_total_bytes: total.map(Bytes::as_u64),
                note: None,
            };
        }
        if begun.elapsed() > PATIENCE {
            return unconfirmed(
                total,
                "the disk is larger, but the guest has not grown its file system yet: run resize2fs in it",
            );
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// What helps where `resize2fs` in the guest does not.
fn offline(obstacle: &'static str) -> String {
    format!(
        "the disk is larger, but the guest's file system is not: {obstacle}. Stop the VM, grow its disk by another GiB, which \
         grows the file system to all of it, and start the VM"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_note_for_a_file_system_that_does_not_grow_while_mounted_names_what_works() {
        let note = offline("Linux does not grow a mounted ext4 with the feature sparse_super2");
        for word in ["sparse_super2", "Stop the VM", "another GiB", "start the VM"] {
            assert!(note.contains(word), "{note}");
        }
        assert!(!note.contains("resize2fs"));
    }
}
