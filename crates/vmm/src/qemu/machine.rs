//! A machine that runs in one QEMU process: its commands, and the events of its control socket.

use crate::error::{Error, Result};
use crate::machine::{Channel, Machine};
use crate::process::Process;
use crate::qemu::arguments::{QGA_PORT, ROOT_DEVICE, ROOT_NODE};
use crate::qemu::qmp::{Events, Qmp, QmpError};
use crate::run_dir::RunDir;
use crate::spec::DiskLimits;
use crate::state::{ExitReason, MachineEvent, MachineState};
use crate::supervise::{CONNECT_INTERVAL, ClaimedProcess, Handle, Observer, Supervised, qga};
use async_trait::async_trait;
use qapi::qga::GuestShutdownMode;
use qapi::qmp::{self, BlockErrorAction, Event, QmpCommand, RunState, ShutdownCause};
use scalebox_units::{Bytes, VmId};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::broadcast;
use tokio::time::{Instant, sleep, timeout};

/// Timeout for restoring a lost control connection, before a warning and the next attempt.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout from the guest's power-off to the exit of the process. In between QEMU flushes the disk.
const QUIT_TIMEOUT: Duration = Duration::from_secs(30);

/// The reason why connecting to a process failed.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// The process has ended.
    Ended,
    /// The process is alive but did not respond in time; holds the last attempt's error.
    TimedOut(String),
}

/// Connects to the control socket and the console of a process, and starts its monitor.
pub(crate) async fn connect(
    claimed: ClaimedProcess,
    within: Duration,
) -> Result<Arc<QemuMachine>, (ClaimedProcess, ConnectError)> {
    let connections = async {
        let (qmp, events) = connect_qmp(&claimed.process, &claimed.dir, within).await?;
        let console = UnixStream::connect(claimed.dir.console()).await;
        let console = console.map_err(|error| ConnectError::TimedOut(format!("console: {error}")))?;
        Ok((qmp, events, console))
    };
    match connections.await {
        Ok((qmp, events, console)) => Ok(QemuMachine::new(claimed, qmp, events, console)),
        Err(why) => Err((claimed, why)),
    }
}

/// Retries until QEMU responds, ends, or the time is up.
async fn connect_qmp(process: &Process, dir: &RunDir, within: Duration) -> Result<(Qmp, Events), ConnectError> {
    let control = dir.control();
    let deadline = Instant::now() + within;
    loop {
        let why = tokio::select! {
            () = process.exited() => return Err(ConnectError::Ended),
            attempt = Qmp::connect(&control) => match attempt {
                Ok(connected) => return Ok(connected),
                Err(why) => why,
            }
        };
        if Instant::now() >= deadline {
            return Err(ConnectError::TimedOut(format!("control socket: {why}")));
        }
        sleep(CONNECT_INTERVAL).await;
    }
}

/// A handle to the machine. Dropping it releases the machine for another process to adopt.
pub(crate) struct QemuMachine {
    handle: Handle,
    qemu: Arc<Connection>,
}

/// The machine and its control connection, which handle and monitor share.
struct Connection {
    machine: Arc<Supervised>,
    /// The connection, which is replaced when it breaks. A `std` mutex: locked only to clone the
    /// value, never across an await.
    qmp: Mutex<Qmp>,
}

impl QemuMachine {
    fn new(claimed: ClaimedProcess, qmp: Qmp, events: Events, console: UnixStream) -> Arc<QemuMachine> {
        let (machine, console_log) = Supervised::new(claimed);
        let qemu = Arc::new(Connection {
            machine: Arc::new(machine),
            qmp: Mutex::new(qmp),
        });
        let observer = QmpObserver {
            qemu: qemu.clone(),
            events,
        };
        let handle = Handle::new(qemu.machine.clone(), observer, console, console_log);
        Arc::new(QemuMachine { handle, qemu })
    }

    pub(crate) async fn execute<C>(&self, name: &'static str, command: C) -> Result<C::Ok>
    where
        C: QmpCommand + Send + 'static,
        C::Ok: Send,
    {
        self.qemu.execute(name, command).await
    }

    /// Returns QEMU's output so far.
    pub(crate) fn stderr_text(&self) -> String {
        self.handle.stderr.text()
    }

    /// Handles that the guest has powered itself off, and that QEMU waits for `quit`.
    pub(crate) fn on_guest_shutdown(&self) {
        self.qemu.on_guest_shutdown();
    }

    /// Resumes a paused guest, which could not react to a shutdown request.
    async fn resume_if_paused(&self) -> Result<()> {
        match self.state().await? {
            MachineState::Paused | MachineState::Stalled => self.resume().await,
            MachineState::Running | MachineState::Ended(_) => Ok(()),
        }
    }

    /// Presses the power button and requests a shutdown from the agent; either may be enough.
    async fn request_shutdown(&self) {
        let button = self.execute("system_powerdown", qmp::system_powerdown {});
        let agent = qga::request_shutdown(self.channel(Channel::Qga), GuestShutdownMode::Powerdown);
        let (button, ()) = futures::join!(button, agent);
        if let Err(error) = button {
            tracing::debug!(machine = %self.handle.id, %error, "cannot press the power button");
        }
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn id(&self) -> &VmId {
        &self.handle.id
    }

    fn pid(&self) -> i32 {
        self.handle.process.pid()
    }

    async fn state(&self) -> Result<MachineState> {
        let status = match self.execute("query-status", qmp::query_status {}).await {
            Ok(answer) => answer.status,
            Err(Error::Ended { reason, .. }) => return Ok(MachineState::Ended(reason)),
            Err(error) => return Err(error),
        };
        Ok(match status {
            RunState::running => MachineState::Running,
            RunState::io_error => MachineState::Stalled,
            // The guest has powered off; the process is about to exit.
            RunState::shutdown => MachineState::Ended(self.exited().await),
            _ => MachineState::Paused,
        })
    }

    async fn pause(&self) -> Result<()> {
        self.execute("stop", qmp::stop {}).await.map(drop)
    }

    async fn resume(&self) -> Result<()> {
        self.execute("cont", qmp::cont {}).await.map(drop)
    }

    async fn resize_root(&self, size: Bytes) -> Result<()> {
        let resize = |size| {
            let node_name = Some(ROOT_NODE.to_owned());
            let device = None;
            self.execute(
                "block_resize",
                qmp::block_resize {
                    device,
                    node_name,
                    size,
                },
            )
        };
        self.handle
            .grow_root(size, |bytes| async move { resize(bytes).await.map(drop) })
            .await
    }

    fn supports_discard(&self) -> bool {
        true
    }

    async fn limit_disk(&self, limits: DiskLimits) -> Result<()> {
        // Zero means no limit to QEMU.
        let throttle = qmp::BlockIOThrottle {
            id: Some(ROOT_DEVICE.to_owned()),
            iops: limits.iops.map_or(0, i64::from),
            bps: limits
                .bytes_per_second
                .map_or(0, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
            ..no_throttle()
        };
        self.execute("block_set_io_throttle", qmp::block_set_io_throttle(throttle))
            .await
            .map(drop)
    }

    async fn stop(&self, grace: Duration) -> Result<ExitReason> {
        self.handle
            .stop(grace, self.resume_if_paused(), || self.request_shutdown())
            .await
    }

    async fn kill(&self) -> Result<ExitReason> {
        self.handle.kill_and_wait().await
    }

    async fn exited(&self) -> ExitReason {
        self.handle.exited().await
    }

    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.handle.events()
    }

    async fn channel(&self, channel: Channel) -> Result<UnixStream> {
        let stream = UnixStream::connect(self.handle.dir.channel(channel)).await;
        self.handle.channel(stream)
    }
}

#[allow(deprecated, reason = "the initializer must name every field")]
fn no_throttle() -> qmp::BlockIOThrottle {
    qmp::BlockIOThrottle {
        device: None,
        id: None,
        group: None,
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        bps_max: None,
        bps_max_length: None,
        bps_rd_max: None,
        bps_rd_max_length: None,
        bps_wr_max: None,
        bps_wr_max_length: None,
        iops_max: None,
        iops_max_length: None,
        iops_rd_max: None,
        iops_rd_max_length: None,
        iops_wr_max: None,
        iops_wr_max_length: None,
        iops_size: None,
    }
}

impl Connection {
    async fn execute<C>(&self, name: &'static str, command: C) -> Result<C::Ok>
    where
        C: QmpCommand + Send + 'static,
        C::Ok: Send,
    {
        let qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let error = match qmp.execute(command).await {
            Ok(response) => return Ok(response),
            Err(error) => error,
        };
        if let Some(ended) = self.machine.ended_error().await {
            return Err(ended);
        }
        let (id, command) = (self.machine.id.clone(), name);
        Err(match error {
            QmpError::TimedOut(after) => Error::Hung { id, command, after },
            QmpError::Refused(why) => Error::Control { id, command, why },
        })
    }

    fn on_guest_shutdown(self: &Arc<Self>) {
        self.machine.set_cause(ExitReason::GuestShutdown);
        self.machine.publish(MachineEvent::GuestShutdown);
        // The rest runs in a task of its own: the response to `quit` arrives through the monitor,
        // which calls this.
        let qemu = self.clone();
        tokio::spawn(async move {
            let machine = &qemu.machine;
            let quit = qemu.execute("quit", qmp::quit {}).await;
            if timeout(QUIT_TIMEOUT, machine.process.exited()).await.is_ok() {
                return;
            }
            tracing::warn!(machine = %machine.id, ?quit, "QEMU did not exit after the guest powered off; killing QEMU");
            if let Err(error) = machine.process.kill() {
                tracing::warn!(machine = %machine.id, %error, "cannot kill QEMU");
            }
        });
    }

    /// Kills the machine if the hypervisor itself has failed (KVM could not continue), which causes
    /// an unexpected stop. Such a machine can never resume.
    fn kill_after_internal_error(self: &Arc<Self>) {
        let qemu = self.clone();
        tokio::spawn(async move {
            let machine = &qemu.machine;
            let status = qemu
                .execute("query-status", qmp::query_status {})
                .await
                .map(|answer| answer.status);
            if !matches!(status, Ok(RunState::internal_error)) {
                return;
            }
            let detail = format!("internal error; {}", machine.stderr.text().trim());
            if let Err(error) = machine.kill(ExitReason::Crashed { detail }) {
                tracing::warn!(machine = %machine.id, %error, "cannot kill QEMU after its internal error");
            }
        });
    }

    fn on_event(self: &Arc<Self>, event: Event) {
        let machine = &self.machine;
        match event {
            Event::SHUTDOWN { data, .. } => match data.reason {
                ShutdownCause::guest_shutdown => self.on_guest_shutdown(),
                ShutdownCause::host_qmp_quit | ShutdownCause::host_signal | ShutdownCause::host_ui => {
                    machine.set_cause(ExitReason::Killed);
                }
                other => tracing::warn!(machine = %machine.id, reason = ?other, "unexpected shutdown"),
            },
            Event::RESET { data, .. } if data.guest => machine.publish(MachineEvent::GuestReboot),
            // Our own agent opens its port long before the guest's system is up.
            Event::VSERPORT_CHANGE { data, .. } if data.open && data.id == QGA_PORT => {
                tracing::debug!(machine = %machine.id, "qemu-guest-agent opened its port");
                machine.publish(MachineEvent::AgentUp);
            }
            Event::STOP { .. } => {
                machine.publish(MachineEvent::Stopped);
                self.kill_after_internal_error();
            }
            Event::RESUME { .. } => machine.publish(MachineEvent::Resumed),
            Event::BLOCK_IO_ERROR { data, .. } if data.action == BlockErrorAction::stop => {
                tracing::warn!(machine = %machine.id, reason = %data.reason, "a disk request failed on the host; the guest is paused");
                let nospace = data.nospace.unwrap_or(false);
                machine.publish(MachineEvent::IoError {
                    nospace,
                    reason: data.reason,
                });
            }
            _ => {}
        }
    }
}

/// The QEMU part of the monitor: the events of the control socket.
struct QmpObserver {
    qemu: Arc<Connection>,
    events: Events,
}

impl Observer for QmpObserver {
    /// Reconnects when the connection is lost.
    async fn process_events(&mut self) {
        let machine = self.qemu.machine.clone();
        loop {
            self.process_last_events().await;
            match connect_qmp(&machine.process, &machine.dir, RECONNECT_TIMEOUT).await {
                Ok((qmp, events)) => {
                    tracing::info!(machine = %machine.id, "reconnected to the control socket");
                    *self.qemu.qmp.lock().unwrap_or_else(PoisonError::into_inner) = qmp;
                    self.events = events;
                }
                // The monitor detects the end of the process itself.
                Err(ConnectError::Ended) => std::future::pending().await,
                Err(ConnectError::TimedOut(why)) => {
                    tracing::warn!(machine = %machine.id, why, "cannot connect to the control socket")
                }
            }
        }
    }

    async fn process_last_events(&mut self) {
        while let Some(event) = self.events.next().await {
            self.qemu.on_event(event);
        }
    }
}
