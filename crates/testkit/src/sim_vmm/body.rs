//! The state of one simulated machine.

use crate::sim_vmm::guest::{SimGuest, SimQga};
use crate::sim_vmm::served::Served;
use scalebox_units::{Bytes, DiskLocation};
use scalebox_vmm::{DiskLimits, Error, ExitReason, MachineEvent, MachineSpec, MachineState, Result};
use std::fs::{self, File};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{broadcast, watch};

/// Number of events that a slow receiver may lag behind.
const MAX_BUFFERED_EVENTS: usize = 64;
/// Unit of disk sizes, in bytes.
const SECTOR_BYTES: u64 = 512;

/// One machine, from its launch to its end.
pub(crate) struct Body {
    pub(crate) spec: MachineSpec,
    pub(crate) pid: i32,
    /// The name of the driver that launched the machine.
    pub(crate) driver: &'static str,
    inside: Mutex<Inside>,
}

pub(crate) struct Inside {
    /// The state of the machine; `Ended` is final.
    pub(crate) state: MachineState,
    pub(crate) holder: Option<Arc<Holding>>,
    /// `true` if the hypervisor does not respond.
    pub(crate) is_hung: bool,
    /// `true` if every disk request fails on the host.
    pub(crate) is_disk_full: bool,
    pub(crate) disk_size: Bytes,
    pub(crate) limits: DiskLimits,
    pub(crate) guest: SimGuest,
    pub(crate) is_frozen: bool,
    pub(crate) trims: u32,
    is_booted: bool,
    /// Counts boots, so that only the latest finishes.
    boots: u32,
    is_shutting_down: bool,
    /// The agents' connections, to close them at the end.
    connections: Vec<UnixStream>,
    /// Our own agent, while it serves connections of this boot.
    pub(crate) served: Served,
}

/// The channels to the holder of a machine.
pub(crate) struct Holding {
    pub(crate) events: broadcast::Sender<MachineEvent>,
    pub(crate) ended: watch::Sender<Option<ExitReason>>,
}

impl Holding {
    pub(crate) fn new() -> Arc<Holding> {
        Arc::new(Holding {
            events: broadcast::Sender::new(MAX_BUFFERED_EVENTS),
            ended: watch::Sender::new(None),
        })
    }
}

impl Inside {
    pub(crate) fn exit_reason(&self) -> Option<ExitReason> {
        match &self.state {
            MachineState::Ended(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    pub(crate) fn publish(&self, event: MachineEvent) {
        if let Some(holder) = &self.holder {
            // Sending fails only if there are no receivers.
            let _ = holder.events.send(event);
        }
    }

    /// Returns the size of the file system as the agent reports it.
    pub(crate) fn fs_total(&self) -> Bytes {
        self.guest.fs_total.unwrap_or(self.disk_size)
    }

    /// Returns whether `qemu-guest-agent` responds right now.
    pub(crate) fn qga_responds(&self) -> bool {
        self.state == MachineState::Running && self.is_booted && self.guest.qga == SimQga::Responsive
    }

    /// Keeps a connection, to close it at the end.
    pub(crate) fn add_connection(&mut self, stream: UnixStream) {
        self.connections.push(stream);
    }

    pub(crate) fn pause(&mut self) {
        if self.state == MachineState::Running {
            self.state = MachineState::Paused;
            self.publish(MachineEvent::Stopped);
        }
    }

    pub(crate) fn resume(&mut self) {
        if matches!(self.state, MachineState::Paused | MachineState::Stalled) {
            self.state = MachineState::Running;
            self.publish(MachineEvent::Resumed);
            self.stall_if_disk_full();
        }
    }

    /// Stalls the machine if the disk is full: a running guest writes all the time.
    pub(crate) fn stall_if_disk_full(&mut self) {
        if self.is_disk_full && self.state == MachineState::Running {
            self.state = MachineState::Stalled;
            self.publish(MachineEvent::IoError {
                nospace: true,
                reason: "No space left on device".to_owned(),
            });
            self.publish(MachineEvent::Stopped);
        }
    }
}

impl Body {
    pub(crate) fn new(
        spec: MachineSpec,
        pid: i32,
        driver: &'static str,
        guest: SimGuest,
        holder: Arc<Holding>,
    ) -> Arc<Body> {
        let root = match &spec.root {
            DiskLocation::File(path) => fs::metadata(path),
            _ => Err(std::io::ErrorKind::NotFound.into()),
        };
        let inside = Inside {
            state: MachineState::Running,
            holder: Some(holder),
            is_hung: false,
            is_disk_full: false,
            disk_size: root.map_or(Bytes::ZERO, |root| Bytes::new(root.len())),
            limits: spec.root_limits,
            guest,
            is_frozen: false,
            trims: 0,
            is_booted: false,
            boots: 0,
            is_shutting_down: false,
            connections: Vec::new(),
            served: Served::default(),
        };
        Arc::new(Body {
            spec,
            pid,
            driver,
            inside: Mutex::new(inside),
        })
    }

    /// Locks the state. It is never locked across an await.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the machine. Returns whether it has no holder and a later adoption reports the reason.
    pub(crate) fn end(&self, reason: ExitReason) -> bool {
        let mut inside = self.lock();
        if inside.exit_reason().is_none() {
            inside.state = MachineState::Ended(reason.clone());
            inside.served.stop();
            for connection in inside.connections.drain(..) {
                // An error means that the other end is closed.
                let _ = connection.shutdown(Shutdown::Both);
            }
            if reason == ExitReason::GuestShutdown {
                inside.publish(MachineEvent::GuestShutdown);
            }
            inside.publish(MachineEvent::Ended(reason.clone()));
            if let Some(holder) = &inside.holder {
                holder.ended.send_replace(Some(reason));
            }
        }
        inside.holder.is_none() && inside.exit_reason() == Some(ExitReason::GuestShutdown)
    }

    /// Grows the disk, and its file if it exists.
    pub(crate) fn grow(&self, size: Bytes) -> Result<()> {
        let invalid = |why| Error::Spec {
            id: self.spec.id.clone(),
            what: "size",
            why,
        };
        let mut inside = self.lock();
        let min = inside.disk_size;
        if size < min {
            return Err(invalid(format!(
                "{size} is less than the disk's {min}; disks cannot shrink"
            )));
        }
        if !size.as_u64().is_multiple_of(SECTOR_BYTES) {
            let why = format!("{} bytes is not a multiple of {SECTOR_BYTES}", size.as_u64());
            return Err(invalid(why));
        }
        if let DiskLocation::File(path) = &self.spec.root
            && path.exists()
        {
            lengthen(path, size)?;
        }
        inside.disk_size = size;
        Ok(())
    }

    /// Returns the time that the guest takes to shut down; `None` if it does not.
    pub(crate) fn begin_shutdown(&self) -> Option<Duration> {
        let mut inside = self.lock();
        let obeys = inside.state == MachineState::Running && inside.is_booted && !inside.is_shutting_down;
        let after = inside.guest.shutdown_time.filter(|_| obeys)?;
        inside.is_shutting_down = true;
        Some(after)
    }

    /// Returns whether the guest powers off now. A guest that was paused meanwhile does not; the
    /// next request finds it.
    pub(crate) fn finish_shutdown(&self) -> bool {
        let mut inside = self.lock();
        inside.is_shutting_down = false;
        inside.state == MachineState::Running
    }

    /// Returns the number of this boot, and the time that it takes.
    pub(crate) fn begin_boot(&self) -> Option<(u32, Duration)> {
        let mut inside = self.lock();
        if inside.exit_reason().is_some() {
            return None;
        }
        inside.is_booted = false;
        inside.is_frozen = false;
        inside.served.stop();
        inside.boots += 1;
        Some((inside.boots, inside.guest.boot_time))
    }

    pub(crate) fn finish_boot(&self, boot: u32) {
        let mut inside = self.lock();
        if inside.boots == boot && inside.exit_reason().is_none() {
            inside.is_booted = true;
            inside.served.start();
            if inside.guest.qga == SimQga::Responsive {
                inside.publish(MachineEvent::AgentUp);
            }
        }
    }
}

fn lengthen(path: &Path, size: Bytes) -> Result<()> {
    let file = File::options().write(true).open(path);
    file.and_then(|file| file.set_len(size.as_u64()))
        .map_err(|source| Error::Io {
            what: "grow",
            path: path.to_owned(),
            source,
        })
}
