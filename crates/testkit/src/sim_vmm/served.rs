//! The real agent of a simulated guest: the connections that wait for the guest to boot, and the
//! threads that serve them from then on.

use scalebox_agent::Agent;
use scalebox_agent_api::InitKind;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use tokio::runtime::{Builder, Runtime};

/// Serves one connection with the agent.
pub(crate) type Session = Box<dyn FnOnce(Arc<Agent>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// The real agent of a guest, from one boot to the next.
#[derive(Default)]
pub(crate) struct Served {
    opened: usize,
    is_booted: bool,
    guest: Option<Guest>,
    /// Connections that wait for the guest to boot, as in the buffer of a serial port.
    waiting: Vec<Session>,
}

impl Served {
    /// Returns how many connections were opened.
    pub(crate) fn opened(&self) -> usize {
        self.opened
    }

    /// Serves a connection, once the guest has booted.
    pub(crate) fn add(&mut self, session: Session) -> io::Result<()> {
        if !self.is_booted {
            self.waiting.push(session);
            return Ok(());
        }
        let guest = match self.guest.take() {
            Some(guest) => guest,
            None => Guest::new()?,
        };
        guest.serve(session);
        self.guest = Some(guest);
        Ok(())
    }

    /// Counts a connection that is opened.
    pub(crate) fn count(&mut self) {
        self.opened += 1;
    }

    /// Begins to serve: the guest has booted.
    pub(crate) fn start(&mut self) {
        self.is_booted = true;
        for session in std::mem::take(&mut self.waiting) {
            // For the host, an error looks like an agent that does not respond.
            let _ = self.add(session);
        }
    }

    /// Ends the agent with its guest. Its connections stay open and silent, as those of a serial
    /// port do.
    pub(crate) fn stop(&mut self) {
        self.is_booted = false;
        self.guest = None;
        self.waiting.clear();
    }
}

/// A guest in which the agent runs.
struct Guest {
    agent: Arc<Agent>,
    /// Always present; an option so that it can be taken out on drop.
    runtime: Option<Runtime>,
}

impl Guest {
    fn new() -> io::Result<Guest> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Guest {
            agent: Agent::new(InitKind::System),
            runtime: Some(runtime),
        })
    }

    fn serve(&self, session: Session) {
        if let Some(runtime) = &self.runtime {
            runtime.spawn(session(self.agent.clone()));
        }
    }
}

impl Drop for Guest {
    /// Does not wait for the agent's threads: the caller may be asynchronous.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
