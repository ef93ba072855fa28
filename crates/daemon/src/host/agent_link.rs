//! Connections to the agents of guests: at most one for each machine, and only while it is used.
//!
//! The first use of a machine's agent opens the connection, and later uses share it. The connection
//! is closed when it was idle for a minute, when the machine ends and when its guest reboots. The
//! next use opens another one. Each connection has one task, which ends with it.
//!
//! A std mutex guards the table. It is held for a look-up or a small change, never across an await.

use scalebox_guest::{AgentConnection, AgentError};
use scalebox_units::VmId;
use scalebox_vmm::{Channel, Error, Machine, MachineEvent};
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep, timeout};

/// Time for the agent to respond to the hello. A running agent takes milliseconds, also under
/// emulation; a guest that boots does not respond.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Time after which an idle connection is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for the agent to respond to an operation that can use another agent.
const FIND_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for which such operations use the other agent after our own did not respond.
const ABSENT_TIME: Duration = Duration::from_secs(30);

/// The connections to all agents. A clone is another handle on the same table.
#[derive(Clone, Default)]
pub(crate) struct AgentLinks(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    links: HashMap<VmId, Arc<Link>>,
    /// Times at which agents did not respond within [`FIND_TIMEOUT`].
    absent: HashMap<VmId, Instant>,
}

/// The connection to the agent of one machine, from its first use to its end.
struct Link {
    machine: Arc<dyn Machine>,
    state: watch::Sender<State>,
    /// Number of uses in progress.
    uses: watch::Sender<usize>,
}

#[derive(Clone)]
enum State {
    Connecting,
    Open(AgentConnection),
    Ended(AgentError),
}

/// A connection in use. While it exists, the connection is not closed for being idle.
pub(crate) struct Agent {
    connection: AgentConnection,
    _use: Use,
}

impl Deref for Agent {
    type Target = AgentConnection;

    fn deref(&self) -> &AgentConnection {
        &self.connection
    }
}

impl Clone for Agent {
    fn clone(&self) -> Agent {
        Agent {
            connection: self.connection.clone(),
            _use: Use::begin(&self._use.0),
        }
    }
}

/// Counts one use of a link until it is dropped.
struct Use(Arc<Link>);

impl Use {
    fn begin(link: &Arc<Link>) -> Use {
        link.uses.send_modify(|uses| *uses += 1);
        Use(Arc::clone(link))
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.uses.send_modify(|uses| *uses -= 1);
    }
}

impl AgentLinks {
    /// Returns the connection to the agent of a machine, and opens it if there is none.
    ///
    /// # Errors
    /// [`AgentError`] if the agent does not respond within [`HELLO_TIMEOUT`].
    pub(crate) async fn reach(&self, machine: &Arc<dyn Machine>) -> Result<Agent, AgentError> {
        let in_use = self.link(machine);
        let mut state = in_use.0.state.subscribe();
        // The link's task has the sender, and so has this use.
        let settled = state.wait_for(|state| !matches!(state, State::Connecting)).await;
        let settled = settled.map(|state| state.clone());
        match settled {
            Ok(State::Open(connection)) => Ok(Agent {
                connection,
                _use: in_use,
            }),
            Ok(State::Ended(error)) => Err(error),
            Ok(State::Connecting) | Err(_) => Err(AgentError::Unreachable {
                why: "the connection was closed".to_owned(),
            }),
        }
    }

    /// Returns the connection to the agent of a machine, for an operation that can use another
    /// agent. Returns `None` if the agent does not respond soon, or did not respond a short time
    /// ago.
    pub(crate) async fn find(&self, machine: &Arc<dyn Machine>) -> Option<Agent> {
        let id = machine.id();
        let was_absent = self.lock().absent.get(id).copied();
        if was_absent.is_some_and(|at| at.elapsed() < ABSENT_TIME) {
            return None;
        }
        if let Ok(Ok(agent)) = timeout(FIND_TIMEOUT, self.reach(machine)).await {
            return Some(agent);
        }
        let absent = &mut self.lock().absent;
        absent.retain(|_, at| at.elapsed() < ABSENT_TIME);
        absent.insert(id.clone(), Instant::now());
        None
    }

    /// Returns a use of the machine's link, after starting one if there is none.
    fn link(&self, machine: &Arc<dyn Machine>) -> Use {
        let links = &mut self.lock().links;
        if let Some(link) = links.get(machine.id())
            && Arc::ptr_eq(&link.machine, machine)
            && link.is_usable()
        {
            return Use::begin(link);
        }
        let link = Arc::new(Link {
            machine: Arc::clone(machine),
            state: watch::Sender::new(State::Connecting),
            uses: watch::Sender::new(0),
        });
        let in_use = Use::begin(&link);
        // The task of a replaced link ends by itself.
        links.insert(machine.id().clone(), Arc::clone(&link));
        tokio::spawn(run(self.clone(), link));
        in_use
    }

    /// Removes a link, so that the next use starts another one.
    fn remove(&self, link: &Arc<Link>) {
        link.remove_from(&mut self.lock().links);
    }

    /// Removes a link unless it is in use. Returns whether it was removed.
    fn remove_idle(&self, link: &Arc<Link>) -> bool {
        // A use begins under the same lock.
        let links = &mut self.lock().links;
        let is_idle = *link.uses.borrow() == 0;
        if is_idle {
            link.remove_from(links);
        }
        is_idle
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn remove_from(self: &Arc<Link>, links: &mut HashMap<VmId, Arc<Link>>) {
        let id = self.machine.id();
        if links.get(id).is_some_and(|current| Arc::ptr_eq(current, self)) {
            links.remove(id);
        }
    }

    fn is_usable(&self) -> bool {
        match &*self.state.borrow() {
            State::Connecting => true,
            State::Open(connection) => !connection.is_closed(),
            State::Ended(_) => false,
        }
    }

    /// Waits until the link has been idle for [`IDLE_TIMEOUT`].
    async fn idle(&self) {
        let mut uses = self.uses.subscribe();
        loop {
            // The link itself has the sender.
            let _ = uses.wait_for(|uses| *uses == 0).await;
            tokio::select! {
                () = sleep(IDLE_TIMEOUT) => return,
                _ = uses.changed() => {}
            }
        }
    }
}

/// Opens a link's connection, and closes it when it is idle or its agent has ended.
async fn run(links: AgentLinks, link: Arc<Link>) {
    let machine = &link.machine;
    // Subscribed first, so that a reboot during the hello is noticed.
    let mut events = machine.events();
    let opened = tokio::select! {
        opened = open(machine) => opened,
        reason = machine.exited() => Err(unreachable(reason)),
    };
    let connection = match opened {
        Ok(connection) => connection,
        Err(error) => {
            tracing::debug!(vm = %machine.id(), %error, "cannot reach the guest's agent");
            links.remove(&link);
            link.state.send_replace(State::Ended(error));
            return;
        }
    };
    tracing::debug!(vm = %machine.id(), "connected to the guest's agent");
    links.lock().absent.remove(machine.id());
    link.state.send_replace(State::Open(connection.clone()));
    let why = loop {
        tokio::select! {
            reason = machine.exited() => break reason.to_string(),
            () = reboot(&mut events) => break "the guest rebooted".to_owned(),
            () = connection.closed() => break "the connection ended".to_owned(),
            () = link.idle() => if links.remove_idle(&link) {
                break "the connection is idle".to_owned();
            },
        }
    };
    links.remove(&link);
    tracing::debug!(vm = %machine.id(), why, "closing the connection to the guest's agent");
    link.state.send_replace(State::Ended(unreachable(why)));
    connection.close();
}

async fn open(machine: &Arc<dyn Machine>) -> Result<AgentConnection, AgentError> {
    let stream = machine.channel(Channel::Agent).await.map_err(|error| match error {
        Error::Agent { why, .. } => unreachable(why),
        Error::Ended { reason, .. } => unreachable(reason),
        other => unreachable(other),
    })?;
    AgentConnection::open(stream, HELLO_TIMEOUT).await
}

/// Waits for a reboot of the guest. Under QEMU the stream stays open then, but the next bytes are
/// those of another agent.
async fn reboot(events: &mut broadcast::Receiver<MachineEvent>) {
    loop {
        match events.recv().await {
            Ok(MachineEvent::GuestReboot) => return,
            // One of the lost events may have been a reboot.
            Err(RecvError::Lagged(_)) => return,
            Err(RecvError::Closed) => return std::future::pending().await,
            Ok(_) => {}
        }
    }
}

fn unreachable(why: impl ToString) -> AgentError {
    AgentError::Unreachable { why: why.to_string() }
}
