//! The two tasks behind a held machine, and the handle that ends them.
//!
//! The *monitor* processes the hypervisor's events, records how the machine ends, and cleans up.
//! The other task records the console. Both end with the machine, or when the handle is dropped.

use crate::blocking::blocking;
use crate::console;
use crate::state::{ExitReason, MachineEvent};
use crate::supervise::supervised::{DRAIN_TIMEOUT, Supervised};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::AsyncRead;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;

/// The part of a monitor that depends on the hypervisor.
pub(crate) trait Observer: Send + Sync + 'static {
    /// Processes the hypervisor's events. Never returns; dropping the future loses no event.
    fn process_events(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// Processes the events that remain after the end of the process.
    fn process_last_events(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// Returns how the machine ended, if the exit status or the output shows it. It overrides a
    /// known cause.
    fn exit_reason(&self, _status: Option<&str>, _output: &str) -> Option<ExitReason> {
        None
    }

    /// Removes the files of the machine that are not in its run folder. Blocks.
    fn remove_other_files(&self) {}
}

/// Holds a machine. Dropping it releases the machine for another process to adopt.
pub(crate) struct Handle {
    machine: Arc<Supervised>,
    tasks: [AbortHandle; 2],
}

impl Handle {
    /// Starts the tasks of a machine.
    pub(crate) fn new(
        machine: Arc<Supervised>,
        observer: impl Observer,
        console: impl AsyncRead + Unpin + Send + 'static,
        console_log: PathBuf,
    ) -> Handle {
        let drain = tokio::spawn(console::drain(console, console_log));
        let drain_handle = drain.abort_handle();
        let monitor = tokio::spawn(monitor(machine.clone(), observer, drain));
        Handle {
            machine,
            tasks: [monitor.abort_handle(), drain_handle],
        }
    }
}

impl Deref for Handle {
    type Target = Supervised;

    fn deref(&self) -> &Supervised {
        &self.machine
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        drop(self.machine.take_lock());
    }
}

/// Waits until the process has ended, then cleans up and publishes the end.
async fn monitor(machine: Arc<Supervised>, mut observer: impl Observer, drain: JoinHandle<()>) {
    tokio::select! {
        () = machine.process.exited() => {}
        () = machine.stderr.read_forever() => {}
        () = observer.process_events() => {}
    }
    let rest = async {
        observer.process_last_events().await;
        // Ends when the console closes. A panic in the task has been logged already.
        drain.await.ok();
    };
    if timeout(DRAIN_TIMEOUT, rest).await.is_err() {
        tracing::warn!(machine = %machine.id, "the machine's last events or console output may be lost");
    }
    let (status, output) = (machine.process.reap(), machine.stderr.text());
    let shown = observer.exit_reason(status.as_deref(), &output);
    let Some(out_of_memory) = clean_up(&machine, observer).await else {
        return;
    };
    if shown == Some(ExitReason::GuestShutdown) {
        machine.publish(MachineEvent::GuestShutdown);
    }
    let cause = shown.or_else(|| machine.cause().take());
    machine.publish_end(cause.unwrap_or_else(|| crash_reason(status, &output, out_of_memory)));
}

/// Removes the machine's files and releases it. Returns whether the machine ran out of memory;
/// `None` if the handle was dropped, because another process may then hold the machine and its
/// files.
async fn clean_up(machine: &Supervised, observer: impl Observer) -> Option<bool> {
    // The cleanup owns the lock: also if the handle is dropped meanwhile, no other process takes
    // the machine before the cleanup is done.
    let (lock, dir) = (machine.take_lock()?, machine.dir.clone());
    let remove = move || {
        let out_of_memory = dir.ran_out_of_memory();
        observer.remove_other_files();
        dir.clear();
        drop(lock);
        out_of_memory
    };
    Some(blocking(remove).await)
}

fn crash_reason(status: Option<String>, output: &str, out_of_memory: bool) -> ExitReason {
    let mut status = status.unwrap_or_else(|| "the process is gone".to_owned());
    if out_of_memory {
        status += ", because it exceeded the memory limit of its machine";
    }
    let detail = match output.trim() {
        "" => status,
        output => format!("{status}; output: {output}"),
    };
    ExitReason::Crashed { detail }
}
