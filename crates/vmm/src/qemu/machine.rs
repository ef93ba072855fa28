//! A machine that runs in one QEMU process: the handle, and the tasks behind it.
//!
//! Each machine has two tasks in this process. The *monitor* processes QEMU's events, records how
//! the machine ends, and cleans up. The other task reads the console. Both end with the machine, or
//! when the handle is dropped.

use crate::machine::{DiskLimits, ExitReason, Machine, MachineEvent, MachineState};
use crate::process::Process;
use crate::qemu::arguments::{ROOT_DEVICE, ROOT_NODE};
use crate::qemu::qmp::{Events, Qmp, QmpError};
use crate::run_dir::{Lock, Record, RunDir};
use crate::stderr::StderrPipe;
use crate::supervise::agent;
use crate::{Error, Result, console};
use async_trait::async_trait;
use qapi::qga::GuestShutdownMode;
use qapi::qmp::{self, BlockErrorAction, Event, QmpCommand, RunState, ShutdownCause};
use scalebox_units::{Bytes, VmId};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep, timeout};

/// Interval between connection attempts: no event announces a new socket.
const CONNECT_INTERVAL: Duration = Duration::from_millis(5);
/// Timeout for restoring a lost control connection, before a warning and the next attempt.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between shutdown requests: a request during the guest's boot is lost.
pub(crate) const SHUTDOWN_INTERVAL: Duration = Duration::from_secs(2);
/// Timeout from the guest's power-off to the exit of the process. In between QEMU flushes the disk.
const QUIT_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout for reading the last events and console output of an ended machine.
pub(crate) const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// How many events a slow receiver may lag behind.
pub(crate) const MAX_BUFFERED_EVENTS: usize = 64;
/// Disk sizes are multiples of this: virtio counts in sectors (virtio 1.2, section 5.2.4).
const SECTOR_BYTES: u64 = 512;

/// A process whose machine this process holds; not connected yet.
pub(crate) struct ClaimedProcess {
    pub id: VmId,
    pub dir: RunDir,
    pub lock: Lock,
    pub process: Process,
    pub stderr: StderrPipe,
    pub root: PathBuf,
    pub console_log: PathBuf,
}

/// Why connecting to a process failed.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// The process has ended.
    Ended,
    /// The process is alive but did not respond in time; holds the last attempt's error.
    TimedOut(String),
}

impl ClaimedProcess {
    /// Returns a machine's process that was found again by its record.
    pub(crate) fn from_record(
        process: Process,
        record: Record,
        dir: &RunDir,
        lock: Lock,
        stderr: StderrPipe,
    ) -> ClaimedProcess {
        let Record {
            id, root, console_log, ..
        } = record;
        ClaimedProcess {
            id,
            dir: dir.clone(),
            lock,
            process,
            stderr,
            root,
            console_log,
        }
    }

    /// Writes the record from which another process can adopt the machine.
    pub(crate) fn write_record(&self, argv: Vec<String>) -> io::Result<()> {
        let process = self.process.identity(argv)?;
        let (id, root, console_log) = (self.id.clone(), self.root.clone(), self.console_log.clone());
        self.dir
            .write(&Record {
                id,
                process,
                root,
                console_log,
            })
            .map_err(io::Error::other)
    }

    /// Connects to the control socket and the console, and starts the monitor task.
    pub(crate) async fn connect(self, within: Duration) -> Result<Arc<QemuMachine>, (ClaimedProcess, ConnectError)> {
        let connections = async {
            let (qmp, events) = connect_qmp(&self.process, &self.dir, within).await?;
            let console = UnixStream::connect(self.dir.console()).await;
            Ok((
                qmp,
                events,
                console.map_err(|error| ConnectError::TimedOut(format!("console: {error}")))?,
            ))
        };
        match connections.await {
            Ok((qmp, events, console)) => Ok(QemuMachine::new(self, qmp, events, console)),
            Err(why) => Err((self, why)),
        }
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

/// The handle. Dropping it releases the machine for another process to adopt.
pub(crate) struct QemuMachine {
    inner: Arc<Inner>,
    tasks: [AbortHandle; 2],
}

struct Inner {
    id: VmId,
    dir: RunDir,
    process: Process,
    stderr: StderrPipe,
    root: PathBuf,
    /// Released before the end is published, so that a caller that waited for the end can launch
    /// again.
    lock: Mutex<Option<Lock>>,
    /// Replaced when the connection breaks. A `std` mutex: locked only to clone the value, never
    /// across an await.
    qmp: Mutex<Qmp>,
    /// How the machine is about to end, once known. The first cause that is set wins.
    cause: Mutex<Option<ExitReason>>,
    /// The largest root disk size requested so far; locked during a request. QEMU would also
    /// execute a smaller, delayed request, and truncate the disk.
    max_requested: tokio::sync::Mutex<Bytes>,
    events: broadcast::Sender<MachineEvent>,
    ended: watch::Sender<Option<ExitReason>>,
}

impl QemuMachine {
    fn new(claimed: ClaimedProcess, qmp: Qmp, events: Events, console: UnixStream) -> Arc<QemuMachine> {
        let ClaimedProcess {
            id,
            dir,
            lock,
            process,
            stderr,
            root,
            console_log,
        } = claimed;
        let inner = Arc::new(Inner {
            id,
            dir,
            process,
            stderr,
            root,
            lock: Mutex::new(Some(lock)),
            qmp: Mutex::new(qmp),
            cause: Mutex::default(),
            max_requested: tokio::sync::Mutex::new(Bytes::ZERO),
            events: broadcast::Sender::new(MAX_BUFFERED_EVENTS),
            ended: watch::Sender::new(None),
        });
        let drain = tokio::spawn(console::drain(console, console_log));
        let drain_handle = drain.abort_handle();
        let monitor = tokio::spawn(monitor(inner.clone(), events, drain));
        Arc::new(QemuMachine {
            inner,
            tasks: [monitor.abort_handle(), drain_handle],
        })
    }

    pub(crate) async fn execute<C>(&self, name: &'static str, command: C) -> Result<C::Ok>
    where
        C: QmpCommand + Send + 'static,
        C::Ok: Send,
    {
        self.inner.execute(name, command).await
    }

    /// Returns QEMU's output so far.
    pub(crate) fn stderr_text(&self) -> String {
        self.inner.stderr.text()
    }

    /// Handles that the guest has powered itself off, and that QEMU waits for `quit`.
    pub(crate) fn on_guest_shutdown(&self) {
        self.inner.on_guest_shutdown();
    }

    /// A paused guest cannot react to a shutdown request.
    async fn resume_if_paused(&self) {
        let resumed = match self.state().await {
            Ok(MachineState::Paused | MachineState::Stalled) => self.resume().await,
            other => other.map(drop),
        };
        if let Err(error) = resumed {
            tracing::warn!(machine = %self.inner.id, %error, "cannot resume the machine for its shutdown");
        }
    }

    /// Presses the power button and asks the agent; either may be enough.
    async fn request_shutdown(&self) {
        let button = self.inner.execute("system_powerdown", qmp::system_powerdown {});
        let agent = agent::request_shutdown(self.agent(), GuestShutdownMode::Powerdown);
        let (button, ()) = futures::join!(button, agent);
        if let Err(error) = button {
            tracing::debug!(machine = %self.inner.id, %error, "cannot press the power button");
        }
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.inner.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn id(&self) -> &VmId {
        &self.inner.id
    }

    fn pid(&self) -> i32 {
        self.inner.process.pid()
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
            // Powered off; the process is about to exit.
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
        let mut max_requested = self.inner.max_requested.lock().await;
        let bytes = check_growth(&self.inner.id, &self.inner.root, *max_requested, size)?;
        // Updated before the request is sent: if this future is dropped, the request may still have
        // arrived.
        *max_requested = size;
        let node_name = Some(ROOT_NODE.to_owned());
        self.execute(
            "block_resize",
            qmp::block_resize {
                device: None,
                node_name,
                size: bytes,
            },
        )
        .await
        .map(drop)
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
        let requests = async {
            self.resume_if_paused().await;
            loop {
                self.request_shutdown().await;
                sleep(SHUTDOWN_INTERVAL).await;
            }
        };
        let ended = async {
            tokio::select! {
                biased;
                reason = self.exited() => reason,
                never = requests => never,
            }
        };
        if let Ok(reason) = timeout(grace, ended).await {
            return Ok(reason);
        }
        if self.inner.cause().is_some() {
            // Powered off in time, but still flushing its disk; bounded by QUIT_TIMEOUT.
            return Ok(self.exited().await);
        }
        tracing::warn!(machine = %self.inner.id, ?grace, "the guest did not shut down in time; killing it");
        self.kill().await
    }

    async fn kill(&self) -> Result<ExitReason> {
        self.inner.kill(ExitReason::Killed)?;
        Ok(self.exited().await)
    }

    async fn exited(&self) -> ExitReason {
        wait_for_exit(&self.inner.ended).await
    }

    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.inner.events.subscribe()
    }

    async fn agent(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(self.inner.dir.agent()).await;
        stream.map_err(|error| Error::Agent {
            id: self.inner.id.clone(),
            why: error.to_string(),
        })
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

impl Inner {
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
        if let Some(reason) = self.exit_reason_if_ended().await {
            return Err(Error::Ended {
                id: self.id.clone(),
                reason,
            });
        }
        let (id, command) = (self.id.clone(), name);
        Err(match error {
            QmpError::TimedOut(after) => Error::Hung { id, command, after },
            QmpError::Refused(why) => Error::Control { id, command, why },
        })
    }

    /// Returns how the machine ended, if it has. A broken connection is often the first sign, and
    /// the monitor follows at once.
    async fn exit_reason_if_ended(&self) -> Option<ExitReason> {
        let mut ended = self.ended.subscribe();
        if self.process.is_alive() {
            return None;
        }
        let reason = timeout(2 * DRAIN_TIMEOUT, ended.wait_for(Option::is_some)).await;
        reason.ok()?.ok()?.clone()
    }

    fn cause(&self) -> MutexGuard<'_, Option<ExitReason>> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kill(&self, cause: ExitReason) -> Result<()> {
        self.cause().get_or_insert(cause);
        self.process
            .kill()
            .map_err(Error::io("kill", format!("/proc/{}", self.process.pid())))
    }

    fn publish(&self, event: MachineEvent) {
        // Sending fails only if there are no receivers.
        let _ = self.events.send(event);
    }

    fn on_guest_shutdown(self: &Arc<Self>) {
        self.cause().get_or_insert(ExitReason::GuestShutdown);
        self.publish(MachineEvent::GuestShutdown);
        // In a task of its own: the response to `quit` arrives through the monitor, which calls
        // this.
        let inner = self.clone();
        tokio::spawn(async move {
            let quit = inner.execute("quit", qmp::quit {}).await;
            if timeout(QUIT_TIMEOUT, inner.process.exited()).await.is_ok() {
                return;
            }
            tracing::warn!(machine = %inner.id, ?quit, "QEMU did not exit after the guest powered off; killing it");
            if let Err(error) = inner.process.kill() {
                tracing::warn!(machine = %inner.id, %error, "cannot kill QEMU");
            }
        });
    }

    /// An unexpected stop may be a failure of the hypervisor itself (KVM could not continue). Such
    /// a machine can never resume, so it is killed.
    fn kill_after_internal_error(self: &Arc<Self>) {
        let inner = self.clone();
        tokio::spawn(async move {
            let status = inner
                .execute("query-status", qmp::query_status {})
                .await
                .map(|answer| answer.status);
            if !matches!(status, Ok(RunState::internal_error)) {
                return;
            }
            let detail = format!("internal error; {}", inner.stderr.text().trim());
            if let Err(error) = inner.kill(ExitReason::Crashed { detail }) {
                tracing::warn!(machine = %inner.id, %error, "cannot kill QEMU after its internal error");
            }
        });
    }

    fn on_event(self: &Arc<Self>, event: Event) {
        match event {
            Event::SHUTDOWN { data, .. } => match data.reason {
                ShutdownCause::guest_shutdown => self.on_guest_shutdown(),
                ShutdownCause::host_qmp_quit | ShutdownCause::host_signal | ShutdownCause::host_ui => {
                    self.cause().get_or_insert(ExitReason::Killed);
                }
                other => tracing::warn!(machine = %self.id, reason = ?other, "unexpected shutdown"),
            },
            Event::RESET { data, .. } if data.guest => self.publish(MachineEvent::GuestReboot),
            // The agent's port is the only one.
            Event::VSERPORT_CHANGE { data, .. } if data.open => {
                tracing::debug!(machine = %self.id, "the guest opened its agent port");
                self.publish(MachineEvent::AgentUp);
            }
            Event::STOP { .. } => {
                self.publish(MachineEvent::Stopped);
                self.kill_after_internal_error();
            }
            Event::RESUME { .. } => self.publish(MachineEvent::Resumed),
            Event::BLOCK_IO_ERROR { data, .. } if data.action == BlockErrorAction::stop => {
                tracing::warn!(machine = %self.id, reason = %data.reason, "a disk request failed on the host; the guest is paused");
                let nospace = data.nospace.unwrap_or(false);
                self.publish(MachineEvent::IoError {
                    nospace,
                    reason: data.reason,
                });
            }
            _ => {}
        }
    }
}

/// The monitor task: processes QEMU's events until the process has ended, then cleans up and
/// publishes the end.
async fn monitor(inner: Arc<Inner>, mut events: Events, drain: JoinHandle<()>) {
    tokio::select! {
        () = inner.process.exited() => {}
        () = inner.stderr.read_forever() => {}
        () = process_events(&inner, &mut events) => {}
    }
    let rest = async {
        while let Some(event) = events.next().await {
            inner.on_event(event);
        }
        // Ends when the console socket closes. A panic in the task has been logged already.
        drain.await.ok();
    };
    if timeout(DRAIN_TIMEOUT, rest).await.is_err() {
        tracing::warn!(machine = %inner.id, "the machine's last events or console output may be lost");
    }
    let status = inner.process.reap();
    let reason = inner
        .cause()
        .take()
        .unwrap_or_else(|| crash_reason(status, &inner.stderr.text(), inner.dir.ran_out_of_memory()));
    inner.dir.clear();
    inner.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    inner.publish(MachineEvent::Ended(reason.clone()));
    inner.ended.send_replace(Some(reason));
}

/// Processes events and never returns; reconnects when the connection is lost.
async fn process_events(inner: &Arc<Inner>, events: &mut Events) {
    loop {
        while let Some(event) = events.next().await {
            inner.on_event(event);
        }
        match connect_qmp(&inner.process, &inner.dir, RECONNECT_TIMEOUT).await {
            Ok((qmp, again)) => {
                tracing::info!(machine = %inner.id, "reconnected to the control socket");
                *inner.qmp.lock().unwrap_or_else(PoisonError::into_inner) = qmp;
                *events = again;
            }
            // The monitor detects the end of the process itself.
            Err(ConnectError::Ended) => std::future::pending().await,
            Err(ConnectError::TimedOut(why)) => {
                tracing::warn!(machine = %inner.id, why, "cannot connect to the control socket")
            }
        }
    }
}

/// Waits until the monitor has determined how the machine ended.
pub(crate) async fn wait_for_exit(ended: &watch::Sender<Option<ExitReason>>) -> ExitReason {
    let mut ended = ended.subscribe();
    let reason = ended.wait_for(Option::is_some).await;
    // The handle keeps the sender alive.
    reason
        .ok()
        .and_then(|reason| reason.clone())
        .unwrap_or(ExitReason::Unknown)
}

/// Checks the new size of a root disk, and returns it in bytes.
///
/// Rejects a size below the disk's or below the largest size requested so far, and a size that is
/// not a multiple of the sector size.
pub(crate) fn check_growth(id: &VmId, root: &Path, max_requested: Bytes, size: Bytes) -> Result<i64> {
    let invalid = |why| Error::Spec {
        id: id.clone(),
        what: "size",
        why,
    };
    let length = root.metadata().map_err(Error::io("read the metadata of", root))?.len();
    let min = Bytes::new(length).max(max_requested);
    if size < min {
        return Err(invalid(format!(
            "{size} is less than the disk's {min}; disks cannot shrink"
        )));
    }
    match i64::try_from(size.as_u64()) {
        Ok(bytes) if size.as_u64().is_multiple_of(SECTOR_BYTES) => Ok(bytes),
        _ => Err(invalid(format!(
            "{} bytes is not a multiple of {SECTOR_BYTES}",
            size.as_u64()
        ))),
    }
}

pub(crate) fn crash_reason(status: Option<String>, stderr: &str, out_of_memory: bool) -> ExitReason {
    let mut status = status.unwrap_or_else(|| "the process is gone".to_owned());
    if out_of_memory {
        status += ", because it exceeded the memory limit of its machine";
    }
    let detail = match stderr.trim() {
        "" => status,
        output => format!("{status}; output: {output}"),
    };
    ExitReason::Crashed { detail }
}
