//! Our own agent in a simulated guest. It is the real agent, served on a thread of its own, or a
//! function of the test in its place.
//!
//! `operations` is between the host and the real agent: it simulates the operations on the guest as
//! a whole, which the real agent would perform on the host of the test.

mod operations;

use crate::sim_vmm::body::Body;
use crate::sim_vmm::guest::SimAgent;
use crate::sim_vmm::world::World;
use scalebox_vmm::MachineState;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::thread;
use tokio::net::UnixStream;

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
    inside.served.count();
    match agent {
        SimAgent::Unreachable | SimAgent::Silent => {}
        SimAgent::Real => {
            theirs.set_nonblocking(true)?;
            let (world, body) = (world.clone(), body.clone());
            inside.served.add(Box::new(|agent| {
                Box::pin(async move {
                    if let Ok(stream) = UnixStream::from_std(theirs) {
                        // For the host, an error looks like an agent that does not respond.
                        let _ended = operations::serve(world, body, agent, stream).await;
                    }
                })
            }))?;
        }
        SimAgent::Scripted(serve) => drop(thread::spawn(move || serve(theirs))),
    }
    drop(inside);
    ours.set_nonblocking(true)?;
    UnixStream::from_std(ours)
}
