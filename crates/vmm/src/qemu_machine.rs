//! A machine that is one QEMU process: the handle, and the attendant behind it.
//!
//! Per machine there are two tasks in this process: the *attendant*, which hears what QEMU says,
//! notes how the machine ends and cleans up after it, and the console's drain. Both end with the
//! machine, or when the handle is dropped.

use crate::arguments::{ROOT_DEVICE, ROOT_NODE};
use crate::machine::{DiskLimits, ExitReason, Machine, MachineEvent, MachineId, MachineState};
use crate::messages::Messages;
use crate::process::Process;
use crate::qmp::{Events, Qmp, QmpError};
use crate::run_dir::{Lock, Record, RunDir};
use crate::{Error, Result, agent, console};
use async_trait::async_trait;
use qapi::qga::GuestShutdownMode;
use qapi::qmp::{self, BlockErrorAction, Event, QmpCommand, RunState, ShutdownCause};
use scalebox_units::Bytes;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep, timeout};

/// Between two attempts to connect: a socket that is not there yet announces itself in no other
/// way.
const CONNECT_INTERVAL: Duration = Duration::from_millis(5);
/// The longest that a lost control connection is sought again, before the next attempt.
const RECONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Between two requests to shut down: one made while the guest boots is lost.
pub(crate) const SHUTDOWN_INTERVAL: Duration = Duration::from_secs(2);
/// The longest from the guest's power-off to the process' end: QEMU flushes the disk in between.
const QUIT_DEADLINE: Duration = Duration::from_secs(30);
/// The longest that a dead machine's last events and console output are waited for.
pub(crate) const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(1);
/// Events by which a slow receiver may lag behind.
pub(crate) const EVENTS_KEPT: usize = 64;
/// A disk's size is a multiple of this, in bytes: virtio counts in sectors (virtio 1.2, section
/// 5.2.4).
const SECTOR: u64 = 512;

/// A process that is ours to control, not connected to yet.
pub(crate) struct Held {
    pub id: MachineId,
    pub dir: RunDir,
    pub lock: Lock,
    pub process: Process,
    pub messages: Messages,
    pub root: PathBuf,
    pub console_log: PathBuf,
}

/// Why a process could not be connected to.
#[derive(Debug)]
pub(crate) enum Unreached {
    /// It has ended.
    Ended,
    /// It lives, and did not answer in time: what the last attempt said.
    Late(String),
}

impl Held {
    /// A machine that was found again by its record.
    pub(crate) fn again(process: Process, record: Record, dir: &RunDir, lock: Lock, messages: Messages) -> Held {
        let Record {
            id, root, console_log, ..
        } = record;
        Held {
            id,
            dir: dir.clone(),
            lock,
            process,
            messages,
            root,
            console_log,
        }
    }

    /// Puts the machine on record, for whoever adopts it.
    pub(crate) fn record(&self, argv: Vec<String>) -> io::Result<()> {
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

    /// Connects the control socket and the console, and sets the attendant to work.
    pub(crate) async fn connect(self, within: Duration) -> Result<Arc<QemuMachine>, (Held, Unreached)> {
        let reached = async {
            let (qmp, events) = reach(&self.process, &self.dir, within).await?;
            let console = UnixStream::connect(self.dir.console()).await;
            Ok((
                qmp,
                events,
                console.map_err(|error| Unreached::Late(format!("console: {error}")))?,
            ))
        };
        match reached.await {
            Ok((qmp, events, console)) => Ok(QemuMachine::new(self, qmp, events, console)),
            Err(why) => Err((self, why)),
        }
    }
}

/// Tries until QEMU answers, ends, or time is up.
async fn reach(process: &Process, dir: &RunDir, within: Duration) -> Result<(Qmp, Events), Unreached> {
    let control = dir.control();
    let deadline = Instant::now() + within;
    loop {
        let why = tokio::select! {
            () = process.exited() => return Err(Unreached::Ended),
            attempt = Qmp::connect(&control) => match attempt {
                Ok(reached) => return Ok(reached),
                Err(why) => why,
            }
        };
        if Instant::now() >= deadline {
            return Err(Unreached::Late(format!("control socket: {why}")));
        }
        sleep(CONNECT_INTERVAL).await;
    }
}

/// The handle. Dropping it lets go of the machine: another may adopt it.
pub(crate) struct QemuMachine {
    shared: Arc<Shared>,
    tasks: [AbortHandle; 2],
}

struct Shared {
    id: MachineId,
    dir: RunDir,
    process: Process,
    messages: Messages,
    root: PathBuf,
    /// Given back before the end is announced, so that who waited for the end can launch again.
    lock: Mutex<Option<Lock>>,
    /// Replaced when the connection breaks. A `std` mutex: held to clone it, never across an await.
    qmp: Mutex<Qmp>,
    /// How the machine is about to end, as soon as that is known. The first to know is right.
    cause: Mutex<Option<ExitReason>>,
    /// The largest size that the root disk was asked to have. Held while a request is under way:
    /// QEMU would carry out a smaller one that arrives late, and cut off the disk's end.
    asked: tokio::sync::Mutex<Bytes>,
    events: broadcast::Sender<MachineEvent>,
    ended: watch::Sender<Option<ExitReason>>,
}

impl QemuMachine {
    fn new(held: Held, qmp: Qmp, events: Events, console: UnixStream) -> Arc<QemuMachine> {
        let Held {
            id,
            dir,
            lock,
            process,
            messages,
            root,
            console_log,
        } = held;
        let shared = Arc::new(Shared {
            id,
            dir,
            process,
            messages,
            root,
            lock: Mutex::new(Some(lock)),
            qmp: Mutex::new(qmp),
            cause: Mutex::default(),
            asked: tokio::sync::Mutex::new(Bytes::ZERO),
            events: broadcast::Sender::new(EVENTS_KEPT),
            ended: watch::Sender::new(None),
        });
        let drain = tokio::spawn(console::drain(console, console_log));
        let drain_handle = drain.abort_handle();
        let attendant = tokio::spawn(attend(shared.clone(), events, drain));
        Arc::new(QemuMachine {
            shared,
            tasks: [attendant.abort_handle(), drain_handle],
        })
    }

    pub(crate) async fn execute<C>(&self, name: &'static str, command: C) -> Result<C::Ok>
    where
        C: QmpCommand + Send + 'static,
        C::Ok: Send,
    {
        self.shared.execute(name, command).await
    }

    /// What QEMU has said so far.
    pub(crate) fn messages(&self) -> String {
        self.shared.messages.text()
    }

    /// The guest powered itself off, and QEMU waits to be told to go.
    pub(crate) fn guest_has_shut_down(&self) {
        self.shared.note_guest_shutdown();
    }

    /// A guest that stands still hears nothing.
    async fn let_a_standing_guest_go(&self) {
        let resumed = match self.state().await {
            Ok(MachineState::Paused | MachineState::Stalled) => self.resume().await,
            other => other.map(drop),
        };
        if let Err(error) = resumed {
            tracing::warn!(machine = %self.shared.id, %error, "not resumed for its shutdown");
        }
    }

    /// Presses the power button and asks the agent; either may be enough.
    async fn ask_to_shut_down(&self) {
        let button = self.shared.execute("system_powerdown", qmp::system_powerdown {});
        let agent = agent::ask_to_shut_down(self.agent(), GuestShutdownMode::Powerdown);
        let (button, ()) = futures::join!(button, agent);
        if let Err(error) = button {
            tracing::debug!(machine = %self.shared.id, %error, "power button not pressed");
        }
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn id(&self) -> &MachineId {
        &self.shared.id
    }

    fn pid(&self) -> i32 {
        self.shared.process.pid()
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
            // Powered off; the process is on its way out.
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
        let mut asked = self.shared.asked.lock().await;
        let bytes = check_growth(&self.shared.id, &self.shared.root, *asked, size)?;
        // Before it is sent: whether it arrived is not known if this future is dropped.
        *asked = size;
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

    fn takes_discards(&self) -> bool {
        true
    }

    async fn limit_disk(&self, limits: DiskLimits) -> Result<()> {
        // Zero is QEMU's word for no limit.
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
        let asking = async {
            self.let_a_standing_guest_go().await;
            loop {
                self.ask_to_shut_down().await;
                sleep(SHUTDOWN_INTERVAL).await;
            }
        };
        let obeyed = async {
            tokio::select! {
                biased;
                reason = self.exited() => reason,
                never = asking => never,
            }
        };
        if let Ok(reason) = timeout(grace, obeyed).await {
            return Ok(reason);
        }
        if self.shared.cause().is_some() {
            // Powered off in time, and busy flushing its disk; bounded by QUIT_DEADLINE.
            return Ok(self.exited().await);
        }
        tracing::warn!(machine = %self.shared.id, ?grace, "did not shut down in time: killed");
        self.kill().await
    }

    async fn kill(&self) -> Result<ExitReason> {
        self.shared.kill(ExitReason::Killed)?;
        Ok(self.exited().await)
    }

    async fn exited(&self) -> ExitReason {
        wait_for_end(&self.shared.ended).await
    }

    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.shared.events.subscribe()
    }

    async fn agent(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(self.shared.dir.agent()).await;
        stream.map_err(|error| Error::Agent {
            id: self.shared.id.clone(),
            why: error.to_string(),
        })
    }
}

#[allow(deprecated, reason = "a field that is left empty has to be named all the same")]
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

impl Shared {
    async fn execute<C>(&self, name: &'static str, command: C) -> Result<C::Ok>
    where
        C: QmpCommand + Send + 'static,
        C::Ok: Send,
    {
        let qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let failure = match qmp.execute(command).await {
            Ok(answer) => return Ok(answer),
            Err(failure) => failure,
        };
        if let Some(reason) = self.ended_by_now().await {
            return Err(Error::Ended {
                id: self.id.clone(),
                reason,
            });
        }
        let (id, command) = (self.id.clone(), name);
        Err(match failure {
            QmpError::Hung(after) => Error::Hung { id, command, after },
            QmpError::Refused(why) => Error::Control { id, command, why },
        })
    }

    /// How the machine ended, if it has. A broken connection is often the first sign: the rest
    /// follows in an instant.
    async fn ended_by_now(&self) -> Option<ExitReason> {
        let mut ended = self.ended.subscribe();
        if self.process.lives() {
            return None;
        }
        let reason = timeout(2 * LAST_WORDS_DEADLINE, ended.wait_for(Option::is_some)).await;
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

    fn announce(&self, event: MachineEvent) {
        // Nobody listening is no fault.
        let _ = self.events.send(event);
    }

    fn note_guest_shutdown(self: &Arc<Self>) {
        self.cause().get_or_insert(ExitReason::GuestShutdown);
        self.announce(MachineEvent::GuestShutdown);
        // Its own task: the answer comes in through the attendant, who called this.
        let shared = self.clone();
        tokio::spawn(async move {
            let quit = shared.execute("quit", qmp::quit {}).await;
            if timeout(QUIT_DEADLINE, shared.process.exited()).await.is_ok() {
                return;
            }
            tracing::warn!(machine = %shared.id, ?quit, "QEMU did not go after its guest: killed");
            if let Err(error) = shared.process.kill() {
                tracing::warn!(machine = %shared.id, %error, "QEMU not killed");
            }
        });
    }

    /// A stop that nobody asked for may be the hypervisor's own failure (KVM could not go on): that
    /// machine never resumes.
    fn look_why_it_stopped(self: &Arc<Self>) {
        let shared = self.clone();
        tokio::spawn(async move {
            let status = shared
                .execute("query-status", qmp::query_status {})
                .await
                .map(|answer| answer.status);
            if !matches!(status, Ok(RunState::internal_error)) {
                return;
            }
            let detail = format!("internal error; {}", shared.messages.text().trim());
            if let Err(error) = shared.kill(ExitReason::Crashed { detail }) {
                tracing::warn!(machine = %shared.id, %error, "broken QEMU not killed");
            }
        });
    }

    fn hear(self: &Arc<Self>, event: Event) {
        match event {
            Event::SHUTDOWN { data, .. } => match data.reason {
                ShutdownCause::guest_shutdown => self.note_guest_shutdown(),
                ShutdownCause::host_qmp_quit | ShutdownCause::host_signal | ShutdownCause::host_ui => {
                    self.cause().get_or_insert(ExitReason::Killed);
                }
                other => tracing::warn!(machine = %self.id, reason = ?other, "shut down"),
            },
            Event::RESET { data, .. } if data.guest => self.announce(MachineEvent::GuestReboot),
            // The only such port is the agent's.
            Event::VSERPORT_CHANGE { data, .. } if data.open => {
                tracing::debug!(machine = %self.id, "the guest's agent is up");
                self.announce(MachineEvent::AgentUp);
            }
            Event::STOP { .. } => {
                self.announce(MachineEvent::Stopped);
                self.look_why_it_stopped();
            }
            Event::RESUME { .. } => self.announce(MachineEvent::Resumed),
            Event::BLOCK_IO_ERROR { data, .. } if data.action == BlockErrorAction::stop => {
                tracing::warn!(machine = %self.id, reason = %data.reason, "disk request refused by the host: guest stands still");
                let nospace = data.nospace.unwrap_or(false);
                self.announce(MachineEvent::IoError {
                    nospace,
                    reason: data.reason,
                });
            }
            _ => {}
        }
    }
}

/// The attendant: hears what QEMU says until the process has ended, then cleans up and announces
/// the end.
async fn attend(shared: Arc<Shared>, mut events: Events, drain: JoinHandle<()>) {
    tokio::select! {
        () = shared.process.exited() => {}
        () = shared.messages.listen() => {}
        () = hear_all(&shared, &mut events) => {}
    }
    let last_words = async {
        while let Some(event) = events.next().await {
            shared.hear(event);
        }
        // Ends with the console's socket. A drain that fell over has said so.
        drain.await.ok();
    };
    if timeout(LAST_WORDS_DEADLINE, last_words).await.is_err() {
        tracing::warn!(machine = %shared.id, "its last words may be lost");
    }
    let status = shared.process.reap();
    let reason = shared
        .cause()
        .take()
        .unwrap_or_else(|| crash(status, &shared.messages.text(), shared.dir.ran_out_of_memory()));
    shared.dir.clear();
    shared.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    shared.announce(MachineEvent::Ended(reason.clone()));
    shared.ended.send_replace(Some(reason));
}

/// Hears events for ever, over one connection after the other.
async fn hear_all(shared: &Arc<Shared>, events: &mut Events) {
    loop {
        while let Some(event) = events.next().await {
            shared.hear(event);
        }
        match reach(&shared.process, &shared.dir, RECONNECT_DEADLINE).await {
            Ok((qmp, again)) => {
                tracing::info!(machine = %shared.id, "control connection restored");
                *shared.qmp.lock().unwrap_or_else(PoisonError::into_inner) = qmp;
                *events = again;
            }
            // The attendant sees the end by itself.
            Err(Unreached::Ended) => std::future::pending().await,
            Err(Unreached::Late(why)) => tracing::warn!(machine = %shared.id, why, "no control connection"),
        }
    }
}

/// Waits for the attendant's word on how the machine ended.
pub(crate) async fn wait_for_end(ended: &watch::Sender<Option<ExitReason>>) -> ExitReason {
    let mut ended = ended.subscribe();
    let reason = ended.wait_for(Option::is_some).await;
    // The sender lives as long as the machine's handle.
    reason
        .ok()
        .and_then(|reason| reason.clone())
        .unwrap_or(ExitReason::Unknown)
}

/// Refuses a size below the disk's, or below the largest asked for before, or not in sectors. Gives
/// the size in bytes.
pub(crate) fn check_growth(id: &MachineId, root: &Path, asked: Bytes, size: Bytes) -> Result<i64> {
    let wrong = |why| Error::Spec {
        id: id.clone(),
        what: "size",
        why,
    };
    let length = root.metadata().map_err(Error::io("look at", root))?.len();
    let least = Bytes::new(length).max(asked);
    if size < least {
        return Err(wrong(format!(
            "{size} is less than the disk's {least}, and a disk does not get smaller"
        )));
    }
    match i64::try_from(size.as_u64()) {
        Ok(bytes) if size.as_u64().is_multiple_of(SECTOR) => Ok(bytes),
        _ => Err(wrong(format!("{} bytes are not sectors of {SECTOR}", size.as_u64()))),
    }
}

pub(crate) fn crash(status: Option<String>, messages: &str, out_of_memory: bool) -> ExitReason {
    let mut status = status.unwrap_or_else(|| "its process is gone".to_owned());
    if out_of_memory {
        status += ", because it took more memory than its machine may have";
    }
    let detail = match messages.trim() {
        "" => status,
        said => format!("{status}; it said: {said}"),
    };
    ExitReason::Crashed { detail }
}
