//! Our own agent in a simulated guest. It is the real agent, served on a thread of its own, or a
//! function of the test in its place.
//!
//! `operations` is between the host and the real agent: it simulates the operations on the guest as
//! a whole, which the real agent would perform on the host of the test.

mod operations;

use crate::sim_vmm::body::Body;
use crate::sim_vmm::guest::SimAgent;
use crate::sim_vmm::world::World;
use scalebox_agent_api::InitKind;
use scalebox_vmm::MachineState;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::thread;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

/// Opens a connection to the agent.
pub(crate) fn connect(world: &Arc<World>, body: &Arc<Body>) -> io::Result<UnixStream> {
    let mut inside = body.lock();
    let agent = inside.guest.agent.clone();
    if matches!(agent, SimAgent::Unreachable) || matches!(inside.state, MachineState::Ended(_)) {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    let (ours, theirs) = StdStream::pair()?;
    // The copy also keeps the connection of a silent agent open.
    inside.add_connection(theirs.try_clone()?);
    inside.served.opened += 1;
    match agent {
        SimAgent::Unreachable | SimAgent::Silent => {}
        SimAgent::Real => inside.served.add(Session {
            world: world.clone(),
            body: body.clone(),
            stream: theirs,
        })?,
        SimAgent::Scripted(serve) => drop(thread::spawn(move || serve(theirs))),
    }
    drop(inside);
    ours.set_nonblocking(true)?;
    UnixStream::from_std(ours)
}

/// The real agent of a guest, from one boot to the next.
#[derive(Default)]
pub(crate) struct Served {
    opened: usize,
    is_booted: bool,
    guest: Option<Guest>,
    /// Connections that wait for the guest to boot, as in the buffer of a serial port.
    waiting: Vec<Session>,
}

/// A connection to the real agent.
struct Session {
    world: Arc<World>,
    body: Arc<Body>,
    stream: StdStream,
}

impl Served {
    /// Returns how many connections were opened.
    pub(crate) fn opened(&self) -> usize {
        self.opened
    }

    /// Serves a connection, once the guest has booted.
    fn add(&mut self, session: Session) -> io::Result<()> {
        if !self.is_booted {
            self.waiting.push(session);
            return Ok(());
        }
        if self.guest.is_none() {
            self.guest = Some(Guest::new()?);
        }
        match &self.guest {
            Some(guest) => guest.serve(session),
            None => Ok(()),
        }
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
    agent: Arc<scalebox_agent::Agent>,
    /// Always present; an option so that it can be taken out on drop.
    runtime: Option<Runtime>,
}

impl Guest {
    fn new() -> io::Result<Guest> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Guest {
            agent: scalebox_agent::Agent::new(InitKind::System),
            runtime: Some(runtime),
        })
    }

    fn serve(&self, session: Session) -> io::Result<()> {
        let Some(runtime) = &self.runtime else { return Ok(()) };
        session.stream.set_nonblocking(true)?;
        let _inside = runtime.enter();
        let stream = UnixStream::from_std(session.stream)?;
        let agent = self.agent.clone();
        runtime.spawn(operations::serve(session.world, session.body, agent, stream));
        Ok(())
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
